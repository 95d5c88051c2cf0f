"""LoRA modules: names for clients, which `vllm serve` is told by its own argument alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmuxd.config import ConfigError, parse_config
from llmuxd.config.loras import lora_names
from llmuxd.engine import build_argv, engine_spec
from llmuxd.specs import served_models


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], ()),
        (["--lora-modules", "sql=/loras/sql", "chat=org/chat", "--max-loras", "2"], ("sql", "chat")),
        (["--lora-modules=sql=/loras/sql"], ("sql",)),
        (["--lora_modules", "sql=/l"], ("sql",)),
        (["--lora-modules", '{"name": "sql", "path": "/l", "base_model_name": "b"}', "chat=/c"], ("sql", "chat")),
        (["--lora-modules", "sql=/l", "--lora-modules", "chat=/c", "sql=/again"], ("sql", "chat")),
        (["--lora-modules", "neither", "{broken", '{"path": "/l"}', '{"name": 1}', "[1]", "=x"], ()),
        (["--enable-lora", "sql=/no/flag/before/it"], ()),
    ],
)
def test_the_names_that_arguments_give_to_modules(arguments: list[str], names: tuple[str, ...]) -> None:
    assert lora_names(arguments) == names


def test_a_module_is_a_name_for_clients_whether_it_is_an_alias_or_not() -> None:
    arguments = ["--enable-lora", "--lora-modules", "sql=/loras/sql", "chat=/loras/chat"]
    config = parse_config({"models": {"base": {"model_path": "m", "aliases": ["b", "sql"], "extra_args": arguments}}})
    assert [one.id for one in served_models(config)] == ["base", "b", "sql", "chat"]
    argv = build_argv(engine_spec(config, config.models["base"]))
    at = argv.index("--served-model-name")
    assert argv[at + 1 : at + 4] == ["base", "b", "--uds"]
    assert argv[-4:] == arguments
    assert Path(argv[at + 4]).name.startswith("base")


def test_a_module_may_not_have_the_name_of_something_else() -> None:
    models = {
        "a": {"model_path": "m", "aliases": ["sql"]},
        "b": {"model_path": "m", "extra_args": ["--lora-modules", "sql=/l", "a=/l"]},
    }
    with pytest.raises(ConfigError) as caught:
        parse_config({"models": models})
    text = str(caught.value)
    assert 'models.b.extra_args: found "sql", which is an alias of a already' in text
    assert 'models.b.extra_args: found "a", which is the name of a model already' in text
