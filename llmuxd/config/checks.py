"""The checks that concern several keys at once, and the warnings.

Each function notes in the reading what is wrong; none raises. A key that `Reading.failed` is left alone.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping

from llmuxd.config.errors import path_of, shown
from llmuxd.config.reading import Reading
from llmuxd.config.schema import nearest
from llmuxd.config.types import Config, ModelConfig
from llmuxd.core.eviction import ProcessStrategy
from llmuxd.core.policy import BuildPolicy
from llmuxd.core.settings import InFlight
from llmuxd.policies import PolicyBroken
from llmuxd.protocol import RUNTIME_DIR_ENV

SOCKET_PATH_BYTES = 107
"""The longest path of a Unix socket on Linux."""

RUNTIME_DIR_BYTES = 85
"""The longest runtime folder in which an engine's socket has room: /engines/, a digest of 8 and .sock."""

OWN_ARGUMENTS = {
    "--host": "engines listen on a Unix socket, or on 127.0.0.1 with models.NAME.port",
    "--port": "use models.NAME.port",
    "--uds": "each engine gets a socket of its own",
    "--served-model-name": "use the model's name and models.NAME.aliases",
    "--root-path": "it would give the engine's development endpoints a second name",
    "--api-key": "llmuxd alone reaches the engines, and would be locked out",
}
"""Arguments of `vllm serve` that llmuxd sets or that would cut it off from its engine, and why each may not be set."""


def check(config: Config, reading: Reading, policies: Mapping[str, BuildPolicy | None]) -> None:
    """Note every problem that one key alone does not show. `policies` has None for what cannot be tried."""
    _check_names(config, reading)
    _check_ports(config, reading)
    _check_paths(config, reading)
    _check_policy(config, reading, policies)
    for model in config.models.values():
        _check_arguments(model, reading)


def _check_names(config: Config, reading: Reading) -> None:
    owners = dict.fromkeys(config.models, "the name of a model")
    for model in config.models.values():
        for alias in model.aliases:
            if alias in owners:
                reading.wrong(path_of(model.name, "aliases"), f"found {shown(alias)}, which is {owners[alias]} already")
            else:
                owners[alias] = f"an alias of {model.name}"


def _check_ports(config: Config, reading: Reading) -> None:
    ports = [("port", config.port), ("metrics_port", config.metrics_port)]
    ports += [(path_of(model.name, "port"), model.port or 0) for model in config.models.values()]
    taken: dict[int, str] = {}
    for path, port in ports:
        if port == 0 or reading.failed(path):
            continue
        other = taken.setdefault(port, path)
        if other != path:
            # One of the two may be a default, which no file can be blamed for.
            here, there = (path, other) if reading.given(path) else (other, path)
            reading.wrong(here, f"found {port}, which {there} has already")


def _check_paths(config: Config, reading: Reading) -> None:
    folder = config.runtime_dir
    if _length(folder) > RUNTIME_DIR_BYTES and any(model.port is None for model in config.models.values()):
        text = f"found {shown(str(folder))}; allowed: a path of at most {RUNTIME_DIR_BYTES} bytes, for engines' sockets"
        reading.wrong(RUNTIME_DIR_ENV, text, "the environment")
    elif _length(config.control_socket) > SOCKET_PATH_BYTES:
        text = f"found {shown(str(config.control_socket))}; allowed: a path of at most {SOCKET_PATH_BYTES} bytes"
        if reading.given("control_socket"):
            reading.wrong("control_socket", text)
        else:
            reading.wrong(RUNTIME_DIR_ENV, text, "the environment")


def _length(path: os.PathLike[str]) -> int:
    return len(os.fsencode(path))


def _check_policy(config: Config, reading: Reading, known: Mapping[str, BuildPolicy | None]) -> None:
    drains = config.policy.in_flight is InFlight.DRAIN and reading.given("policy.in_flight")
    if drains and not config.policy.drain_before_switch:
        reading.wrong("policy.in_flight", "found 'drain', which contradicts policy.drain_before_switch = false")
    name = config.policy.policy_type
    if not reading.given("policy.policy_type") or reading.failed("policy.policy_type"):
        return
    if name in known:
        build = known[name]
        try:
            if build is not None:
                build(config.policy.parameters)
        except PolicyBroken as broken:
            reading.wrong("policy.policy_type", f"found {shown(name)}: {broken}")
        return
    meant = nearest(name, known)
    hint = f" (did you mean {meant!r}?)" if meant else ""
    reading.wrong("policy.policy_type", f"found {shown(name)}; allowed: {', '.join(known)}{hint}")


def _check_arguments(model: ModelConfig, reading: Reading) -> None:
    for argument in model.extra_args:
        # What follows the `=` is not shown: it may be a key.
        flag = argument.partition("=")[0]
        why = OWN_ARGUMENTS.get(flag.replace("_", "-"))
        if why:
            reading.wrong(path_of(model.name, "extra_args"), f"found {shown(flag)}, which llmuxd decides: {why}")


def warnings(config: Config, reading: Reading) -> tuple[str, ...]:
    """What is accepted and yet not what one might expect, a sentence each."""
    found = []
    if reading.given("admin_port"):
        found.append("admin_port is not used: control is a Unix socket, see control_socket")
    if not _is_loopback(config.listen):
        found.append(f"listen = {shown(config.listen)}: anyone who reaches this address may use the models")
    for model in config.models.values():
        if model.eviction.process in (ProcessStrategy.CUDA_SUSPEND, ProcessStrategy.CHECKPOINT):
            found.append(
                f"{path_of(model.name, 'eviction')} {model.eviction} is not supported yet: the engine is stopped"
            )
        if model.checkpoint_path is not None:
            found.append(
                f"{path_of(model.name, 'checkpoint_path')} is not supported yet: the model starts from its weights"
            )
    return tuple(found)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address.lower() == "localhost"
