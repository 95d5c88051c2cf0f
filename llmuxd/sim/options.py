"""What a simulated engine is told: the arguments of `vllm serve`, and the sizes and speeds from its environment."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmuxd.sim.ledger import GIB

PREFIX = "LLMUX_SIM_"

VERSION = "0.32.0"
"""Of the vLLM that is simulated, if nothing else is said."""


@dataclass(frozen=True)
class Options:
    """One engine. Sizes in bytes, speeds in GiB/s, times in simulated seconds."""

    model: str
    names: tuple[str, ...]
    loras: Mapping[str, str]
    """Name of a LoRA module -> its path."""
    ranks: int
    """--tensor-parallel-size: more than one are held together by communicators."""
    version: tuple[int, ...]
    """The version of vLLM that it says it is."""
    uds: Path | None
    host: str
    port: int
    development: bool
    request_id_headers: bool
    """--enable-request-id-headers: answers carry X-Request-Id, the client's if it sent one."""
    load_tracking: bool
    scale_out: bool
    """--enable-scale-out: the /inference endpoints serve; else they answer 403."""
    lora_updating: bool
    responses_store: bool
    """VLLM_ENABLE_RESPONSES_API_STORE: responses are kept, and may run in the background."""
    utilization: float
    level: int | None
    """It comes up asleep at this level, as a restored process does; None for a start."""
    scale: float
    """Real seconds per simulated second; 0 makes everything instant."""
    weights: int
    kv_cache_fixed: int | None
    residual: int
    load_gib_s: float
    offload_gib_s: float
    wake_gib_s: float
    start_secs: float
    tokens_per_s: float
    orphan_secs: float
    """Real seconds that EngineCore outlives an API server that was killed."""
    linger_secs: float
    """Real seconds that the API server outlives an EngineCore that was killed."""
    ledger: Path | None
    faults: str
    fault_file: Path | None

    def kv_cache(self, total: int) -> int:
        """The KV cache takes what the utilization of the device leaves, as vLLM's does."""
        if self.kv_cache_fixed is not None:
            return self.kv_cache_fixed
        return max(0, int(self.utilization * total) - self.weights - self.residual)


def parse(argv: Sequence[str], env: Mapping[str, str]) -> Options:
    """Read them; arguments that change nothing here are accepted. Exits with 2 as argparse does."""
    known, _ = _parser().parse_known_args(argv)

    def number(name: str, default: float) -> float:
        return float(env.get(PREFIX + name, default))

    def is_on(name: str) -> bool:
        return env.get(name, "0").strip().lower() in ("1", "true")

    kv_cache, level = env.get(PREFIX + "KV_GIB"), env.get(PREFIX + "LEVEL")
    fault_file, ledger = env.get(PREFIX + "FAULT_FILE"), env.get(PREFIX + "LEDGER")
    return Options(
        model=known.model,
        names=tuple(known.served_model_name or [known.model]),
        loras=dict(known.lora_modules),
        ranks=known.tensor_parallel_size,
        version=tuple(map(int, env.get(PREFIX + "VERSION", VERSION).split("."))),
        uds=known.uds,
        host=known.host,
        port=known.port,
        development=env.get("VLLM_SERVER_DEV_MODE") == "1",
        request_id_headers=known.enable_request_id_headers,
        load_tracking=known.enable_server_load_tracking,
        scale_out=known.enable_scale_out,
        lora_updating=is_on("VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        responses_store=is_on("VLLM_ENABLE_RESPONSES_API_STORE"),
        utilization=known.gpu_memory_utilization,
        level=None if level is None else int(level),
        scale=number("SCALE", 1.0),
        weights=int(number("WEIGHTS_GIB", 4.0) * GIB),
        kv_cache_fixed=None if kv_cache is None else int(float(kv_cache) * GIB),
        residual=int(number("RESIDUAL_GIB", 0.5) * GIB),
        load_gib_s=number("LOAD_GIB_S", 1.0),
        offload_gib_s=number("OFFLOAD_GIB_S", 10.0),
        wake_gib_s=number("WAKE_GIB_S", 20.0),
        start_secs=number("START_SECS", 20.0),
        tokens_per_s=number("TOKENS_PER_S", 50.0),
        orphan_secs=number("ORPHAN_SECS", 60.0),
        linger_secs=number("LINGER_SECS", 5.0),
        ledger=None if ledger is None else Path(ledger),
        faults=env.get(PREFIX + "FAULTS", ""),
        fault_file=None if fault_file is None else Path(fault_file),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm", allow_abbrev=False)
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--lora-modules", nargs="+", type=_lora, default=[])
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    parser.add_argument("--uds", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--enable-request-id-headers", action="store_true")
    parser.add_argument("--enable-server-load-tracking", action="store_true")
    parser.add_argument("--enable-scale-out", action="store_true")
    return parser


def _lora(text: str) -> tuple[str, str]:
    """One LoRA module: NAME=PATH, or an object with `name` and `path`."""
    try:
        if text.startswith("{"):
            module = json.loads(text)
            return module["name"], module["path"]
        name, path = text.split("=", 1)
    except (KeyError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither NAME=PATH nor an object of the two") from error
    return name, path
