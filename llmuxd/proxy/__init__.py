"""The proxy: the clients' HTTP on one side, the engines' on the other, the gate in between.

Requests and answers pass byte for byte. `routes`, `extract`, `headers`, `errors` and `events` are pure; `connection`
is the listening side, `upstream` the way to the engines, `relay` one request's path through all of it, `heartbeat`
what keeps its client waiting, and `handler` puts them together. When a request may pass is the core's to say, behind
`llmuxd.gate`.
"""

from __future__ import annotations

from llmuxd.proxy.connection import Site, serve_proxy
from llmuxd.proxy.handler import Limits, build_proxy

__all__ = ["Limits", "Site", "build_proxy", "serve_proxy"]
