"""The configuration as the program uses it: frozen, validated, complete. How it is read is in `load`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmuxd.core.eviction import EvictionPolicy, ProcessStrategy, WeightStrategy
from llmuxd.core.policies import DEFAULT_POLICY
from llmuxd.core.policy import PolicyParameters
from llmuxd.core.settings import InFlight

POLICIES_OF_0_7 = ("fifo", "cost_aware", "time_slice")
COOLDOWN_OF_0_7_SECS = 5.0
"""What `min_active_secs` is under those policies if nothing is said. Others give turns of their own."""

DEFAULT_LISTEN = "127.0.0.1"
DEFAULT_PORT = 3000

DEFAULT_EVICTION = EvictionPolicy(WeightStrategy.OFFLOAD, ProcessStrategy.KEEP_RUNNING)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model. Durations in seconds; None means no bound of its own."""

    name: str
    model_path: str
    port: int | None = None
    extra_args: tuple[str, ...] = ()
    eviction: EvictionPolicy = DEFAULT_EVICTION
    checkpoint_path: Path | None = None
    aliases: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    max_in_flight: int | None = None
    max_queue: int | None = None
    ttl_secs: float | None = None
    start_timeout_secs: float = 1800.0
    priority: float = 1.0


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """When and how models are switched."""

    policy_type: str = DEFAULT_POLICY
    request_timeout_secs: float = 300.0
    drain_before_switch: bool = True
    in_flight: InFlight = InFlight.DRAIN
    """DRAIN or PARK; without `drain_before_switch` no switch waits, whatever this says."""
    eviction: EvictionPolicy = DEFAULT_EVICTION
    min_active_secs: float = 0.0
    coalesce_window_ms: int = 2000
    amortization_factor: float = 0.5
    max_wait_secs: float = 15.0
    tick_interval_ms: int = 500
    min_quantum_ms: int = 2000

    @property
    def parameters(self) -> PolicyParameters:
        """What the policy is built with."""
        return PolicyParameters(
            coalesce_window=self.coalesce_window_ms / 1000,
            amortization_factor=self.amortization_factor,
            max_wait=self.max_wait_secs,
            tick_interval=self.tick_interval_ms / 1000,
            min_quantum=self.min_quantum_ms / 1000,
        )


@dataclass(frozen=True, slots=True)
class ObjectStoreConfig:
    """An S3-compatible store for checkpoint images."""

    endpoint: str
    bucket: str
    access_key: str
    secret_key: str
    region: str = "us-east-1"


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """Tools and folders for checkpoints."""

    criu_path: str = "criu"
    cuda_plugin_dir: str = "/usr/lib/criu/"
    images_dir: Path = Path("/tmp/llmux-checkpoints")
    cuda_checkpoint_path: str = "cuda-checkpoint"
    keep_images: bool = True
    object_store: ObjectStoreConfig | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that llmuxd is told. Durations in seconds, sizes in bytes."""

    runtime_dir: Path
    state_dir: Path
    control_socket: Path
    models: Mapping[str, ModelConfig] = field(default_factory=dict)
    policy: PolicyConfig = PolicyConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    port: int = DEFAULT_PORT
    listen: str = DEFAULT_LISTEN
    metrics_port: int = 9090
    control_read_group: str = ""
    vllm_command: tuple[str, ...] = ("vllm",)
    warmup: bool = False
    max_queue: int = 1024
    max_body_bytes: int = 67_108_864
    start_timeout_secs: float = 1800.0
    sleep_timeout_secs: float = 120.0
    wake_timeout_secs: float = 300.0
    stop_timeout_secs: float = 30.0
    shutdown_timeout_secs: float = 30.0
    heartbeat_secs: float = 10.0
    warnings: tuple[str, ...] = ()
