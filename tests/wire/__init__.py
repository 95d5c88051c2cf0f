"""The proxy as it is on the wire: what it makes of every byte, in both directions, and what is left afterwards."""
