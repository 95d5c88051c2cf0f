"""The production core under virtual time: workloads, engines and faults, all made from a seed.

`world` runs a `Scenario` through `llmuxd.core`, with engines of `engine` whose requests are served as `service`
says. `workloads` makes what arrives, `chaos` what goes wrong. `sweep` looks for broken invariants over many seeds
and `shrink` makes a failing one short; `bench` compares policies. Nothing here reads a clock, sleeps, or draws a
number that is not from the seed.
"""
