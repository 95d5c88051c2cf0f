"""`llmuxctl key new`: a key that is printed once, and its table for the config. There is no daemon."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmuxctl.doctor import service
from llmuxctl.doctor.box import Box
from llmuxctl.doctor.finding import Status
from llmuxctl.doctor.situation import Situation
from llmuxd.config import KeyConfig, load_config, parse_config
from llmuxd.config.load import tomllib
from llmuxd.proxy.keys import KeyRing
from tests.unit.ctl_daemon import Said, run

Ctl = Callable[..., Said]
KEY = re.compile(r"llmux-[A-Za-z0-9_-]{43}")
MODELS = '[models.qwen]\nmodel_path = "p"\naliases = ["a \\"b\\"", "ä"]\n'


@pytest.fixture(name="ctl")
def _ctl(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ctl:
    return lambda *arguments: run(capsys, monkeypatch, "/nonexistent", "key", "new", *arguments)


def test_the_key_is_alone_on_standard_output_and_the_rest_is_toml(ctl: Ctl, tmp_path: Path) -> None:
    said = ctl("alice")
    assert said.code == 0
    key = said.out.removesuffix("\n")
    assert KEY.fullmatch(key)
    assert key not in said.err
    (tmp_path / "llmux.toml").write_text(said.err)
    sha256 = hashlib.sha256(key.encode()).hexdigest()
    assert load_config(tmp_path / "llmux.toml", {}).keys == (KeyConfig("alice", sha256),)
    assert [line for line in said.err.splitlines() if not line.startswith("#")] == [
        "[[keys]]",
        'name = "alice"',
        f'sha256 = "{sha256}"',
    ]


def test_every_bound_is_in_the_table(ctl: Ctl) -> None:
    bounds = ("--requests-per-minute", "60", "--max-parallel", "4", "--priority", "-5")
    said = ctl('ä"\\b', "--models", "qwen", "--models", 'a "b"', *bounds, "--models", "ä")
    config = parse_config(tomllib.loads(MODELS + said.err), environ={})
    sha256 = hashlib.sha256(said.out.strip().encode()).hexdigest()
    assert config.keys == (KeyConfig('ä"\\b', sha256, ("qwen",), 60, 4, -5),)


def test_json_has_all_of_it(ctl: Ctl) -> None:
    said = ctl("alice", "--max-parallel", "4", "--json")
    made = json.loads(said.out)
    assert (said.code, said.err, list(made)) == (0, "", ["key", "name", "sha256", "toml"])
    assert KEY.fullmatch(made["key"])
    config = parse_config(tomllib.loads(made["toml"]), environ={})
    assert config.keys == (KeyConfig("alice", made["sha256"], max_parallel=4),)
    assert (made["name"], made["key"] in made["toml"]) == ("alice", False)


def test_the_proxy_knows_the_key(ctl: Ctl) -> None:
    said = ctl("alice")
    ring = KeyRing(parse_config(tomllib.loads(said.err), environ={}).keys)
    assert ring.identify(b"Bearer " + said.out.strip().encode(), None).name == "alice"


def test_no_two_are_the_same(ctl: Ctl) -> None:
    assert len({ctl("alice").out for _ in range(20)}) == 20


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("",), 'NAME: found ""; allowed: a printable name without spaces that does not begin with'),
        (("a b",), 'NAME: found "a b"; '),
        (("a\n",), 'NAME: found "a\\n"; '),
        (("a\x9b",), 'NAME: found "a\\x9b"; '),
        (("a\udcff",), 'NAME: found "a\\udcff"; '),
        (("--", "-a"), 'NAME: found "-a"; '),
        (("a", "--models", ""), '--models: found [""]; '),
        (("a", "--requests-per-minute", "0"), "--requests-per-minute: found 0; allowed: a whole number, 1 or more"),
        (("a", "--max-parallel", "-1"), "--max-parallel: found -1; "),
        (("a", "--priority", "101"), "--priority: found 101; allowed: a whole number, -100 to 100"),
        (("a", "--priority", "high"), "--priority"),
        ((), "NAME"),
        (("a", "b"), "b"),
    ],
)
def test_what_the_config_would_not_take_makes_no_key(ctl: Ctl, arguments: tuple[str, ...], says: str) -> None:
    said = ctl(*arguments)
    assert (said.code, said.out) == (2, "")
    assert says in said.err


def test_a_shell_takes_the_key_alone(tmp_path: Path) -> None:
    script = 'KEY=$("$0" -m llmuxctl key new alice 2> "$1"); printf %s "$KEY"'
    shell = ["sh", "-euc", script, sys.executable, str(tmp_path / "keys.toml")]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=20, check=True)
    assert KEY.fullmatch(done.stdout)
    (key,) = load_config(tmp_path / "keys.toml", {}).keys
    assert key.sha256 == hashlib.sha256(done.stdout.encode()).hexdigest()


def test_a_key_that_cannot_be_printed_has_no_table() -> None:
    command = [sys.executable, "-m", "llmuxctl", "key", "new", "alice"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (1, "llmuxctl: No space left on device\n")


@pytest.mark.parametrize(
    ("listens", "keys", "status"),
    [
        ("127.0.0.1:3000", False, Status.OK),
        ("[::1]:3000", False, Status.OK),
        ("0.0.0.0:3000", False, Status.WARN),
        ("[::]:3000", False, Status.WARN),
        ("0.0.0.0:3000", True, Status.OK),
    ],
)
def test_doctor_knows_a_socket_that_is_open_to_everybody(
    tmp_path: Path, listens: str, keys: bool, status: Status
) -> None:
    data = {"keys": [{"name": "alice", "sha256": "a" * 64}]} if keys else {}
    unit = {"LoadState": "loaded", "Listen": f"{listens} (Stream)"}
    config = parse_config(data, environ={}, known_policies=("tenure",))
    found = service.port(Situation(Box(tmp_path), "/nonexistent", tmp_path / "llmux.toml", config, unit=unit))
    assert found.status is status
    assert ("llmuxctl key new NAME" in found.advice) == (status is Status.WARN)
