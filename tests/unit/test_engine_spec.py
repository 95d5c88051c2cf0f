"""What an engine is started with: argv, environment, paths."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from llmuxd.config import parse_config
from llmuxd.config.types import CheckpointConfig, Config, ModelConfig
from llmuxd.core.eviction import AUTO, EvictionPolicy
from llmuxd.engine import Endpoint, EngineSpec, build_argv, build_env, engine_spec
from llmuxd.engine.spec import SOCKET_PATH_LIMIT, WITHOUT_IO_URING, api_key, check_executable, make_private_folder, slug


def spec(name: str = "a", socket_dir: str = "/run/llmux/engines", **more: Any) -> EngineSpec:
    return EngineSpec(
        name=name,
        model_path="/models/a",
        vllm_command=("vllm",),
        socket_dir=Path(socket_dir),
        log_path=Path("/var/lib/llmux/logs/a.log"),
        **more,
    )


def test_argv_on_a_unix_socket() -> None:
    made = build_argv(spec(aliases=("b", "lora-1"), extra_args=("--max-model-len", "512")))
    assert made == [
        *("vllm", "serve", "/models/a", "--served-model-name", "a", "b", "lora-1"),
        *("--uds", "/run/llmux/engines/a.sock", "--enable-sleep-mode", "--max-model-len", "512"),
    ]


def test_argv_on_a_port_listens_on_loopback_alone() -> None:
    made = build_argv(spec(port=8001))
    assert made[5:9] == ["--host", "127.0.0.1", "--port", "8001"]
    assert "--uds" not in made


@pytest.mark.parametrize(
    ("env", "base", "flags"),
    [
        ({"VLLM_TARGET_DEVICE": "cpu"}, {}, 0),
        ({"VLLM_CPU_KVCACHE_SPACE": "1"}, {}, 0),
        ({}, {"VLLM_CPU_KVCACHE_SPACE": "1"}, 0),
        ({"VLLM_TARGET_DEVICE": "cuda"}, {"VLLM_TARGET_DEVICE": "cpu"}, 1),
        ({}, {}, 1),
    ],
)
def test_a_cpu_build_gets_no_sleep_flag(env: dict[str, str], base: dict[str, str], flags: int) -> None:
    assert build_argv(spec(env=env), base).count("--enable-sleep-mode") == flags


def test_the_sleep_flag_in_extra_args_decides() -> None:
    assert "--enable-sleep-mode" not in build_argv(spec(extra_args=("--no-enable-sleep-mode",)))
    assert build_argv(spec(extra_args=("--enable-sleep-mode",))).count("--enable-sleep-mode") == 1


def test_env_keeps_what_is_the_daemons_from_the_engine() -> None:
    base = {"PATH": "/bin", "NOTIFY_SOCKET": "/run/n", "LISTEN_FDS": "1", "WATCHDOG_USEC": "9", "X": "base"}
    made = build_env(spec(env={"X": "model", "VLLM_SERVER_DEV_MODE": "0"}), base)
    assert made == {
        "PATH": "/bin",
        "X": "model",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_RPC_BASE_PATH": "/run/llmux/engines/a.rpc",
        "LLMUX_ENGINE_OF": "",
    }


def test_the_engines_own_api_key_is_known() -> None:
    assert api_key(spec(), {}) is None
    assert api_key(spec(), {"VLLM_API_KEY": "base"}) == "base"
    assert api_key(spec(env={"VLLM_API_KEY": "model"}), {"VLLM_API_KEY": "base"}) == "model"
    assert api_key(spec(extra_args=("--api-key", "k1")), {"VLLM_API_KEY": "base"}) == "k1"
    assert api_key(spec(extra_args=("--api-key=k2",)), {}) == "k2"


@pytest.mark.parametrize("name", ["org/model", "m" * 300, "größe", "..", ".hidden", "a b", "/", "Qwen/Qwen3-0.6B"])
def test_slug_is_a_file_name_of_its_own(name: str) -> None:
    made = slug(name, 40)
    assert made == os.path.basename(made)
    assert not made.startswith(".")
    assert 0 < len(os.fsencode(made)) <= 40
    assert made != slug(name + "x", 40)


def test_slugs_of_names_that_look_alike_differ() -> None:
    assert len({slug(name, 64) for name in ("a/b", "a_b", "a b", "a:b")}) == 4
    assert slug("a_b", 64) == "a_b"


@pytest.mark.parametrize("length", [10, 60, 93])
def test_socket_and_zmq_paths_fit(length: int) -> None:
    folder = "/" + "d" * (length - 1)
    made = spec("a-model-with-a-name-of-some-length" * 4, folder)
    assert made.endpoint.uds is not None
    assert len(os.fsencode(made.endpoint.uds)) <= SOCKET_PATH_LIMIT
    assert len(os.fsencode(made.rpc_dir / ("u" * 36))) <= SOCKET_PATH_LIMIT
    assert made.rpc_dir != spec("another", folder).rpc_dir


def test_a_folder_too_long_for_a_socket_is_refused() -> None:
    with pytest.raises(ValueError, match="too long for a Unix socket"):
        spec(socket_dir="/" + "d" * 94)
    assert spec(socket_dir="/" + "d" * 94, port=8001).endpoint == Endpoint(port=8001)


def test_endpoint_urls() -> None:
    assert Endpoint(uds=Path("/x.sock")).base_url == "http://localhost"
    assert Endpoint(port=8001).base_url == "http://127.0.0.1:8001"


def test_engine_spec_of_a_configured_model(tmp_path: Path) -> None:
    model = SimpleNamespace(
        name="org/m", model_path="p", aliases=("x",), extra_args=("--a",), env={"K": "v"}, port=None,
        eviction=EvictionPolicy.parse("discard+stop"), checkpoint_path=None,
    )  # fmt: skip
    config = SimpleNamespace(
        vllm_command=("v", "w"), runtime_dir=Path("/run/x"), state_dir=Path("/var/x"), checkpoint=CheckpointConfig()
    )
    made = engine_spec(cast(Any, config), cast(Any, model))
    assert made.socket_dir == Path("/run/x/engines")
    assert made.log_path.parent == Path("/var/x/logs")
    assert made.vllm_command == ("v", "w")
    assert (made.aliases, made.extra_args, made.env) == (("x",), ("--a",), {"K": "v"})


@pytest.mark.parametrize(
    ("changes", "of_config", "savable"),
    [
        ({}, {}, False),
        ({"eviction": EvictionPolicy.parse("retain+checkpoint")}, {}, True),
        ({"eviction": AUTO}, {}, True),
        ({"checkpoint_path": Path("/images/qwen")}, {}, True),
        ({}, {"images_dir": Path("/images")}, True),
    ],
)
def test_an_engine_that_may_be_saved_is_started_without_io_uring(changes, of_config, savable) -> None:
    model = ModelConfig("m", "path", eviction=EvictionPolicy.parse("offload+keep_running"))
    config = Config(Path("/run/x"), Path("/var/x"), Path("/run/x/s"), checkpoint=CheckpointConfig(**of_config))
    made = engine_spec(config, replace(model, **changes))
    assert made.savable is savable
    argv = build_argv(made)
    assert argv[:3] == list(WITHOUT_IO_URING) if savable else argv[0] == "vllm"
    assert argv[argv.index("vllm") : argv.index("vllm") + 3] == ["vllm", "serve", "path"]


def test_private_folder(tmp_path: Path) -> None:
    folder = tmp_path / "x" / "y"
    make_private_folder(folder)
    folder.chmod(0o777)
    make_private_folder(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_private_folder_is_not_made_of_what_another_put_there(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(PermissionError):
        make_private_folder(tmp_path / "link")


def test_io_uring_is_refused_to_what_is_run_without_it() -> None:
    asks = (
        "import ctypes; libc = ctypes.CDLL(None, use_errno=True); print(libc.syscall(425, 8, None), ctypes.get_errno())"
    )
    ran = subprocess.run([*WITHOUT_IO_URING, sys.executable, "-c", asks], capture_output=True, text=True, check=True)
    assert ran.stdout == f"-1 {errno.ENOSYS}\n"


def test_what_is_run_without_io_uring_is_the_same_process() -> None:
    shows = "import os, sys; print(os.getpid(), sys.argv[1:])"
    with subprocess.Popen(
        [*WITHOUT_IO_URING, sys.executable, "-c", shows, "x"], stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.communicate()[0] == f"{run.pid} ['x']\n"


def test_a_command_that_is_not_there_is_said_before_it_is_run_by_another() -> None:
    missing = replace(spec(savable=True), vllm_command=("/nonexistent/vllm",))
    with pytest.raises(FileNotFoundError):
        check_executable(missing, {})
    check_executable(replace(missing, savable=False), {})
    check_executable(replace(missing, vllm_command=("sh",)), {"PATH": "/bin"})


def test_engines_of_a_daemon_with_capabilities_are_started_without_them(monkeypatch) -> None:
    monkeypatch.setattr("llmuxd.engine.spec._has_ambient_capabilities", lambda: True)
    config = parse_config({"models": {"m": {"model_path": "/m", "eviction": "offload+keep_running"}}}, environ={})
    assert build_argv(engine_spec(config, config.models["m"]))[:3] == list(WITHOUT_IO_URING)
