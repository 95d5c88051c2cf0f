"""`python -m llmuxd` is `llmuxd`."""

from llmuxd.cli import main

if __name__ == "__main__":
    main()
