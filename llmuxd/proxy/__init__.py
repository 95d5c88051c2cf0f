"""The TCP side: the OpenAI-compatible port. It reads a request's model, waits at the gate, and relays.

Who waits and who goes is decided in `llmuxd.core`.
"""

from __future__ import annotations

from llmuxd.proxy.clients import Site, serve_proxy
from llmuxd.proxy.proxy import build_proxy

__all__ = ["Site", "build_proxy", "serve_proxy"]
