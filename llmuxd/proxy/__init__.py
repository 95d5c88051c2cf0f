"""The proxy: the clients' HTTP on one side, the engines' on the other, the gate in between.

The bytes of requests and answers pass as they are. `http1`, `framing`, `routes`, `extract`, `scan`, `headers`, `keys`,
`cors`, `errors`, `answers`, `events`, `memo` and `responses` are pure; `connection` is a client's side, `upstream` an
engine's, `exchange` one request, `relay` its path to an engine and back, `heartbeat` what keeps its client waiting,
`access` what is noted of it; `handler` is what they share, and `site` where it listens. When a request may pass is the
core's to say, behind `llmuxd.gate`.
"""

from __future__ import annotations

from llmuxd.proxy.handler import Limits, build_proxy
from llmuxd.proxy.site import Site, serve_proxy

__all__ = ["Limits", "Site", "build_proxy", "serve_proxy"]
