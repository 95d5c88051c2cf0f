"""Stand-ins for what needs a GPU: `python -m llmuxd.sim.vllm` is a vLLM that computes nothing.

It is for demonstrations, for tests, and for trying a configuration out; the daemon knows nothing of it.
"""
