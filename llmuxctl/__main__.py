"""`python -m llmuxctl` is `llmuxctl`."""

from llmuxctl.cli import main

if __name__ == "__main__":
    main()
