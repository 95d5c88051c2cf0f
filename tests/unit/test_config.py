"""Reading configurations: what is accepted, and what is said of what is not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from llmuxd.config import KEYS, ConfigError, describe, load_config, parse_config
from llmuxd.core.eviction import EvictionPolicy

EXAMPLE = Path(__file__).parents[2] / "etc" / "llmux.toml"
A = {"model_path": "org/a"}

# As llmux 0.7 documents it.
JSON_OF_0_7 = {
    "models": {
        "llama-7b": {
            "model_path": "meta-llama/Llama-2-7b-chat-hf",
            "port": 8001,
            "eviction": {"weights": "offload", "process": "keep_running"},
            "extra_args": ["--gpu-memory-utilization", "0.9"],
        },
        "mistral-7b": {
            "model_path": "mistralai/Mistral-7B-Instruct-v0.2",
            "port": 8002,
            "eviction": {"weights": "discard", "process": "checkpoint"},
            "checkpoint_path": None,
        },
    },
    "checkpoint": {
        "criu_path": "criu",
        "cuda_plugin_dir": "/usr/lib/criu/",
        "images_dir": "/tmp/llmux-checkpoints",
        "cuda_checkpoint_path": "cuda-checkpoint",
        "keep_images": True,
        "object_store": {
            "endpoint": "http://localhost:9200",
            "bucket": "b",
            "access_key": "AK",
            "secret_key": "SK",
        },
    },
    "policy": {
        "policy_type": "cost_aware",
        "request_timeout_secs": 300,
        "drain_before_switch": True,
        "eviction": {"weights": "offload", "process": "keep_running"},
    },
    "port": 3000,
    "metrics_port": 9090,
    "admin_port": 3001,
    "vllm_command": "vllm",
    "warmup": False,
}


def problems(data: dict) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(data, "f.toml", {})
    return [str(problem) for problem in caught.value.problems]


def test_the_json_of_llmux_0_7_loads_unchanged(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(JSON_OF_0_7))
    config = load_config(file, {})
    assert list(config.models) == ["llama-7b", "mistral-7b"]
    assert config.models["llama-7b"].eviction == EvictionPolicy.parse("offload+keep_running")
    assert config.models["llama-7b"].extra_args == ("--gpu-memory-utilization", "0.9")
    assert config.models["mistral-7b"].port == 8002
    assert config.checkpoint.object_store is not None
    assert config.checkpoint.object_store.region == "us-east-1"
    assert [w.split(" ")[0] for w in config.warnings] == ["admin_port", "policy.policy_type", "mistral-7b:"]


def test_toml_with_everything(tmp_path):
    file = tmp_path / "llmux.toml"
    file.write_text(
        """
        port = 8080
        vllm_command = ["python3", "-m", "x"]
        [policy]
        eviction = "discard+stop"
        min_active_secs = 2.5
        [models.a]
        model_path = "org/a"
        aliases = ["x", "y"]
        env = { K = "v" }
        [models."org/b:1"]
        model_path = "/srv/b"
        eviction = "retain+keep_running"
        start_timeout_secs = 9
        """
    )
    config = load_config(file, {"LLMUX_RUNTIME_DIR": "/r", "LLMUX_STATE_DIR": "/s"})
    assert (config.port, config.vllm_command) == (8080, ("python3", "-m", "x"))
    assert config.models["a"].aliases == ("x", "y")
    assert config.models["a"].env == {"K": "v"}
    assert str(config.models["a"].eviction) == "discard+stop"
    assert config.models["a"].start_timeout_secs == 1800
    assert str(config.models["org/b:1"].eviction) == "retain+keep_running"
    assert config.models["org/b:1"].start_timeout_secs == 9
    assert config.policy.min_active_secs == 2.5
    assert (str(config.runtime_dir), str(config.state_dir)) == ("/r", "/s")
    assert str(config.control_socket) == "/r/control.sock"
    assert config.warnings == ()


def test_conf_d_adds_to_the_file_and_may_not_contradict_it(tmp_path):
    (tmp_path / "llmux.toml").write_text("port = 1\n")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "a.toml").write_text('[models.a]\nmodel_path = "p"\n')
    (tmp_path / "conf.d" / "ignored.txt").write_text("nonsense")
    assert list(load_config(tmp_path / "llmux.toml", {}).models) == ["a"]
    (tmp_path / "conf.d" / "b.toml").write_text("port = 2\n")
    with pytest.raises(ConfigError, match=r"b\.toml: port: is set in .*llmux\.toml already"):
        load_config(tmp_path / "llmux.toml", {})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"prot": 1}, "f.toml: prot: unknown key; did you mean 'port'?"),
        ({"zzz": 1}, "f.toml: zzz: unknown key; allowed: "),
        ({"port": "3000"}, 'f.toml: port: found "3000"; allowed: a port, 0 to 65535'),
        ({"port": True}, "f.toml: port: found true; allowed: a port, 0 to 65535"),
        ({"port": 70000}, "f.toml: port: found 70000; allowed: a port, 0 to 65535"),
        ({"warmup": 1}, "f.toml: warmup: found 1; allowed: true or false"),
        ({"listen": ""}, 'f.toml: listen: found ""; allowed: an address of this machine'),
        ({"vllm_command": []}, "f.toml: vllm_command: found []; allowed: a string, or a list of strings"),
        ({"vllm_command": ["a", 1]}, 'f.toml: vllm_command: found ["a", 1]; allowed: '),
        ({"control_socket": "x.sock"}, 'f.toml: control_socket: found "x.sock"; allowed: an absolute path'),
        ({"max_queue": 0}, "f.toml: max_queue: found 0; allowed: a whole number, 1 or more"),
        ({"start_timeout_secs": 0}, "f.toml: start_timeout_secs: found 0; allowed: a number of seconds above 0"),
        ({"policy": []}, "f.toml: policy: found []; allowed: a table"),
        ({"policy": {"min_active_secs": -1}}, "f.toml: policy.min_active_secs: found -1; allowed: "),
        ({"policy": {"min_active_secs": float("nan")}}, "f.toml: policy.min_active_secs: found NaN; allowed: "),
        ({"policy": {"max_wait_secs": float("inf")}}, "f.toml: policy.max_wait_secs: found Infinity; allowed: "),
        ({"policy": {"max_wait_secs": True}}, "f.toml: policy.max_wait_secs: found true; allowed: "),
        ({"policy": {"policy_type": "fifi"}}, "f.toml: policy.policy_type: found \"fifi\" (did you mean 'fifo'?)"),
        ({"policy": {"evict": "x"}}, "f.toml: policy.evict: unknown key; did you mean 'eviction'?"),
        ({"policy": {"eviction": "offload"}}, 'f.toml: policy.eviction: found "offload"; allowed: "WEIGHTS+PROCESS"'),
        ({"policy": {"eviction": {"weight": "x"}}}, "f.toml: policy.eviction: found {"),
        ({"policy": {"eviction": {"weights": "melt"}}}, "f.toml: policy.eviction: found {"),
        ({"models": 3}, "f.toml: models: found 3; allowed: a table"),
        ({"models": {"a": "p"}}, 'f.toml: models.a: found "p"; allowed: a table with model_path'),
        ({"models": {"a": {}}}, "f.toml: models.a.model_path: is missing; allowed: a string that is not empty"),
        ({"models": {"": A}}, 'f.toml: models."": a model\'s name has to be printable and not empty'),
        ({"models": {"a\n": A}}, 'f.toml: models."a\\n": a model\'s name has to be printable and not empty'),
        ({"models": {"a": {**A, "modelpath": 1}}}, "f.toml: models.a.modelpath: unknown key; did you mean 'model_path'?"),
        ({"models": {"a": {**A, "gpus": [0]}}}, "f.toml: models.a.gpus: is not supported yet"),
        ({"models": {"a": {**A, "port": 3000}}}, "f.toml: models.a.port: found 3000, which port has already"),
        ({"models": {"a": {**A, "port": 9090}}}, "f.toml: models.a.port: found 9090, which metrics_port has already"),
        ({"models": {"a": {**A, "env": {"A": 1}}}}, 'f.toml: models.a.env: found {"A": 1}; allowed: a table of strings'),
        ({"models": {"a": {**A, "env": {"A=B": "1"}}}}, "f.toml: models.a.env: found "),
        ({"models": {"a": {**A, "env": 3}}}, "f.toml: models.a.env: found 3"),
        ({"models": {"a": {**A, "extra_args": "--x"}}}, 'f.toml: models.a.extra_args: found "--x"; allowed: a list'),
        (
            {"models": {"a": {**A, "extra_args": ["--port=1"]}}},
            'f.toml: models.a.extra_args: found "--port=1", which llmuxd decides: use models.NAME.port',
        ),
        (
            {"models": {"a": {**A, "extra_args": ["--served_model_name", "x"]}}},
            'f.toml: models.a.extra_args: found "--served_model_name", which llmuxd decides',
        ),
        ({"port": 5, "metrics_port": 5}, "f.toml: metrics_port: found 5, which is the other one's port, too"),
        ({"port": 9090}, "f.toml: port: found 9090, which is the other one's port, too"),
        ({"checkpoint": {"object_store": {"bucket": "b"}}}, "f.toml: checkpoint.object_store.endpoint: is missing"),
        ({"vllm_command": "x" * 99}, None),
        ({"listen": ["y" * 99]}, 'f.toml: listen: found ["' + "y" * 54 + " ...; allowed"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(data, said):
    if said is None:
        parse_config(data, "f.toml", {})
    else:
        assert any(problem.startswith(said) for problem in problems(data)), problems(data)


def test_names_are_unique_over_models_and_aliases():
    models = {"a": {**A, "aliases": ["b"]}, "b": {**A, "aliases": ["c", "c"]}, "d": {**A, "aliases": ["c"]}}
    assert problems({"models": models}) == [
        'f.toml: models.a.aliases: found "b", which is the name of a model already',
        'f.toml: models.b.aliases: found "c", which is an alias of b already',
        'f.toml: models.d.aliases: found "c", which is an alias of b already',
    ]


def test_ports_of_engines_differ():
    models = {"a": {**A, "port": 8001}, "b": {**A, "port": 8001}}
    assert problems({"models": models}) == ["f.toml: models.b.port: found 8001, which models.a.port has already"]


def test_every_problem_is_found_at_once():
    assert len(problems({"port": "x", "prot": 1, "models": {"a": {"port": 0}}})) == 4


def test_secrets_are_neither_shown_in_errors_nor_described():
    data = {"checkpoint": {"object_store": {"secret_key": ["hush"]}}}
    assert not any("hush" in problem for problem in problems(data))
    shown = json.dumps(describe(parse_config(JSON_OF_0_7, "f", {})))
    assert '"SK"' not in shown
    assert '"AK"' not in shown
    assert json.loads(shown)["models"]["llama-7b"]["eviction"] == "offload+keep_running"


def test_an_open_address_is_warned_of():
    assert parse_config({"listen": "127.0.0.1"}, "f", {}).warnings == ()
    assert parse_config({"listen": "localhost"}, "f", {}).warnings == ()
    (warning,) = parse_config({"listen": "0.0.0.0"}, "f", {}).warnings
    assert "anyone who reaches this address" in warning


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("f.toml", b"port = = 3", "is not TOML: .*line 1"),
        ("f.toml", b'{"port": 3}', "if it is llmux 0.7's JSON, let its name end in .json"),
        ("f.json", b"{]", "is not JSON: .*line 1 column 2"),
        ("f.json", b"[1]", r"found \[1\]; allowed: an object"),
        ("f.toml", b"\xff\xfe", r"is not UTF-8 \(byte 0\)"),
    ],
)
def test_files_that_cannot_be_parsed(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        load_config(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        load_config(tmp_path / "none.toml")


class TestExample:
    def test_it_is_valid_and_has_no_models(self):
        assert load_config(EXAMPLE, {}).models == {}

    def test_it_has_every_key(self):
        text = EXAMPLE.read_text()
        for key in KEYS:
            if key.path != "admin_port":
                assert re.search(rf"^#{key.path.rpartition('.')[2]} = ", text, re.MULTILINE), key.path

    def test_its_defaults_are_the_defaults(self, tmp_path):
        """With every line in force, and the model's taken out, nothing has changed."""
        file = tmp_path / "llmux.toml"
        text = re.sub(r"^#(\w+ = |\[)", r"\1", EXAMPLE.read_text(), flags=re.MULTILINE)
        file.write_text(text)
        full = describe(load_config(file, {}))
        default = describe(load_config(EXAMPLE, {}))
        assert full.pop("models").keys() == {"qwen"}
        assert full["checkpoint"].pop("object_store")["bucket"] == "checkpoints"
        default.pop("models")
        default["checkpoint"].pop("object_store")
        assert full.pop("vllm_command") == ["/opt/vllm/bin/vllm"]
        assert default.pop("vllm_command") == ["vllm"]
        assert full == default
