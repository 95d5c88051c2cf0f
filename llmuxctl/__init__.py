"""`llmuxctl`: shows and steers a running llmuxd over its control socket.

It imports nothing of `llmuxd` but the names of the protocol and the version, and nothing that is slow to load.
`config check`, `key new`, `doctor` and the man pages need the configuration as well, and import it when they run.
"""
