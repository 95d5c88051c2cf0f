"""Reading a configuration from files or from a mapping.

All problems are found in one go. A value by itself is checked in `reading`, several together in `checks`.
"""

from __future__ import annotations

import codecs
import json
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmuxd import protocol
from llmuxd.config import checks
from llmuxd.config.errors import ConfigError, Problem, quoted, shown
from llmuxd.config.reading import Reading
from llmuxd.config.types import (
    COOLDOWN_OF_0_7_SECS,
    POLICIES_OF_0_7,
    CheckpointConfig,
    Config,
    KeyConfig,
    ModelConfig,
    ObjectStoreConfig,
    PolicyConfig,
)
from llmuxd.policies import find_policies

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DROP_IN_FOLDER = "conf.d"


def load_config(
    path: str | Path,
    environ: Mapping[str, str] | None = None,
    *,
    known_policies: Collection[str] | None = None,
) -> Config:
    """Read a file and the `conf.d/*.toml` beside it, in the order of their names. Raises ConfigError.

    A name that ends in .json is the JSON of llmux 0.7, anything else TOML. `environ` is the process's environment
    if it is not given; the folders are taken from it.
    """
    path = Path(path)
    reading = Reading()
    unread: list[Problem] = []
    for source in [path, *_drop_ins(path.parent / DROP_IN_FOLDER, unread)]:
        data = _read_file(source, unread)
        if data is not None:
            reading.merge(data, str(source))
    if unread:
        # What the others seem to lack may well be in a file that could not be read.
        raise ConfigError([*unread, *reading.problems])
    return _build(reading, environ, known_policies)


def parse_config(
    data: Mapping[str, Any],
    source: str = "config",
    environ: Mapping[str, str] | None = None,
    *,
    known_policies: Collection[str] | None = None,
) -> Config:
    """Check a configuration that is already a mapping; `source` names it in errors. Raises ConfigError."""
    reading = Reading()
    reading.merge(data, source)
    return _build(reading, environ, known_policies)


def _drop_ins(folder: Path, unread: list[Problem]) -> list[Path]:
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        unread.append(Problem(str(folder), "", f"cannot be read: {error.strerror}"))
        return []
    # Hidden ones are editors' locks and half-written copies.
    return [folder / name for name in names if name.endswith(".toml") and not name.startswith(".")]


def _read_file(path: Path, unread: list[Problem]) -> Mapping[str, Any] | None:
    try:
        raw = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        text = raw.decode()
        data = _json(text) if path.suffix.lower() == ".json" else _toml(text)
    except OSError as error:
        wrong = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        line_ends = raw.count(b"\n", 0, error.start)
        wrong = f"is not UTF-8 (line {line_ends + 1})"
    except ValueError as error:
        wrong = str(error)
    except RecursionError:
        wrong = "is nested too deeply"
    else:
        if isinstance(data, dict):
            return data
        wrong = f"found {shown(data)}; allowed: an object"
    unread.append(Problem(str(path), "", wrong))
    return None


def _toml(text: str) -> Any:
    try:
        return tomllib.loads(text)
    except ValueError as error:
        # No line of TOML begins like this.
        hint = "; if it is JSON, let its name end in .json" if text.lstrip().startswith("{") else ""
        lines = text.split("\n")
        end = f"at the end, line {len(lines)}, column {len(lines[-1]) + 1}"
        said = str(error).replace("at end of document", end)
        raise ValueError(f"is not TOML: {said}{hint}") from error


def _json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}{'; if it is TOML, name it .toml' if _is_toml(text) else ''}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, of which Python would take the last of two values without a word."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {shown(name)} is there twice in one object")
        found[name] = value
    return found


def _is_toml(text: str) -> bool:
    try:
        tomllib.loads(text)
    except ValueError:
        return False
    return True


def _build(reading: Reading, environ: Mapping[str, str] | None, known_policies: Collection[str] | None) -> Config:
    """The configuration, or all problems."""
    environ = os.environ if environ is None else environ
    reading.require()
    policy = PolicyConfig(**reading.section("policy", PolicyConfig))
    if policy.policy_type in POLICIES_OF_0_7 and not reading.given("policy.min_active_secs"):
        policy = replace(policy, min_active_secs=COOLDOWN_OF_0_7_SECS)
    top = reading.section("", Config)
    runtime_dir = Path(environ.get(protocol.RUNTIME_DIR_ENV) or protocol.DEFAULT_RUNTIME_DIR).absolute()
    state_dir = Path(environ.get(protocol.STATE_DIR_ENV) or protocol.DEFAULT_STATE_DIR).absolute()
    inherited = {"eviction": policy.eviction}
    if "start_timeout_secs" in top:
        inherited["start_timeout_secs"] = top["start_timeout_secs"]
    models = {}
    for name in reading.models:
        # A model without a path is a problem that `require` has found; the checks still want to see the rest of it.
        values = {"model_path": "", **inherited, **reading.section(f"models.{quoted(name)}", ModelConfig)}
        models[name] = ModelConfig(name, **values)
    top.setdefault("control_socket", runtime_dir / protocol.CONTROL_SOCKET_NAME)
    # As with models: what is missing has been found, and the rest is still checked.
    keys = tuple(
        KeyConfig(**{"name": "", "sha256": "", **entry.section(at, KeyConfig)}) for at, entry in reading.entries("keys")
    )
    config = Config(runtime_dir=runtime_dir, state_dir=state_dir, models=models, keys=keys, policy=policy, **top)
    checks.check(config, reading, find_policies() if known_policies is None else dict.fromkeys(known_policies))
    if reading.problems:
        raise ConfigError(reading.problems)
    said = checks.warnings(config, reading)
    return replace(config, keys=_with_models(config), checkpoint=_checkpoint(reading), warnings=said)


def _with_models(config: Config) -> tuple[KeyConfig, ...]:
    """The keys, with models where the files have aliases."""
    models = checks.models_by_name(config)
    return tuple(
        key if key.models is None else replace(key, models=tuple(dict.fromkeys(models[name] for name in key.models)))
        for key in config.keys
    )


def _checkpoint(reading: Reading) -> CheckpointConfig:
    store = reading.section("checkpoint.object_store", ObjectStoreConfig)
    values = reading.section("checkpoint", CheckpointConfig)
    if store:
        values["object_store"] = ObjectStoreConfig(**store)
    return CheckpointConfig(**values)
