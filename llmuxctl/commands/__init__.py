"""The commands of `llmuxctl`, by what they are for: seeing, doing, the configuration, the box."""
