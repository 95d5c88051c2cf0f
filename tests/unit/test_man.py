"""The man pages: complete, reproducible, and correct roff; what they show as examples works."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from llmuxctl import man, roff
from llmuxctl.cli import group
from llmuxd.cli import main as daemon
from llmuxd.config import KEYS, parse_config
from llmuxd.protocol import Exit

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NAMES = ("llmuxd.8", "llmuxctl.1", "llmux.toml.5", "llmux-install-vllm.8")
DAYS = 19_000


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _made(tmp_path_factory.mktemp("man"))


def _made(folder: Path, **environment: str) -> Path:
    subprocess.run(
        [sys.executable, "-m", "llmuxctl.man", str(folder)],
        env={**os.environ, "SOURCE_DATE_EPOCH": str(DAYS * 86400), **environment},
        check=True,
        timeout=20,
    )
    return folder


def _plain(folder: Path, name: str) -> str:
    """A page's text without its roff."""
    text = (folder / name).read_text(encoding="ascii")
    text = re.sub(r"\\f[BIR]", "", text).replace("\\&", "")
    for shown, written in roff._ESCAPES.items():
        if shown != "\\":
            text = text.replace(written, shown)
    return text.replace("\\e", "\\")


def _examples(folder: Path, name: str) -> Iterator[list[str]]:
    for block in re.findall(r"^\.nf\n(.*?)\n\.fi$", _plain(folder, name), re.MULTILINE | re.DOTALL):
        yield block.splitlines()


def test_the_pages(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)
    for name in NAMES:
        title = name.rpartition(".")
        head = _plain(folder, name).splitlines()[1]
        assert head.startswith(f".TH {title[0].upper()} {title[2]} 2022-01-08 "), head


def test_they_do_not_depend_on_where_they_are_made(folder: Path, tmp_path: Path) -> None:
    elsewhere = {"LLMUX_RUNTIME_DIR": "/r", "LLMUX_CONTROL_SOCKET": "/s", "LC_ALL": "C", "PYTHONHASHSEED": "7"}
    again = _made(tmp_path / "new" / "folder", TZ="Asia/Tokyo", COLUMNS="40", **elsewhere)
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_every_command_argument_and_option_is_there(folder: Path) -> None:
    text = _plain(folder, "llmuxctl.1")
    commands = list(man._commands(group))
    assert len(commands) >= 20
    for path, command in commands:
        section = text.partition(f"\n.SS llmuxctl {path}\n")[2].partition("\n.S")[0]
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert all(
                    re.search(rf"^{re.escape(name)}\b|, {re.escape(name)}\b", section, re.M) for name in parameter.opts
                )
            else:
                assert man._word(parameter) in section
        assert (command.help or "").strip().splitlines()[0] in section
    for option in group.params:
        assert all(name in text for name in option.opts)
    for code in Exit:
        assert f"\n.TP\n{int(code)}\n" in text


def test_every_option_of_the_daemon_is_there(folder: Path) -> None:
    text = _plain(folder, "llmuxd.8")
    for option in daemon.params:
        assert all(re.search(rf"^{re.escape(name)}\b", text, re.MULTILINE) for name in option.opts)
    for code in (0, 1, 2, 75):
        assert f"\n.TP\n{code}\n" in text
    for signal in ("SIGTERM", "SIGHUP", "SIGUSR2"):
        assert re.search(rf"^{signal}\b", text, re.MULTILINE)


def test_every_key_is_there_with_all_that_is_known_of_it(folder: Path) -> None:
    text = _plain(folder, "llmux.toml.5").replace("NAME]", "*]")
    sections = {}
    for section in text.split("\n.SS ")[1:]:
        title, _, body = section.partition("\n")
        sections[title] = body.partition("\n.SH ")[0]
    for key in KEYS:
        table, _, name = key.path.rpartition(".")
        array = table.endswith("[]")
        body = sections[f"[[{table[:-2]}]]" if array else f"[{table}]" if table else "TOP LEVEL"]
        entry = body.partition(f"\n.TP\n{name} = {key.type}")[2].partition("\n.TP\n")[0]
        assert key.meaning.replace("`", "") in entry, key.path
        assert key.allowed.replace("`", "") in entry, key.path
        assert key.default in entry, key.path
        assert key.unit in entry, key.path
        assert ("has to be set" in entry, "Secret" in entry) == (key.required, key.secret)


def test_the_examples_of_the_config_are_good(folder: Path) -> None:
    examples = list(_examples(folder, "llmux.toml.5"))
    assert len(examples) == 3
    for lines in examples:
        parse_config(tomllib.loads("\n".join(lines)), environ={})


def test_the_examples_name_commands_that_there_are(folder: Path) -> None:
    seen = 0
    for name in NAMES:
        for line in (line for lines in _examples(folder, name) for line in lines):
            for words in re.findall(r"(?:^|\| )(llmuxctl .*?)(?= \||$)", line):
                seen += 1
                arguments = shlex.split(words, comments=True)[1:]
                context = group.make_context("llmuxctl", arguments, resilient_parsing=True)
                # Under either name, as click's versions have it.
                kept = vars(context).get("_protected_args") or vars(context).get("protected_args") or []
                rest = [*kept, *context.args]
                command = group.get_command(context, rest[0])
                assert command is not None, line
                if not isinstance(command, click.Group):
                    command.make_context(rest[0], rest[1:], parent=context, resilient_parsing=False, obj=None).close()
    assert seen > 30


@pytest.mark.parametrize("name", NAMES)
def test_the_roff_is_correct(folder: Path, name: str) -> None:
    text = (folder / name).read_text(encoding="ascii")
    for line in text.splitlines():
        assert not line.startswith("'"), line
        assert not line.startswith(".") or re.match(r"\.(\\\"|TH|SH|SS|PP|TP|IP|RS|RE|nf|fi|nh|ad)(?= |$)", line), line
        assert not re.search(r"\\(?![-e&\"]|f[BIR]|\((?:aq|ga|ha|ti|dq)|\[u)", line), line
        assert not re.search(r"(?<!\\)-", line) or line.startswith(('.\\"',)), line
        assert line.count("\\fB") + line.count("\\fI") == line.count("\\fR")
    groff = shutil.which("groff")
    if groff is not None:
        done = subprocess.run(
            [groff, "-man", "-ww", "-z", "-Tutf8", str(folder / name)],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
        assert (done.stdout, done.stderr) == ("", "")


def test_what_would_be_a_macro_or_an_escape_is_text() -> None:
    page = roff.Page("a", 1, "2022-01-08", "a 1", "b")
    page.text(".so /etc/passwd", "'br", r"a\fBb", "`--x`é")
    page.example(['.\\" no comment', "it's"])
    text = str(page)
    assert "\n\\&.so /etc/passwd\n" in text
    assert "\n\\(aqbr\n" in text
    assert "\na\\efBb\n" in text
    assert "\n\\fB\\-\\-x\\fR\\[u00E9]\n" in text
    assert "\n\\&.\\e\\(dq no comment\nit\\(aqs\n" in text


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert man.main([]) == 2
    assert "FOLDER" in capsys.readouterr().err
