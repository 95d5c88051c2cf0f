"""The configuration as the program uses it: frozen, validated, complete. How it is read is in `load`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmuxd.config.loras import lora_names
from llmuxd.core.eviction import Auto, EvictionPolicy, ProcessStrategy, WeightStrategy
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
    eviction: EvictionPolicy | Auto = DEFAULT_EVICTION
    checkpoint_path: Path | None = None
    aliases: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    max_in_flight: int | None = None
    max_queue: int | None = None
    ttl_secs: float | None = None
    start_timeout_secs: float = 1800.0
    priority: float = 1.0

    @property
    def further_names(self) -> tuple[str, ...]:
        """What clients may call it as well: its aliases, and the LoRA modules that its arguments name."""
        return tuple(dict.fromkeys((*self.aliases, *lora_names(self.extra_args))))


@dataclass(frozen=True, slots=True)
class KeyConfig:
    """One client's key, and what may be done with it; None means no bound."""

    name: str
    sha256: str
    """Of the key: 64 hexadecimal digits in lower case."""
    models: tuple[str, ...] | None = None
    """Names of models, whatever the file calls them; None for all."""
    requests_per_minute: int | None = None
    max_parallel: int | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """When and how models are switched."""

    policy_type: str = DEFAULT_POLICY
    request_timeout_secs: float = 300.0
    drain_before_switch: bool = True
    in_flight: InFlight = InFlight.DRAIN
    """DRAIN or PARK; without `drain_before_switch` no switch waits, whatever this says."""
    eviction: EvictionPolicy | Auto = DEFAULT_EVICTION
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
    access_key: str = field(default="", repr=False)
    """Empty if it is in a file."""
    secret_key: str = field(default="", repr=False)
    access_key_file: Path | None = None
    """One without a folder is a credential of systemd's."""
    secret_key_file: Path | None = None
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
    keys: tuple[KeyConfig, ...] = ()
    """In the order of the files. Without any, no client needs one."""
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
    max_head_bytes: int = 65_536
    max_connections: int = 4096
    head_timeout_secs: float = 30.0
    body_timeout_secs: float = 30.0
    send_timeout_secs: float = 120.0
    cors_origins: tuple[str, ...] = ()
    """Each as a browser spells it, or "*" for all."""
    access_log: bool = True
    start_timeout_secs: float = 1800.0
    sleep_timeout_secs: float = 120.0
    wake_timeout_secs: float = 300.0
    stop_timeout_secs: float = 30.0
    shutdown_timeout_secs: float = 30.0
    heartbeat_secs: float = 10.0
    warnings: tuple[str, ...] = ()
