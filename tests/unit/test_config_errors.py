"""What is said of values and combinations that are not allowed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmuxd.config import KEYS, Config, ConfigError, describe, parse_config
from llmuxd.engine import engine_spec

A = {"model_path": "org/a"}
SECONDS_ABOVE_0 = "allowed: a number of seconds above 0"
STORE = {"endpoint": "e", "bucket": "b", "access_key": "a", "secret_key": "s"}


def problems(data, **others):
    """All that is said of a configuration, without the file's name in front."""
    with pytest.raises(ConfigError) as caught:
        parse_config(data, "F", {}, **others)
    said = [str(problem) for problem in caught.value.problems]
    assert str(caught.value) == "\n".join(said)
    assert all(text.startswith("F: ") and "\n" not in text for text in said)
    return [text.removeprefix("F: ") for text in said]


def model(**values):
    return {"models": {"a": {**A, **values}}}


def policy(**values):
    return {"policy": values}


def keys(*entries, **values):
    """Two keys of clients: a good one, and one with these values, or the given one as it is."""
    second = entries or ({"name": "bob", "sha256": "b" * 64, **values},)
    models = {"mistral": {"model_path": "p", "aliases": ["big"]}}
    return {"models": models, "keys": [{"name": "alice", "sha256": "a" * 64}, *second]}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        # Unknown keys
        ({"prot": 1}, "prot: unknown key; did you mean 'port'?"),
        ({"Warmup": True}, "Warmup: unknown key; did you mean 'warmup'?"),
        ({"model": {}}, "model: unknown key; did you mean 'models'?"),
        ({"zzz": 1}, "zzz: unknown key; allowed: access_log, admin_port, body_timeout_secs, checkpoint, "),
        ({"zzz": None}, "zzz: unknown key; allowed: access_log, "),
        ({"a key": 1}, '"a key": unknown key; '),
        ({"warnings": []}, "warnings: unknown key; "),
        ({"runtime_dir": "/r"}, "runtime_dir: unknown key; "),
        (policy(evict="x"), "policy.evict: unknown key; did you mean 'eviction'?"),
        (model(modelpath=1), "models.a.modelpath: unknown key; did you mean 'model_path'?"),
        (model(zzz="b"), "models.a.zzz: unknown key; allowed: aliases, "),
        (model(name="b"), "models.a.name: unknown key; it belongs into [[keys]]"),
        ({"checkpoint": {"criu": "x"}}, "checkpoint.criu: unknown key; did you mean 'criu_path'?"),
        ({"checkpoint": {"object_store": {**STORE, "buckets": 1}}}, "checkpoint.object_store.buckets: unknown key; did you mean 'bucket'?"),
        # Under the wrong header
        (policy(listen="::1"), "policy.listen: unknown key; it belongs to the top, before the first [table]"),
        ({"min_active_secs": 1}, "min_active_secs: unknown key; it belongs into [policy]"),
        ({"eviction": "x"}, "eviction: unknown key; it belongs into [models.NAME] or into [policy]"),
        ({"requests_per_minute": 1}, "requests_per_minute: unknown key; it belongs into [[keys]]"),
        # Keys of clients
        ({"key": []}, "key: unknown key; did you mean 'keys'?"),
        ({"keys": {"name": "x"}}, "keys: found a single table; allowed: an array of tables, [[keys]] above each"),
        ({"keys": "llmux-hush"}, "keys: found a value of the type str; allowed: an array of tables, "),
        ({"keys": ["llmux-hush"]}, "keys[0]: found a value of the type str; allowed: a table"),
        (keys({"name": "b"}), "keys[1].sha256: is missing; allowed: the SHA-256 of a key, 64 hexadecimal digits"),
        (keys({"sha256": "b" * 64}), "keys[1].name: is missing; allowed: a printable name without spaces"),
        (keys(name=""), 'keys[1].name: found ""; allowed: a printable name without spaces that does not begin with'),
        (keys(name="a b"), 'keys[1].name: found "a b"; '),
        (keys(name="a\n"), 'keys[1].name: found "a\\n"; '),
        (keys(name="a\u2003b"), 'keys[1].name: found "a\\u2003b"; '),
        (keys(name="-"), 'keys[1].name: found "-"; '),
        (keys(name=1), "keys[1].name: found 1; "),
        (keys(name="alice"), 'keys[1].name: found "alice", which keys[0] has already'),
        (keys(sha256="A" * 64), 'keys[1].sha256: found "***", which keys[0] has already'),
        (keys(sha256="llmux-hush"), "keys[1].sha256: found a string of 10 characters; allowed: the SHA-256 of a key"),
        (keys(sha256="g" * 64), "keys[1].sha256: found a string of 64 characters; "),
        (keys(sha256="b" * 63), "keys[1].sha256: found a string of 63 characters; "),
        (keys(sha256=7), "keys[1].sha256: found a value of the type int; "),
        (keys(models=[]), "keys[1].models: found []; allowed: a list of names or aliases of models, at least one"),
        (keys(models="a"), 'keys[1].models: found "a"; '),
        (keys(models=["mistal"]), 'keys[1].models: found "mistal"; allowed: mistral, big (did you mean \'mistral\'?)'),
        (keys(model=["a"]), "keys[1].model: unknown key; did you mean 'models'?"),
        (keys(requests_per_minut=1), "keys[1].requests_per_minut: unknown key; did you mean 'requests_per_minute'?"),
        (keys(max_queue=1), "keys[1].max_queue: unknown key; it belongs to the top, before the first [table] or into [models.NAME]"),
        (keys(requests_per_minute=0), "keys[1].requests_per_minute: found 0; allowed: a whole number, 1 or more"),
        (keys(max_parallel=0.5), "keys[1].max_parallel: found 0.5; allowed: a whole number, 1 or more"),
        (keys(priority=101), "keys[1].priority: found 101; allowed: a whole number, -100 to 100"),
        (keys(priority=True), "keys[1].priority: found true; "),
        # Limits, and browsers
        ({"max_connections": 0}, "max_connections: found 0; allowed: a whole number, 1 or more"),
        ({"max_head_bytes": "64k"}, 'max_head_bytes: found "64k"; allowed: a whole number of bytes, 1 or more'),
        ({"head_timeout_secs": 0}, f"head_timeout_secs: found 0; {SECONDS_ABOVE_0}"),
        ({"body_timeout_secs": -1}, f"body_timeout_secs: found -1; {SECONDS_ABOVE_0}"),
        ({"send_timeout_secs": True}, f"send_timeout_secs: found true; {SECONDS_ABOVE_0}"),
        ({"access_log": 1}, "access_log: found 1; allowed: true or false"),
        ({"cors_origins": "*"}, 'cors_origins: found "*"; allowed: a list of origins, each SCHEME://HOST or SCHEME://HOST:PORT, or "*" for all'),
        ({"cors_origins": ["a.b"]}, 'cors_origins: found ["a.b"]; '),
        ({"cors_origins": ["https://a.b/"]}, 'cors_origins: found ["https://a.b/"]; '),
        ({"cors_origins": ["https://a.b:0"]}, 'cors_origins: found ["https://a.b:0"]; '),
        ({"cors_origins": ["https://a.b:65536"]}, 'cors_origins: found ["https://a.b:65536"]; '),
        ({"cors_origins": ["https://*.b"]}, 'cors_origins: found ["https://*.b"]; '),
        ({"cors_origins": ["https://ä.b"]}, 'cors_origins: found ["https://ä.b"]; '),
        ({"cors_origins": ["null"]}, 'cors_origins: found ["null"]; '),
        # Not supported yet
        (model(gpus=[0]), "models.a.gpus: is not supported yet"),
        (model(memory="8GiB"), "models.a.memory: is not supported yet"),
        (model(priority=0), "models.a.priority: found 0; allowed: a number above 0"),
        # Numbers
        ({"port": "3000"}, 'port: found "3000"; allowed: a port, 0 to 65535'),
        ({"port": True}, "port: found true; allowed: a port, 0 to 65535"),
        ({"port": 3000.0}, "port: found 3000.0; allowed: a port, 0 to 65535"),
        ({"port": 65536}, "port: found 65536; allowed: a port, 0 to 65535"),
        ({"port": -1}, "port: found -1; allowed: a port, 0 to 65535"),
        ({"metrics_port": []}, "metrics_port: found []; allowed: a port, 0 to 65535"),
        ({"admin_port": "x"}, 'admin_port: found "x"; allowed: a port, 0 to 65535'),
        (model(port=0), "models.a.port: found 0; allowed: a port, 1 to 65535"),
        ({"max_queue": 0}, "max_queue: found 0; allowed: a whole number, 1 or more"),
        ({"max_body_bytes": 0}, "max_body_bytes: found 0; allowed: a whole number of bytes, 1 or more"),
        (model(max_in_flight=0), "models.a.max_in_flight: found 0; allowed: a whole number, 1 or more"),
        (model(ttl_secs=0), f"models.a.ttl_secs: found 0; {SECONDS_ABOVE_0}"),
        ({"start_timeout_secs": 0}, f"start_timeout_secs: found 0; {SECONDS_ABOVE_0}"),
        ({"sleep_timeout_secs": "5s"}, f'sleep_timeout_secs: found "5s"; {SECONDS_ABOVE_0}'),
        (policy(min_active_secs=-1), "policy.min_active_secs: found -1; allowed: a number of seconds, 0 or more"),
        (policy(min_active_secs=-0.5), "policy.min_active_secs: found -0.5; "),
        (policy(min_active_secs=float("nan")), "policy.min_active_secs: found NaN; "),
        (policy(max_wait_secs=float("inf")), "policy.max_wait_secs: found Infinity; "),
        (policy(max_wait_secs=True), "policy.max_wait_secs: found true; "),
        (policy(max_wait_secs=10**400), "policy.max_wait_secs: found 1000"),
        (policy(max_wait_secs=10**5000), "policy.max_wait_secs: found int too large to show; "),
        (policy(amortization_factor=-1), "policy.amortization_factor: found -1; allowed: a number, 0 or more"),
        (policy(coalesce_window_ms=0.5), "policy.coalesce_window_ms: found 0.5; allowed: a whole number of milliseconds, 0 or more"),
        (policy(tick_interval_ms=0), "policy.tick_interval_ms: found 0; allowed: a whole number of milliseconds, 1 or more"),
        # Booleans, strings, lists, tables
        ({"warmup": 1}, "warmup: found 1; allowed: true or false"),
        ({"warmup": "true"}, 'warmup: found "true"; allowed: true or false'),
        ({"listen": ""}, 'listen: found ""; allowed: an IP address or a host name, without a port'),
        ({"listen": "0.0.0.0:3000"}, 'listen: found "0.0.0.0:3000"; '),
        ({"listen": ["y" * 99]}, 'listen: found ["' + "y" * 54 + " ...; allowed"),
        ({"control_socket": "x.sock"}, 'control_socket: found "x.sock"; allowed: an absolute path'),
        ({"control_socket": "/" + "x" * 107}, 'control_socket: found "/xxxxx'),
        ({"vllm_command": []}, "vllm_command: found []; allowed: a program, or a list of a program and its first arguments"),
        ({"vllm_command": ""}, 'vllm_command: found ""; '),
        ({"vllm_command": ["a", 1]}, 'vllm_command: found ["a", 1]; '),
        ({"policy": []}, "policy: found []; allowed: a table"),
        ({"models": 3}, "models: found 3; allowed: a table"),
        ({"models": {"a": "p"}}, 'models.a: found "p"; allowed: a table'),
        ({"models": {"a": None}}, "models.a: found null; allowed: a table"),
        ({"checkpoint": "criu"}, 'checkpoint: found "criu"; allowed: a table'),
        (model(model_path="a\0b"), 'models.a.model_path: found "a\\u0000b"; '),
        (model(model_path="\ud800"), 'models.a.model_path: found "\\ud800"; '),
        (model(model_path="--help"), 'models.a.model_path: found "--help"; allowed: a string that is not empty and does not begin'),
        (model(extra_args="--x"), 'models.a.extra_args: found "--x"; allowed: a list of strings that are not empty'),
        (model(extra_args=["--seed", 1]), 'models.a.extra_args: found ["--seed", 1]; '),
        (model(env={"A=B": "1"}), 'models.a.env: found the name "A=B"; allowed: a table of strings'),
        (model(env={"": "1"}), 'models.a.env: found the name ""; '),
        (model(env={"A": "\0"}), "models.a.env: found \"A\" with a value that no variable can hold; "),
        (model(env={"A\x1f": 1}), 'models.a.env: found "A\\u001f" with a value of the type int; '),
        (model(env=3), "models.a.env: found a value of the type int; "),
        # What has to be there
        ({"models": {"a": {}}}, "models.a.model_path: is missing; allowed: a string that is not empty"),
        ({"models": {"a": {"model_path": None}}}, "models.a.model_path: is missing; "),
        # Names
        ({"models": {"": A}}, 'models."": found "" for a model\'s name; allowed: a printable name'),
        ({"models": {"a\n": A}}, 'models."a\\n": found "a\\n" for a model\'s name; '),
        ({"models": {"a\x9b": A}}, 'models."a\\x9b": found '),
        ({"models": {"-a": A}}, "models.-a: found \"-a\" for a model's name; "),
        (model(aliases=["--help"]), 'models.a.aliases: found ["--help"]; allowed: a list of printable names'),
        (model(aliases=[""]), 'models.a.aliases: found [""]; '),
        (model(aliases=["a"]), 'models.a.aliases: found "a", which is the name of a model already'),
        (model(aliases=["b", "b"]), 'models.a.aliases: found "b", which is an alias of a already'),
        # Ports that are taken
        (model(port=3000), "models.a.port: found 3000, which port has already"),
        (model(port=9090), "models.a.port: found 9090, which metrics_port has already"),
        ({"port": 5, "metrics_port": 5}, "metrics_port: found 5, which port has already"),
        ({"port": 9090}, "port: found 9090, which metrics_port has already"),
        ({"metrics_port": 3000}, "metrics_port: found 3000, which port has already"),
        # Evictions and policies
        (policy(eviction="offload"), 'policy.eviction: found "offload"; allowed: "auto", "WEIGHTS+PROCESS" or a table of weights and process, weights one of retain, offload, discard, process one of keep_running, cuda_suspend, checkpoint, stop'),
        (policy(eviction="stop+offload"), 'policy.eviction: found "stop+offload"; '),
        (policy(eviction=1), "policy.eviction: found 1; "),
        (policy(eviction={"weights": "offload"}), 'policy.eviction: found {"weights": "offload"}; '),
        (policy(eviction={"weights": "melt", "process": "stop"}), "policy.eviction: found {"),
        (policy(eviction={"weights": [], "process": "stop"}), "policy.eviction: found {"),
        (policy(eviction={"weights": "offload", "process": "stop", "level": 1}), "policy.eviction: found {"),
        (policy(policy_type="fifi"), "policy.policy_type: found \"fifi\"; allowed: fifo, cost_aware, time_slice, tenure (did you mean 'fifo'?)"),
        (policy(policy_type=1), "policy.policy_type: found 1; allowed: a string"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(data, said):
    (problem,) = problems(data)
    assert problem.startswith(said)


@pytest.mark.parametrize("argument", ["--port", "--uds", "--host", "--served-model-name", "--root-path", "--api-key"])
@pytest.mark.parametrize(
    "spell", [str, lambda flag: f"{flag}=hush", lambda flag: flag[:2] + flag[2:].replace("-", "_")]
)
def test_arguments_that_are_ours_are_refused_with_the_reason(argument, spell):
    written = spell(argument)
    (problem,) = problems(model(extra_args=["--seed", "1", written]))
    flag = written.partition("=")[0]
    start, _, why = problem.partition(f'models.a.extra_args: found "{flag}", which llmuxd decides: ')
    assert start == ""
    assert len(why) > 10
    assert "hush" not in problem


@pytest.mark.parametrize(
    "argument", ["--port-range", "--enable-sleep-mode", "--no-enable-sleep-mode", "--hostile=1", "port", "--model=x"]
)
def test_other_arguments_are_not(argument):
    assert parse_config(model(extra_args=[argument]), environ={}).models["a"].extra_args == (argument,)


def test_names_are_unique_over_models_and_aliases():
    models = {"a": {**A, "aliases": ["b"]}, "b": {**A, "aliases": ["c"]}, "d": {**A, "aliases": ["c"]}}
    assert problems({"models": models}) == [
        'models.a.aliases: found "b", which is the name of a model already',
        'models.d.aliases: found "c", which is an alias of b already',
    ]


def test_ports_of_engines_differ():
    models = {"a": {**A, "port": 8001}, "b": {**A, "port": 8001}}
    assert problems({"models": models}) == ["models.b.port: found 8001, which models.a.port has already"]


def test_a_default_that_does_not_count_collides_with_nothing():
    """The port that was meant is not known, so 3000 may be right for the engine."""
    said = problems({"port": "x", "models": {"a": {**A, "port": 3000}}})
    assert said == ['port: found "x"; allowed: a port, 0 to 65535']


def test_an_object_store_needs_all_of_its_keys():
    at = "checkpoint.object_store"
    assert problems({"checkpoint": {"object_store": {"bucket": "b"}}}) == [
        f"{at}.endpoint: is missing; allowed: a string that is not empty",
        f"{at}.access_key: is missing; allowed: a string that is not empty, or {at}.access_key_file",
        f"{at}.secret_key: is missing; allowed: a string that is not empty, or {at}.secret_key_file",
    ]
    file = {"endpoint": "e", "bucket": "b", "access_key_file": "a", "secret_key": "s"}
    assert parse_config({"checkpoint": {"object_store": file}}, environ={}).checkpoint.object_store is not None


def test_every_problem_is_found_at_once():
    data = {
        "port": "x",
        "prot": 1,
        "metrics_port": 7,
        "policy": {"policy_type": "lifo", "eviction": "x"},
        "models": {"a": {"port": 7, "aliases": ["b"], "extra_args": ["--uds=x"]}, "b": {"model_path": ""}},
    }
    assert [said.partition(": ")[0] for said in problems(data)] == [
        "port",
        "prot",
        "policy.eviction",
        "models.b.model_path",
        "models.a.model_path",
        "models.a.aliases",
        "models.a.port",
        "policy.policy_type",
        "models.a.extra_args",
    ]


def test_secrets_are_not_in_errors():
    data = {
        "checkpoint": {"object_store": {**STORE, "secret_key": ["hush"], "access_key": {"k": "hush"}}},
        "keys": [{"name": "a", "sha256": "hush"}, {"name": "b", "sha256": ["hush"]}, "hush"],
        "models": {
            "a": {**A, "env": {"HF_TOKEN": "hush", "N": 1}, "extra_args": ["--api-key=hush"]},
            "b": {**A, "env": {"HF_TOKEN": "hush", "": "x"}},
            "c": {**A, "env": "HF_TOKEN=hush"},
        },
    }
    said = problems(data)
    assert len(said) == 9
    assert not any("hush" in problem for problem in said)


class TestSocketPaths:
    """A path that is too long is found here, not when the first socket is bound."""

    def test_the_control_socket(self):
        assert parse_config({"control_socket": "/" + "x" * 106}, environ={})
        (said,) = problems({"control_socket": "/" + "ä" * 54})
        assert said.endswith("allowed: a path of at most 107 bytes")

    def test_the_runtime_folder_holds_engines_sockets(self):
        fits, too_long = ({"LLMUX_RUNTIME_DIR": "/" + "x" * size} for size in (84, 85))
        data = {"models": {"m" * 99: A}}
        config = parse_config(data, environ=fits)
        assert engine_spec(config, next(iter(config.models.values()))).endpoint.uds is not None
        with pytest.raises(ConfigError, match=r"^the environment: LLMUX_RUNTIME_DIR: found .* at most 85 bytes"):
            parse_config(data, environ=too_long)

    def test_engines_with_ports_need_less_room(self):
        config = parse_config(model(port=8001), environ={"LLMUX_RUNTIME_DIR": "/" + "x" * 93})
        assert engine_spec(config, config.models["a"]).endpoint.port == 8001
        with pytest.raises(ConfigError, match=r"^the environment: LLMUX_RUNTIME_DIR: found .* at most 107 bytes"):
            parse_config(model(port=8001), environ={"LLMUX_RUNTIME_DIR": "/" + "x" * 94})


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just(10**400)
ANYTHING = st.recursive(LEAVES, lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=4), some, max_size=3), max_leaves=6)  # fmt: skip
PATHS = st.sampled_from(sorted({key.path for key in KEYS} | {"models", "models.*", "keys", "keys[]", "policy", "checkpoint", "checkpoint.object_store"}))  # fmt: skip


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.dictionaries(PATHS, ANYTHING, max_size=4))
def test_whatever_a_file_holds_the_answer_is_a_configuration_or_problems(values):
    data: dict = {"models": {"a": dict(A)}}
    for path, value in sorted(values.items()):
        *tables, name = path.replace("*", "a").split(".")
        if name == "keys[]":
            data["keys"] = [value]
            continue
        table = data
        if tables == ["keys[]"]:
            data["keys"] = [{"name": "n", "sha256": "a" * 64}]
            tables, table = [], data["keys"][0]
        for part in tables:
            inner = table.setdefault(part, {})
            table = inner if isinstance(inner, dict) else table.__setitem__(part, {}) or table[part]
        table[name] = value
    try:
        found: Config | ConfigError = parse_config(data, "F", {})
    except ConfigError as error:
        found = error
    if isinstance(found, ConfigError):
        assert found.problems
        assert all(str(problem).isprintable() for problem in found.problems)
    else:
        assert all(model.model_path for model in found.models.values())
        json.dumps(describe(found), allow_nan=False).encode()
