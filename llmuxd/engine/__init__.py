"""One engine: the `vllm serve` process of a model, from its argv to the last byte that it leaves behind.

Here are the processes and vLLM's HTTP calls; what to do with an engine, and when, is decided in `llmuxd.core`.
`engine.Engine` is the whole of it for a caller. Below it: `run` (one incarnation), `spec` (argv, environment,
paths), `process` (spawn, find, kill), `proctable` (who descends from whom), `cgroup` (a control group for each), `shm`
(shared memory left behind), `watch` (has it died?), `api` (HTTP), `record` and `adopting` (finding it again) and
`logtail`.
"""

from __future__ import annotations

from llmuxd.core.events import FailureKind
from llmuxd.engine.engine import Engine
from llmuxd.engine.errors import EngineError
from llmuxd.engine.logtail import tail_lines
from llmuxd.engine.run import EngineInfo
from llmuxd.engine.spec import Endpoint, EngineSpec, build_argv, build_env, engine_spec

__all__ = [
    "Endpoint",
    "Engine",
    "EngineError",
    "EngineInfo",
    "EngineSpec",
    "FailureKind",
    "build_argv",
    "build_env",
    "engine_spec",
    "tail_lines",
]
