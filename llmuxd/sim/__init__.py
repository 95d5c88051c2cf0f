"""Stand-ins for what needs a GPU: `python -m llmuxd.sim.vllm` is a vLLM that computes nothing.

It is for demonstrations, for tests, and for trying a configuration out; of the daemon, only `llmuxd --demo` knows of
it. `virtual` runs the switching core itself under virtual time: `python -m llmuxd.sim`.
"""
