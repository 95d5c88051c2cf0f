"""Reading a configuration: files, merging, and the checks that concern several keys.

Every problem is found in one go, and each says where it is, what was found and what is allowed.
"""

from __future__ import annotations

import ipaddress
import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from llmuxd import protocol
from llmuxd.config import schema
from llmuxd.config.schema import Key, Wrong, nearest
from llmuxd.config.types import CheckpointConfig, Config, ModelConfig, ObjectStoreConfig, PolicyConfig
from llmuxd.core.eviction import EvictionPolicy, ProcessStrategy

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KNOWN_POLICIES = ("fifo",)
POLICIES_OF_0_7 = ("cost_aware", "time_slice")

FOUND_LENGTH = 60
"""Characters of a wrong value that an error shows."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, and where."""

    file: str
    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}: {self.key}: {self.text}" if self.key else f"{self.file}: {self.text}"


class ConfigError(Exception):
    """The configuration is wrong; nothing was started. The text names every problem, a line each."""

    def __init__(self, problems: Collection[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, problems)))


def load_config(path: str | Path, environ: Mapping[str, str] | None = None) -> Config:
    """Read a file and the `conf.d/*.toml` beside it. Raises ConfigError.

    A name that ends in .json is the JSON of llmux 0.7, anything else TOML.
    """
    path = Path(path)
    reading = _Reading()
    sources = [path, *sorted((path.parent / "conf.d").glob("*.toml"))]
    for source in sources:
        reading.merge(_read_file(source), str(source))
    return reading.build(os.environ if environ is None else environ)


def parse_config(data: Mapping[str, Any], source: str = "config", environ: Mapping[str, str] | None = None) -> Config:
    """Check a configuration that is already a mapping. Raises ConfigError."""
    reading = _Reading()
    reading.merge(data, source)
    return reading.build(os.environ if environ is None else environ)


def _read_file(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ConfigError([Problem(str(path), "", f"cannot be read: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([Problem(str(path), "", f"is not UTF-8 (byte {error.start})")]) from error
    try:
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        hint = ""
        if path.suffix != ".json" and text.lstrip().startswith("{"):
            hint = "; if it is llmux 0.7's JSON, let its name end in .json"
        language = "JSON" if path.suffix == ".json" else "TOML"
        raise ConfigError([Problem(str(path), "", f"is not {language}: {error}{hint}")]) from error
    if not isinstance(data, dict):
        raise ConfigError([Problem(str(path), "", f"found {_found(data)}; allowed: an object")])
    return data


def _found(value: Any) -> str:
    """A wrong value, for an error: as it might be written, and not too long."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= FOUND_LENGTH else text[: FOUND_LENGTH - 4] + " ..."


class _Reading:
    """One reading of a configuration: the values found, where each came from, and the problems."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.models: dict[str, None] = {}
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self._tables = schema.tables()

    # Values

    def merge(self, data: Mapping[str, Any], source: str) -> None:
        """Take in one file."""
        self._table(data, "", "", source)

    def _table(self, data: Mapping[str, Any], path: str, pattern: str, source: str) -> None:
        keys = self._tables.get(pattern, {})
        inner = {
            table[len(pattern) :].lstrip(".").split(".")[0]
            for table in self._tables
            if table != pattern and (not pattern or table.startswith(pattern + "."))
        }
        for name, value in data.items():
            at = f"{path}.{_quoted(name)}" if path else _quoted(name)
            if pattern == "models":
                self._model(name, value, at, source)
            elif name in inner:
                below = f"{pattern}.{name}" if pattern else name
                if value is None:
                    continue
                if isinstance(value, dict):
                    self._table(value, at, below, source)
                    self._require(below, at, source)
                else:
                    self._wrong(source, at, f"found {_found(value)}; allowed: a table")
            elif name in keys:
                self._value(keys[name], value, at, source)
            else:
                self._unknown(name, pattern, at, source, {*keys, *inner})

    def _model(self, name: str, value: Any, at: str, source: str) -> None:
        if not name or any(not char.isprintable() for char in name):
            self._wrong(source, at, "a model's name has to be printable and not empty")
            return
        if not isinstance(value, dict):
            self._wrong(source, at, f"found {_found(value)}; allowed: a table with model_path")
            return
        self.models[name] = None
        self._table(value, at, "models.*", source)
        self._require("models.*", at, source)

    def _require(self, pattern: str, at: str, source: str) -> None:
        for name, key in self._tables.get(pattern, {}).items():
            given = f"{at}.{name}"
            if key.required and given not in self.sources:
                self._wrong(source, given, f"is missing; allowed: {key.allowed}")

    def _value(self, key: Key, value: Any, at: str, source: str) -> None:
        if value is None:
            # JSON's null, as llmux 0.7 writes what is not set.
            return
        if at in self.sources:
            self._wrong(source, at, f"is set in {self.sources[at]} already")
            return
        self.sources[at] = source
        try:
            self.values[at] = key.read(value)
        except Wrong:
            shown = '"***"' if key.path in schema.SECRET_KEYS else _found(value)
            self._wrong(source, at, f"found {shown}; allowed: {key.allowed}")

    def _unknown(self, name: str, pattern: str, at: str, source: str, known: set[str]) -> None:
        if f"{pattern}.{name}" in schema.NOT_YET:
            self._wrong(source, at, "is not supported yet")
            return
        meant = nearest(name, known)
        hint = f"did you mean {meant!r}?" if meant else f"allowed: {', '.join(sorted(known))}"
        self._wrong(source, at, f"unknown key; {hint}")

    def _wrong(self, source: str, key: str, text: str) -> None:
        self.problems.append(Problem(source, key, text))

    # The whole

    def build(self, environ: Mapping[str, str]) -> Config:
        """Check what concerns several keys; the configuration, or all problems."""
        policy = PolicyConfig(**self._section("policy", PolicyConfig))
        runtime_dir = Path(environ.get(protocol.RUNTIME_DIR_ENV) or protocol.DEFAULT_RUNTIME_DIR)
        top = self._section("", Config)
        top.setdefault("control_socket", runtime_dir / protocol.CONTROL_SOCKET_NAME)
        start_timeout = top.get("start_timeout_secs", 1800.0)
        models = {}
        for name in self.models:
            values = self._section(f"models.{_quoted(name)}", ModelConfig)
            values.setdefault("model_path", "")
            defaults = {"eviction": policy.eviction, "start_timeout_secs": start_timeout}
            models[name] = ModelConfig(name, **{**defaults, **values})
        self._check_names(models)
        self._check_ports(models, top)
        self._check_arguments(models)
        self._warn(models, policy, top)
        if self.problems:
            raise ConfigError(self.problems)
        return Config(
            runtime_dir=runtime_dir.absolute(),
            state_dir=Path(environ.get(protocol.STATE_DIR_ENV) or protocol.DEFAULT_STATE_DIR).absolute(),
            models=models,
            policy=policy,
            checkpoint=self._checkpoint(),
            warnings=tuple(self.warnings),
            **top,
        )

    def _section(self, path: str, kind: type) -> dict[str, Any]:
        """The values found of one table, by the field names of the class that holds them."""
        prefix = f"{path}." if path else ""
        names = [field.name for field in fields(kind)]
        return {name: self.values[prefix + name] for name in names if prefix + name in self.values}

    def _checkpoint(self) -> CheckpointConfig:
        store = self._section("checkpoint.object_store", ObjectStoreConfig)
        values = self._section("checkpoint", CheckpointConfig)
        return CheckpointConfig(**values, object_store=ObjectStoreConfig(**store) if store else None)

    def _check_names(self, models: Mapping[str, ModelConfig]) -> None:
        owners = dict.fromkeys(models, "")
        for model in models.values():
            at = f"models.{_quoted(model.name)}.aliases"
            for alias in model.aliases:
                if alias in owners:
                    what = f"an alias of {owners[alias]}" if owners[alias] else "the name of a model"
                    self._wrong(self.sources[at], at, f"found {_found(alias)}, which is {what} already")
                else:
                    owners[alias] = model.name

    def _check_ports(self, models: Mapping[str, ModelConfig], top: Mapping[str, Any]) -> None:
        taken = {top.get("port", 3000): "port", top.get("metrics_port", 9090): "metrics_port"}
        if top.get("port", 3000) == top.get("metrics_port", 9090) != 0:
            at = "metrics_port" if "metrics_port" in self.sources else "port"
            self._wrong(self.sources[at], at, f"found {top.get('port', 3000)}, which is the other one's port, too")
        for model in models.values():
            at = f"models.{_quoted(model.name)}.port"
            if model.port is not None and model.port in taken:
                self._wrong(self.sources[at], at, f"found {model.port}, which {taken[model.port]} has already")
            elif model.port is not None:
                taken[model.port] = at

    def _check_arguments(self, models: Mapping[str, ModelConfig]) -> None:
        for model in models.values():
            at = f"models.{_quoted(model.name)}.extra_args"
            for argument in model.extra_args:
                flag = argument.partition("=")[0].replace("_", "-")
                if flag in schema.OWN_ARGUMENTS:
                    self._wrong(self.sources[at], at, f"found {_found(argument)}, which llmuxd decides: {_WHY[flag]}")

    def _warn(self, models: Mapping[str, ModelConfig], policy: PolicyConfig, top: Mapping[str, Any]) -> None:
        if "admin_port" in self.sources:
            self.warnings.append("admin_port is not used: control is a Unix socket, see control_socket")
        if not _is_loopback(top.get("listen", "127.0.0.1")):
            self.warnings.append(f"listen = {top['listen']!r}: anyone who reaches this address may use the models")
        if policy.policy_type in POLICIES_OF_0_7:
            self.warnings.append(f"policy.policy_type {policy.policy_type!r} is not there yet: fifo is used")
        elif policy.policy_type not in KNOWN_POLICIES:
            at = "policy.policy_type"
            meant = nearest(policy.policy_type, (*KNOWN_POLICIES, *POLICIES_OF_0_7))
            hint = f" (did you mean {meant!r}?)" if meant else ""
            allowed = ", ".join((*KNOWN_POLICIES, *POLICIES_OF_0_7))
            self._wrong(self.sources[at], at, f"found {_found(policy.policy_type)}{hint}; allowed: {allowed}")
        for model in models.values():
            if model.eviction.process in (ProcessStrategy.CUDA_SUSPEND, ProcessStrategy.CHECKPOINT):
                text = f"{model.name}: {model.eviction} is carried out as a stop: it is not supported yet"
                self.warnings.append(text)


_WHY = {
    "--host": "engines listen on a Unix socket, or on 127.0.0.1 with models.NAME.port",
    "--port": "use models.NAME.port",
    "--uds": "each engine gets a socket of its own",
    "--served-model-name": "use the model's name and models.NAME.aliases",
    "--enable-sleep-mode": "it is added where the platform has it",
    "--api-key": "engines are reached through llmuxd only, which would be locked out",
}


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _quoted(name: str) -> str:
    """A name as a part of a key path, as TOML writes it."""
    bare = name and all(char.isascii() and (char.isalnum() or char in "-_") for char in name)
    return name if bare else json.dumps(name, ensure_ascii=False)


def describe(config: Config) -> dict[str, Any]:
    """The configuration as JSON, with nothing left out but the secrets."""
    shown = _plain(config)
    assert isinstance(shown, dict)
    store = shown["checkpoint"]["object_store"]
    for path in schema.SECRET_KEYS:
        if store is not None:
            store[path.rpartition(".")[2]] = "***"
    return shown


def _plain(value: Any) -> Any:
    if isinstance(value, EvictionPolicy):
        return str(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return dict(_members(value))
    return value


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    for field in fields(value):
        yield field.name, _plain(getattr(value, field.name))
