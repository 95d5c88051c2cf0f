"""The table of keys, the example, and the classes agree."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from llmuxd.config import (
    KEYS,
    CheckpointConfig,
    Config,
    ConfigError,
    KeyConfig,
    ModelConfig,
    ObjectStoreConfig,
    PolicyConfig,
    describe,
    load_config,
    parse_config,
)
from llmuxd.config.load import tomllib
from llmuxd.core.policies import Tenure

EXAMPLE = Path(__file__).parents[2] / "etc" / "llmux.toml"
CLASSES = {
    "": Config,
    "models.*": ModelConfig,
    "keys[]": KeyConfig,
    "policy": PolicyConfig,
    "checkpoint": CheckpointConfig,
    "checkpoint.object_store": ObjectStoreConfig,
}
UNITS = {
    "_secs": "seconds",
    "_ms": "milliseconds",
    "_bytes": "bytes",
    "max_queue": "requests",
    "max_in_flight": "requests",
    "max_parallel": "requests",
    "requests_per_minute": "requests",
    "max_connections": "connections",
}
by_path = pytest.mark.parametrize("key", KEYS, ids=lambda key: key.path)


def table_and_name(key):
    table, _, name = key.path.rpartition(".")
    return table, name


class TestKeys:
    def test_paths_are_unique(self):
        assert len({key.path for key in KEYS}) == len(KEYS)

    @by_path
    def test_each_is_documented(self, key):
        assert key.type
        assert key.allowed
        assert re.fullmatch(r"[^\n]+\.", key.meaning), "one sentence"

    @by_path
    def test_its_unit_is_that_of_its_name(self, key):
        assert key.unit == next((unit for end, unit in UNITS.items() if key.path.endswith(end)), "")

    @by_path
    def test_its_default_is_the_one_that_is_used(self, key):
        """Read back from the documentation, the default changes nothing."""
        table, name = table_and_name(key)
        config = parse_config({"models": {"a": {"model_path": "p"}}}, environ={})
        if key.required or key.path == "admin_port" or table == "checkpoint.object_store":
            assert key.default in ("", '"us-east-1"')
            return
        key_of_a_client = KeyConfig("n", "0" * 64)
        place = {
            "": config,
            "models.*": config.models["a"],
            "keys[]": key_of_a_client,
            "policy": config.policy,
            "checkpoint": config.checkpoint,
        }
        used = getattr(place[table], name)
        if key.default == "":
            assert used is None
        elif any(key.default == other.path for other in KEYS):
            other_table, _, other_name = key.default.rpartition(".")
            assert used == getattr(place[other_table], other_name)
        else:
            assert used == key.kind.read(tomllib.loads(f"x = {key.default}")["x"])

    def test_what_is_said_of_tenure_is_what_it_does(self):
        said = f"{Tenure().overdue_costs:g} times the cost of a switch"
        (key,) = (key for key in KEYS if key.path == "policy.max_wait_secs")
        assert said in key.meaning
        assert said in EXAMPLE.read_text()

    def test_every_field_has_a_key(self):
        tables = {"models", "keys", "policy", "checkpoint"}
        not_keys = {
            "": {"runtime_dir", "state_dir", "warnings", *tables},
            "models.*": {"name"},
            "checkpoint": {"object_store"},
        }
        for table, kind in CLASSES.items():
            keys = {name for at, name in map(table_and_name, KEYS) if at == table}
            assert keys - {"admin_port"} == {field.name for field in fields(kind)} - not_keys.get(table, set())


def table_of(header):
    """The table of keys that a header of the example begins, without its brackets."""
    return {"models.qwen": "models.*", "[keys]": "keys[]"}.get(header, header)


def uncommented(line):
    """A line of the example in force, if it is a key's or a table's."""
    return re.sub(r"^#(\w+ = |\[)", r"\1", line)


class TestExample:
    def test_it_is_valid_and_has_no_models(self):
        config = load_config(EXAMPLE, {})
        assert (config.models, config.warnings) == ({}, ())
        assert config == parse_config({}, environ={})

    @by_path
    def test_it_has_every_key(self, key):
        table, name = table_and_name(key)
        at = ""
        for line in map(uncommented, EXAMPLE.read_text().splitlines()):
            header = re.fullmatch(r"\[(.+)\]", line)
            at = table_of(header[1]) if header else at
            if at == table and re.match(rf"{name} = |# {name} is accepted", line):
                return
        pytest.fail(f"{key.path} is not in {EXAMPLE.name}")

    def test_with_every_line_in_force_only_the_model_the_key_and_the_store_are_new(self, tmp_path):
        file = tmp_path / "llmux.toml"
        file.write_text("\n".join(map(uncommented, EXAMPLE.read_text().splitlines())))
        config = load_config(file, {})
        full, default = describe(config), describe(load_config(EXAMPLE, {}))
        (model,) = full.pop("models").values()
        assert None not in model.values(), "every key of a model is set"
        assert default.pop("models") == {}
        (client,) = full.pop("keys")
        assert None not in client.values(), "every key of a client's key is set"
        assert client["models"] == ["qwen"]
        assert default.pop("keys") == []
        assert full["checkpoint"].pop("object_store")["bucket"] == "checkpoints"
        assert default["checkpoint"].pop("object_store") is None
        assert full.pop("warnings") == []
        assert default.pop("warnings") == []
        assert full == default

    def test_a_line_without_its_table_is_not_taken_for_another_key(self, tmp_path):
        """Whoever takes out the `#` of a key and forgets that of its table is told so."""
        file = tmp_path / "llmux.toml"
        lines = EXAMPLE.read_text().splitlines()
        table = ""
        tried = 0
        for number, line in enumerate(lines):
            if line.startswith("#["):
                table = line[2:-1].replace("models.qwen", "models.NAME")
            elif table and uncommented(line) != line:
                file.write_text("\n".join([*lines[:number], uncommented(line), *lines[number + 1 :]]))
                with pytest.raises(ConfigError, match=rf"unknown key; it belongs .*\[{re.escape(table)}\]"):
                    load_config(file, {})
                tried += 1
        assert tried == sum(key.path.startswith(("models.", "keys[]", "checkpoint.object_store.")) for key in KEYS)

    def test_a_line_of_a_table_that_is_there_is_valid_by_itself(self, tmp_path):
        file = tmp_path / "llmux.toml"
        lines = EXAMPLE.read_text().splitlines()
        first_table = next(number for number, line in enumerate(lines) if line.startswith("#["))
        numbers = [number for number in range(first_table) if uncommented(lines[number]) != lines[number]]
        for number in numbers:
            file.write_text("\n".join([*lines[:number], uncommented(lines[number]), *lines[number + 1 :]]))
            assert load_config(file, {}) == load_config(EXAMPLE, {})
        assert len(numbers) > 20
