"""What a request costs on its way through llmuxd, beside other reverse proxies: `make bench-relay`."""
