"""The Unix-socket side: the control API, in JSON over HTTP. What its calls do is `llmuxd.steering`'s."""

from __future__ import annotations

from llmuxd.control.handlers import build_control
from llmuxd.control.server import serve_control

__all__ = ["build_control", "serve_control"]
