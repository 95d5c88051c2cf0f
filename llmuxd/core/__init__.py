"""The switching core: events in, commands out.

Everything that decides is in this package, and nothing else is: no asyncio, no clock, no I/O. Time is passed
in as seconds of a monotonic clock. `switcher.Switcher` is the state machine, `events` and `commands` are what
goes in and comes out, `policy` is how a policy sees the world.
"""
