"""The checks that concern several keys at once, and the warnings.

Each function notes in the reading what is wrong; none raises. A key that `Reading.failed` is left alone.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping

from llmuxd.config.errors import path_of, shown
from llmuxd.config.ranks import parallel_size
from llmuxd.config.reading import Reading
from llmuxd.config.schema import nearest
from llmuxd.config.types import Config, ModelConfig
from llmuxd.core.eviction import Auto, ProcessStrategy
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


STORE_KEYS = ("access_key", "secret_key")

LEAVING = (ProcessStrategy.CUDA_SUSPEND, ProcessStrategy.CHECKPOINT)

NEEDED_BY_RANKS = {
    "--enforce-eager": "CUDA graphs hold on to communicators that are taken down before",
    "--disable-custom-all-reduce": "it maps the memory of one rank into another, which does not come back",
}
"""Arguments of `vllm serve` without which ranks that left their devices do not find each other again, and why."""


def check(config: Config, reading: Reading, policies: Mapping[str, BuildPolicy | None]) -> None:
    """Note every problem that one key alone does not show. `policies` has None for what cannot be tried."""
    _check_names(config, reading)
    _check_ports(config, reading)
    _check_paths(config, reading)
    _check_policy(config, reading, policies)
    _check_store(reading)
    _check_keys(config, reading)
    _check_models_of_keys(config, reading)
    for model in config.models.values():
        _check_arguments(model, reading)


def _check_names(config: Config, reading: Reading) -> None:
    owners = dict.fromkeys(config.models, "the name of a model")
    for model in config.models.values():
        loras = [name for name in model.further_names if name not in model.aliases]
        for alias in (*model.aliases, *loras):
            if alias in owners:
                key = "aliases" if alias in model.aliases else "extra_args"
                reading.wrong(path_of(model.name, key), f"found {shown(alias)}, which is {owners[alias]} already")
            else:
                owners[alias] = f"an alias of {model.name}"


def _check_store(reading: Reading) -> None:
    """Each of the two keys stands in the config, or in a file."""
    table = "checkpoint.object_store"
    if not any(reading.given(f"{table}.{name}") for name in ("endpoint", "bucket", *STORE_KEYS)):
        return
    for name in STORE_KEYS:
        path = f"{table}.{name}"
        if not reading.given(path) and not reading.given(f"{path}_file"):
            at = next(each for each in ("endpoint", "bucket", *STORE_KEYS) if reading.given(f"{table}.{each}"))
            source = reading.source(f"{table}.{at}")
            reading.wrong(path, f"is missing; allowed: a string that is not empty, or {path}_file", source)


def _check_keys(config: Config, reading: Reading) -> None:
    taken: dict[tuple[str, str], tuple[str, str]] = {}
    for (at, entry), key in zip(reading.entries("keys"), config.keys, strict=True):
        for part, found in (("name", shown(key.name)), ("sha256", '"***"')):
            path = f"{at}.{part}"
            if not entry.given(path) or entry.failed(path):
                continue
            source = entry.source(path)
            other, its_source = taken.setdefault((part, getattr(key, part)), (at, source))
            if (other, its_source) != (at, source):
                there = other if its_source == source else f"{other} of {its_source}"
                entry.wrong(path, f"found {found}, which {there} has already")


def _check_models_of_keys(config: Config, reading: Reading) -> None:
    names = models_by_name(config)
    for (at, entry), key in zip(reading.entries("keys"), config.keys, strict=True):
        for name in key.models or ():
            if name not in names:
                meant = nearest(name, names)
                hint = f" (did you mean {meant!r}?)" if meant else ""
                entry.wrong(f"{at}.models", f"found {shown(name)}; allowed: {', '.join(names) or 'no model yet'}{hint}")


def models_by_name(config: Config) -> dict[str, str]:
    """Every name that clients may use -> the model that has it."""
    aliases = {alias: model.name for model in config.models.values() for alias in model.further_names}
    return {**{name: name for name in config.models}, **aliases}


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
    if not config.keys and not is_loopback(config.listen):
        found.append(f"listen = {shown(config.listen)}: anyone who reaches it may use the models; see keys")
    for model in config.models.values():
        found += _warnings_of_ranks(model)
    return tuple(found)


def _warnings_of_ranks(model: ModelConfig) -> list[str]:
    """Engines of several ranks that leave their devices lose what the ranks keep of each other there."""
    eviction = model.eviction
    leaves = isinstance(eviction, Auto) or eviction.process in LEAVING
    if not leaves or parallel_size(model.extra_args) == 1:
        return []
    given = {argument.partition("=")[0].replace("_", "-") for argument in model.extra_args}
    at = path_of(model.name, "extra_args")
    return [
        f"{at}: an engine of several ranks under {eviction} needs {flag}: {why}"
        for flag, why in NEEDED_BY_RANKS.items()
        if flag not in given
    ]


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address.lower() == "localhost"
