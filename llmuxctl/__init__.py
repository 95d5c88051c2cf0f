"""`llmuxctl`: shows and steers a running llmuxd over its control socket.

It imports nothing of `llmuxd` but the names of the protocol, and nothing that is slow to load.
"""
