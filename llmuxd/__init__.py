"""llmux: more vLLM models than a GPU can hold, behind one OpenAI-compatible port.

The names below are the library. They are loaded when they are first used, so that `llmuxctl`, which
needs no more than `llmuxd.protocol`, stays quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmuxd.version import __version__

if TYPE_CHECKING:
    from llmuxd.app import App, build_app, run_warmup
    from llmuxd.config import Config, ConfigError, load_config, parse_config
    from llmuxd.control.api import ControlFailed, NotAllowed, UnknownModel
    from llmuxd.core.eviction import EvictionPolicy, ProcessStrategy, WeightStrategy
    from llmuxd.core.policies import CostAware, Fifo, Tenure, TimeSlice
    from llmuxd.core.policy import (
        Candidate,
        Decision,
        ModelView,
        Policy,
        PolicyParameters,
        Snapshot,
        Stay,
        SwitchTo,
    )
    from llmuxd.core.state import IllegalEvent, SwitchMode
    from llmuxd.core.switcher import Switcher
    from llmuxd.engine import EngineError
    from llmuxd.gate import Refused

_HOME = {
    "App": "llmuxd.app",
    "Candidate": "llmuxd.core.policy",
    "Config": "llmuxd.config",
    "ConfigError": "llmuxd.config",
    "ControlFailed": "llmuxd.control.api",
    "CostAware": "llmuxd.core.policies",
    "Decision": "llmuxd.core.policy",
    "EngineError": "llmuxd.engine",
    "EvictionPolicy": "llmuxd.core.eviction",
    "Fifo": "llmuxd.core.policies",
    "IllegalEvent": "llmuxd.core.state",
    "ModelView": "llmuxd.core.policy",
    "NotAllowed": "llmuxd.control.api",
    "Policy": "llmuxd.core.policy",
    "PolicyParameters": "llmuxd.core.policy",
    "ProcessStrategy": "llmuxd.core.eviction",
    "Refused": "llmuxd.gate",
    "Snapshot": "llmuxd.core.policy",
    "Stay": "llmuxd.core.policy",
    "SwitchMode": "llmuxd.core.state",
    "SwitchTo": "llmuxd.core.policy",
    "Switcher": "llmuxd.core.switcher",
    "Tenure": "llmuxd.core.policies",
    "TimeSlice": "llmuxd.core.policies",
    "UnknownModel": "llmuxd.control.api",
    "WeightStrategy": "llmuxd.core.eviction",
    "build_app": "llmuxd.app",
    "load_config": "llmuxd.config",
    "parse_config": "llmuxd.config",
    "run_warmup": "llmuxd.app",
}

__all__ = [
    "App",
    "Candidate",
    "Config",
    "ConfigError",
    "ControlFailed",
    "CostAware",
    "Decision",
    "EngineError",
    "EvictionPolicy",
    "Fifo",
    "IllegalEvent",
    "ModelView",
    "NotAllowed",
    "Policy",
    "PolicyParameters",
    "ProcessStrategy",
    "Refused",
    "Snapshot",
    "Stay",
    "SwitchMode",
    "SwitchTo",
    "Switcher",
    "Tenure",
    "TimeSlice",
    "UnknownModel",
    "WeightStrategy",
    "__version__",
    "build_app",
    "load_config",
    "parse_config",
    "run_warmup",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
