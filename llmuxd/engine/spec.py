"""What an engine is started with: its argv, its environment, its socket, its folders.

Pure of processes: nothing here starts or touches one. Folders are made by `make_private_folder` when an engine
starts, not before.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp

if TYPE_CHECKING:
    from llmuxd.config import Config, ModelConfig
from llmuxd.config.loras import lora_names
from llmuxd.core.eviction import Auto, ProcessStrategy

SOCKET_PATH_LIMIT = 107
"""Bytes of a Unix socket's path, the closing zero of `sun_path` taken off."""

TOKEN_ENV = "LLMUX_ENGINE_TOKEN"
"""Marks every process of one incarnation, whatever session it moved to and whoever its parent is."""

OWNER_ENV = "LLMUX_ENGINE_OF"
"""Marks every process of every engine with the state folder of its daemon: what an earlier one left is found by it."""

_ZMQ_NAME_BYTES = 40
"""vLLM names its ZMQ sockets by a UUID (36 characters) in VLLM_RPC_BASE_PATH."""

_SOCKET_SUFFIX = ".sock"
_RPC_SUFFIX = ".rpc"
_DIGEST_LENGTH = 8

WITHOUT_IO_URING = (sys.executable, "-I", str(Path(__file__).with_name("without_io_uring.py")))
"""Runs the command that follows it where io_uring is refused, as the same process."""

# systemd's are for the daemon alone: an engine that inherits them can answer its watchdog or take its sockets.
_NOT_FOR_ENGINES = (
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
    "LISTEN_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "JOURNAL_STREAM",
    "CREDENTIALS_DIRECTORY",
)


@dataclass(frozen=True)
class Endpoint:
    """Where an engine listens: on a Unix socket, or on a port of 127.0.0.1."""

    uds: Path | None = None
    port: int | None = None

    @property
    def base_url(self) -> str:
        return "http://localhost" if self.uds is not None else f"http://127.0.0.1:{self.port}"

    def connector(self) -> aiohttp.BaseConnector:
        """A connector to it, to be made in a running loop and closed by the caller.

        One connection per request, without a limit: an idle one that an engine closes while it is being used
        again cannot be told from an engine that died.
        """
        if self.uds is not None:
            return aiohttp.UnixConnector(str(self.uds), force_close=True, limit=0)
        return aiohttp.TCPConnector(force_close=True, limit=0)

    def __str__(self) -> str:
        return str(self.uds) if self.uds is not None else f"127.0.0.1:{self.port}"


@dataclass(frozen=True)
class EngineSpec:
    """All that is needed to start the engine of one model.

    Raises ValueError if `socket_dir` is so long that no Unix socket fits into it.
    """

    name: str
    model_path: str
    vllm_command: tuple[str, ...]
    socket_dir: Path
    log_path: Path
    aliases: tuple[str, ...] = ()
    extra_args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    port: int | None = None
    owner: str = ""
    """The state folder of the daemon that it belongs to."""
    savable: bool = False
    """It is started so that CRIU can save it: without io_uring, and without the capabilities that CRIU needs."""

    def __post_init__(self) -> None:
        if self.port is None and self._slug_room() < _DIGEST_LENGTH:
            raise ValueError(
                f"{self.socket_dir} is too long for a Unix socket (the path may have {SOCKET_PATH_LIMIT} bytes): "
                f"choose a shorter runtime folder, or give model {self.name!r} a port"
            )

    def _slug_room(self) -> int:
        return SOCKET_PATH_LIMIT - len(os.fsencode(self.socket_dir / _SOCKET_SUFFIX))

    @cached_property
    def endpoint(self) -> Endpoint:
        """Made once: every request that is forwarded asks for it."""
        if self.port is not None:
            return Endpoint(port=self.port)
        return Endpoint(uds=self.socket_dir / (slug(self.name, self._slug_room()) + _SOCKET_SUFFIX))

    @property
    def rpc_dir(self) -> Path:
        """The engine's own folder for ZMQ sockets.

        Beside its socket, or, where that path is too long for what vLLM puts there, in the folder for temporary
        files, under a name that depends on nothing but the socket's folder and the model.
        """
        beside = self.socket_dir / (slug(self.name, 64) + _RPC_SUFFIX)
        digest = hashlib.sha256(os.fsencode(beside.absolute())).hexdigest()[:16]
        name = f"llmux-{os.getuid()}-{digest}"
        candidates = (beside, Path(tempfile.gettempdir()) / name)
        fitting = (p for p in candidates if len(os.fsencode(p)) + 1 + _ZMQ_NAME_BYTES <= SOCKET_PATH_LIMIT)
        return next(fitting, Path("/tmp") / name)


def slug(name: str, limit: int) -> str:
    """A file name for a model's name, at most `limit` bytes long and different for different names."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".")
    if plain == name and len(name) <= limit:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:_DIGEST_LENGTH]
    kept = plain[: limit - _DIGEST_LENGTH - 1]
    return f"{kept}-{digest}" if kept and limit > _DIGEST_LENGTH + 1 else digest


def engine_spec(config: Config, model: ModelConfig) -> EngineSpec:
    """The spec of a configured model's engine. Raises ValueError if the runtime folder's path is too long."""
    return EngineSpec(
        name=model.name,
        model_path=model.model_path,
        vllm_command=tuple(config.vllm_command),
        socket_dir=config.runtime_dir / "engines",
        log_path=config.state_dir / "logs" / f"{slug(model.name, 64)}.log",
        aliases=tuple(model.aliases),
        extra_args=tuple(model.extra_args),
        env=dict(model.env),
        port=model.port,
        owner=str(config.state_dir),
        savable=_may_be_saved(config, model) or _has_ambient_capabilities(),
    )


def _may_be_saved(config: Config, model: ModelConfig) -> bool:
    """Whether its engine may have to be saved to an image: by its policy, or by the word of an operator who has said
    anything of checkpoints."""
    eviction = model.eviction
    by_policy = isinstance(eviction, Auto) or eviction.process is ProcessStrategy.CHECKPOINT
    return by_policy or model.checkpoint_path is not None or config.checkpoint != type(config.checkpoint)()


@cache
def _has_ambient_capabilities() -> bool:
    """Whether what this process starts has capabilities by that, though it is not root; see capabilities(7)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return False
    return any(int(line.split()[1], 16) for line in lines if line.startswith("CapAmb:"))


def build_argv(spec: EngineSpec, base: Mapping[str, str] | None = None) -> list[str]:
    """The argv of `vllm serve`, for an engine whose environment is made of `base`.

    The model's own arguments come last, so that they win.
    """
    # vLLM serves its LoRA modules by their own names, and takes none of them twice.
    loras = lora_names(spec.extra_args)
    names = [spec.name, *(alias for alias in spec.aliases if alias not in loras)]
    argv = [*spec.vllm_command, "serve", spec.model_path, "--served-model-name", *names]
    endpoint = spec.endpoint
    if endpoint.uds is not None:
        argv += ["--uds", str(endpoint.uds)]
    else:
        argv += ["--host", "127.0.0.1", "--port", str(endpoint.port)]
    if _wants_sleep_flag(spec, {**(base or {}), **spec.env}):
        argv.append("--enable-sleep-mode")
    argv += spec.extra_args
    return [*WITHOUT_IO_URING, *argv] if spec.savable else argv


def _wants_sleep_flag(spec: EngineSpec, env: Mapping[str, str]) -> bool:
    """Whether --enable-sleep-mode is to be added.

    vLLM's CPU build refuses it ("not supported on current platform") and pauses without it. Which build it is
    cannot be asked before it is started, so its environment tells (a model's `env`, or the daemon's own):
    VLLM_CPU_KVCACHE_SPACE, which only a CPU engine reads, or VLLM_TARGET_DEVICE=cpu. Either spelling of the
    flag in `extra_args` decides by itself.
    """
    if {"--enable-sleep-mode", "--no-enable-sleep-mode"} & set(spec.extra_args):
        return False
    return env.get("VLLM_TARGET_DEVICE", "").lower() != "cpu" and "VLLM_CPU_KVCACHE_SPACE" not in env


def build_env(spec: EngineSpec, base: Mapping[str, str]) -> dict[str, str]:
    """The environment of the engine: `base` without what is the daemon's alone, the model's `env`, then ours.

    The development endpoints (sleep, wake_up) need VLLM_SERVER_DEV_MODE; the proxy never lets a client reach them.
    """
    env = {key: value for key, value in base.items() if key not in _NOT_FOR_ENGINES}
    env.update(spec.env)
    env["VLLM_SERVER_DEV_MODE"] = "1"
    env["VLLM_RPC_BASE_PATH"] = str(spec.rpc_dir)
    env[OWNER_ENV] = spec.owner
    return env


def check_executable(spec: EngineSpec, env: Mapping[str, str]) -> None:
    """Raises OSError if the command is not there: what runs it on our behalf could only say so in the log."""
    if spec.savable and shutil.which(spec.vllm_command[0], path=env.get("PATH")) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def api_key(spec: EngineSpec, base: Mapping[str, str]) -> str | None:
    """The key that the engine itself asks for on /v1, if it was given one."""
    key = spec.env.get("VLLM_API_KEY") or base.get("VLLM_API_KEY") or None
    for index, argument in enumerate(spec.extra_args):
        if argument.startswith("--api-key="):
            key = argument.partition("=")[2]
        elif argument == "--api-key" and index + 1 < len(spec.extra_args):
            key = spec.extra_args[index + 1]
    return key


def make_private_folder(path: Path) -> None:
    """Make a folder that only this user can enter, its parents too where they are missing.

    Raises OSError if it cannot be made, or PermissionError if something else's has its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise PermissionError(f"{path} is there already and is not a folder of this user") from None
    path.chmod(0o700)
