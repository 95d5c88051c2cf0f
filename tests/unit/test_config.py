"""Reading configurations: what is accepted, what it becomes, what is warned of, how it is shown."""

from __future__ import annotations

import json

import pytest

from llmuxd.config import ConfigError, KeyConfig, describe, load_config, nearest, parse_config
from llmuxd.core.eviction import AUTO, EvictionPolicy

A = {"model_path": "org/a"}
HASHES = tuple(digit * 64 for digit in "abcdef")

# The example of llmux 0.7's README.
README_OF_0_7 = """
{
  "models": {
    "qwen-14b": {
      "model_path": "Qwen/Qwen3-14B",
      "port": 8001,
      "eviction": { "weights": "offload", "process": "keep_running" }
    },
    "gemma-12b": {
      "model_path": "google/gemma-3-12b-it",
      "port": 8002,
      "eviction": { "weights": "discard", "process": "keep_running" }
    }
  },
  "port": 3000
}
"""

# Every key that llmux 0.7 has.
ALL_OF_0_7 = {
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
            "checkpoint_path": "/tmp/llmux-checkpoints/mistral-7b/images",
        },
    },
    "checkpoint": {
        "criu_path": "/opt/criu",
        "cuda_plugin_dir": "/opt/plugins/",
        "images_dir": "/srv/images",
        "cuda_checkpoint_path": "/opt/cuda-checkpoint",
        "keep_images": False,
        "object_store": {
            "endpoint": "http://localhost:9200",
            "bucket": "b",
            "access_key": "hush-a",
            "secret_key": "hush-s",
        },
    },
    "policy": {
        "policy_type": "cost_aware",
        "request_timeout_secs": 60,
        "drain_before_switch": False,
        "eviction": {"weights": "retain", "process": "stop"},
        "min_active_secs": 1,
        "coalesce_window_ms": 3,
        "amortization_factor": 1,
        "max_wait_secs": 4,
        "tick_interval_ms": 5,
        "min_quantum_ms": 6,
    },
    "port": 3100,
    "metrics_port": 0,
    "admin_port": 3001,
    "vllm_command": "/opt/vllm",
}


def test_the_readme_of_llmux_0_7_loads_unchanged(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(README_OF_0_7)
    config = load_config(file, {})
    assert [(m.name, m.model_path, m.port, str(m.eviction)) for m in config.models.values()] == [
        ("qwen-14b", "Qwen/Qwen3-14B", 8001, "offload+keep_running"),
        ("gemma-12b", "google/gemma-3-12b-it", 8002, "discard+keep_running"),
    ]
    assert (config.port, config.metrics_port, config.warnings) == (3000, 9090, ())


def test_every_key_of_llmux_0_7_is_taken(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(ALL_OF_0_7))
    config = load_config(file, {})
    expected = json.loads(json.dumps(ALL_OF_0_7))
    del expected["admin_port"]
    expected["vllm_command"] = ["/opt/vllm"]
    for model in expected["models"].values():
        model["eviction"] = "+".join(model["eviction"].values())
    expected["policy"]["eviction"] = "retain+stop"
    expected["checkpoint"]["object_store"] |= {"access_key": "***", "secret_key": "***"}
    assert_within(expected, describe(config))
    assert config.checkpoint.object_store is not None
    assert config.checkpoint.object_store.region == "us-east-1"
    assert [warning.split(" ")[0] for warning in config.warnings] == ["admin_port"]


def assert_within(part, whole):
    """Assert that all of `part` is in `whole`, which may hold more."""
    if isinstance(part, dict):
        for key, value in part.items():
            assert_within(value, whole[key])
    else:
        assert part == whole


def test_null_is_what_is_not_set():
    data = {"models": {"a": {**A, "checkpoint_path": None}}, "admin_port": None, "checkpoint": None}
    config = parse_config(data, "f.json", {})
    assert config.models["a"].checkpoint_path is None
    assert config.warnings == ()


def test_toml_with_everything_of_ours(tmp_path):
    file = tmp_path / "llmux.toml"
    file.write_text(
        """
        port = 8080
        vllm_command = ["python3", "-m", "x"]
        start_timeout_secs = 7
        [policy]
        eviction = "discard+stop"
        min_active_secs = 2.5
        [models.b]
        model_path = "org/a"
        aliases = ["x", "y"]
        env = { K = "v", EMPTY = "" }
        max_in_flight = 3
        max_queue = 4
        ttl_secs = 0.5
        [models."org/a:1"]
        model_path = "/srv/b"
        eviction = "retain+keep_running"
        start_timeout_secs = 9
        """
    )
    config = load_config(file, {"LLMUX_RUNTIME_DIR": "/r", "LLMUX_STATE_DIR": "/s"})
    first, second = config.models.values()
    assert (config.port, config.vllm_command) == (8080, ("python3", "-m", "x"))
    assert (first.name, first.aliases, first.env) == ("b", ("x", "y"), {"K": "v", "EMPTY": ""})
    assert (first.max_in_flight, first.max_queue, first.ttl_secs) == (3, 4, 0.5)
    assert (str(first.eviction), first.start_timeout_secs) == ("discard+stop", 7)
    assert (second.name, str(second.eviction), second.start_timeout_secs) == ("org/a:1", "retain+keep_running", 9)
    assert config.policy.min_active_secs == 2.5
    assert (str(config.runtime_dir), str(config.state_dir)) == ("/r", "/s")
    assert str(config.control_socket) == "/r/control.sock"
    assert config.warnings == ()


def test_nothing_is_a_configuration():
    config = parse_config({}, environ={})
    assert (config.models, config.port, config.listen, config.metrics_port) == ({}, 3000, "127.0.0.1", 9090)
    assert config.policy.eviction == EvictionPolicy.parse("offload+keep_running")
    assert (str(config.runtime_dir), str(config.state_dir)) == ("/run/llmux", "/var/lib/llmux")
    assert str(config.control_socket) == "/run/llmux/control.sock"


def test_folders_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse_config({}, environ={"LLMUX_RUNTIME_DIR": "r", "LLMUX_STATE_DIR": "s"})
    assert (config.runtime_dir, config.state_dir) == (tmp_path / "r", tmp_path / "s")
    assert config.control_socket == tmp_path / "r" / "control.sock"


def test_the_environment_of_the_process_is_the_default(monkeypatch):
    monkeypatch.setenv("LLMUX_RUNTIME_DIR", "/elsewhere")
    assert str(parse_config({}).runtime_dir) == "/elsewhere"


@pytest.mark.parametrize("port", [0, 65535])
def test_any_free_port_and_the_last_one(port):
    assert parse_config({"port": port}, environ={}).port == port


def test_no_port_of_either_kind_is_no_collision():
    config = parse_config({"port": 0, "metrics_port": 0}, environ={})
    assert (config.port, config.metrics_port) == (0, 0)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("offload+keep_running", "offload+keep_running"),
        ("discard + stop", "discard+stop"),
        ({"weights": "retain", "process": "stop"}, "retain+stop"),
    ],
)
def test_evictions_are_written_either_way(written, meant):
    data = {"policy": {"eviction": written}, "models": {"a": A, "b": {**A, "eviction": written}}}
    config = parse_config(data, environ={})
    assert {str(model.eviction) for model in config.models.values()} == {meant}


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_a_loopback_address_is_not_warned_of(address):
    assert parse_config({"listen": address}, environ={}).warnings == ()


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "10.0.0.1", "gpu-box.lan"])
def test_an_open_address_is_warned_of(address):
    (warning,) = parse_config({"listen": address}, environ={}).warnings
    assert warning == f'listen = "{address}": anyone who reaches it may use the models; see keys'
    key = {"name": "alice", "sha256": HASHES[0]}
    assert parse_config({"listen": address, "keys": [key]}, environ={}).warnings == ()


@pytest.mark.parametrize("eviction", ["retain+cuda_suspend", "discard+checkpoint", "auto"])
@pytest.mark.parametrize("size", [["-tp", "2"], ["--tensor-parallel-size=2"], ["--pipeline_parallel_size", "4"]])
def test_what_ranks_need_that_leave_their_devices_is_warned_of(eviction, size):
    data = {"models": {"a": {**A, "eviction": eviction, "extra_args": size}}}
    one, other = parse_config(data, environ={}).warnings
    assert one.startswith(f"models.a.extra_args: an engine of several ranks under {eviction} needs --enforce-eager: ")
    assert other.split(" needs ")[1].startswith("--disable-custom-all-reduce: ")


@pytest.mark.parametrize(
    ("eviction", "arguments"),
    [
        ("offload+keep_running", ["-tp", "2"]),
        ("discard+checkpoint", []),
        ("discard+checkpoint", ["-tp", "1"]),
        ("discard+checkpoint", ["-tp"]),
        ("auto", ["-tp", "2", "--enforce_eager", "--disable-custom-all-reduce"]),
    ],
)
def test_where_nothing_is_needed_nothing_is_said_of_ranks(eviction, arguments):
    data = {"models": {"a": {**A, "eviction": eviction, "extra_args": arguments}}}
    assert parse_config(data, environ={}).warnings == ()


def test_an_eviction_may_be_left_to_be_chosen():
    config = parse_config(
        {"policy": {"eviction": "auto"}, "models": {"a": A, "b": {**A, "eviction": "discard+stop"}}}, environ={}
    )
    assert (config.policy.eviction, config.models["a"].eviction) == (AUTO, AUTO)
    shown = describe(config)
    assert (shown["models"]["a"]["eviction"], shown["models"]["b"]["eviction"]) == ("auto", "discard+stop")


@pytest.mark.parametrize("name", ["tenure", "fifo", "cost_aware", "time_slice"])
def test_the_policies_are_known(name):
    config = parse_config({"policy": {"policy_type": name}}, environ={})
    assert (config.policy.policy_type, config.warnings) == (name, ())


@pytest.mark.parametrize(
    ("policy", "secs"),
    [
        ({}, 0),
        ({"policy_type": "fifo"}, 5),
        ({"policy_type": "time_slice"}, 5),
        ({"min_active_secs": 2}, 2),
        ({"policy_type": "cost_aware", "min_active_secs": 0}, 0),
    ],
)
def test_the_cooldown_is_the_policys_unless_it_is_said(policy, secs):
    assert parse_config({"policy": policy}, environ={}).policy.min_active_secs == secs


def test_known_policies_are_for_files_too(tmp_path):
    file = tmp_path / "f.toml"
    file.write_text('policy.policy_type = "ours"\n')
    assert load_config(file, {}, known_policies=["ours"]).policy.policy_type == "ours"
    with pytest.raises(ConfigError, match=r'found "ours"; allowed: fifo, cost_aware, time_slice, tenure'):
        load_config(file, {})


def test_drain_contradicts_a_switch_that_does_not_wait():
    with pytest.raises(ConfigError, match=r"policy\.in_flight: found 'drain', which contradicts"):
        parse_config({"policy": {"in_flight": "drain", "drain_before_switch": False}}, environ={})


def test_the_description_is_json_without_secrets():
    env = {"HF_TOKEN": "hush", "OPENAI_API_KEY": "hush", "DB_PASSWORD": "hush", "HF_HOME": "/srv", "MONKEY": "m"}
    data = {**ALL_OF_0_7, "models": {"a": {**A, "env": env, "port": 8001, "aliases": ["b"]}}}
    config = parse_config(data, environ={})
    text = json.dumps(describe(config))
    assert "hush" not in text
    shown = json.loads(text)
    masked = {"HF_TOKEN": "***", "OPENAI_API_KEY": "***", "DB_PASSWORD": "***", "HF_HOME": "/srv", "MONKEY": "m"}
    assert shown["models"]["a"]["env"] == masked
    assert shown["models"]["a"]["aliases"] == ["b"]
    assert shown["policy"]["eviction"] == "retain+stop"
    assert shown["control_socket"] == "/run/llmux/control.sock"
    assert shown["checkpoint"]["object_store"]["secret_key"] == "***"
    assert config.checkpoint.object_store is not None
    assert config.checkpoint.object_store.secret_key == "hush-s", "only the description is masked"


def test_the_description_of_no_object_store_is_null():
    assert describe(parse_config({}, environ={}))["checkpoint"]["object_store"] is None


class TestKeys:
    def test_one_of_them_has_what_it_says_and_no_bounds_else(self, tmp_path):
        file = tmp_path / "llmux.toml"
        file.write_text(
            f"""
            [models.a]
            model_path = "p"
            aliases = ["gpt-4o", "big"]
            [models.b]
            model_path = "p"
            [[keys]]
            name = "alice"
            sha256 = "{HASHES[0]}"
            [[keys]]
            name = "bob@example.com"
            sha256 = "{HASHES[1].upper()}"
            models = ["b", "big", "a", "gpt-4o"]
            requests_per_minute = 60
            max_parallel = 4
            priority = -7
            """
        )
        assert load_config(file, {}).keys == (
            KeyConfig("alice", HASHES[0], None, None, None, 0),
            KeyConfig("bob@example.com", HASHES[1], ("b", "a"), 60, 4, -7),
        )

    def test_json_has_them_as_a_list(self, tmp_path):
        file = tmp_path / "config.json"
        key = {"name": "alice", "sha256": HASHES[0], "models": None, "max_parallel": 3}
        file.write_text(json.dumps({"keys": [key]}))
        assert load_config(file, {}).keys == (KeyConfig("alice", HASHES[0], max_parallel=3),)

    def test_they_are_shown_without_their_hashes(self):
        config = parse_config({"keys": [{"name": "alice", "sha256": HASHES[0]}]}, environ={})
        (shown,) = describe(config)["keys"]
        assert shown == {
            "name": "alice",
            "sha256": "***",
            "models": None,
            "requests_per_minute": None,
            "max_parallel": None,
            "priority": 0,
        }
        assert HASHES[0] not in json.dumps(describe(config))


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("*", "*"),
        ("https://chat.example.com", "https://chat.example.com"),
        ("HTTPS://Chat.Example.COM", "https://chat.example.com"),
        ("https://a.b:443", "https://a.b"),
        ("http://a.b:80", "http://a.b"),
        ("http://a.b:443", "http://a.b:443"),
        ("http://localhost:8080", "http://localhost:8080"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("chrome-extension://abcdefgh", "chrome-extension://abcdefgh"),
    ],
)
def test_origins_are_taken_as_a_browser_spells_them(written, meant):
    assert parse_config({"cors_origins": [written]}, environ={}).cors_origins == (meant,)


@pytest.mark.parametrize(
    ("word", "meant"),
    [("prot", "port"), ("PORT", "port"), ("max-queue", "max_queue"), ("zzz", None), ("", None)],
)
def test_the_nearest_word(word, meant):
    assert nearest(word, {"port", "max_queue", "listen"}) == meant
