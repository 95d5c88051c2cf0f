"""HTTP over the control socket, and what each way of failing means to the one who typed the command."""

from __future__ import annotations

import http.client
import json
import socket
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import click

from llmuxctl.output import clean
from llmuxd.protocol import CONTROL_GROUP, CONTROL_PREFIX, CONTROL_SOCKET_ENV, NDJSON, VERSION_HEADER, Exit
from llmuxd.version import __version__

ANSWER_SECS = 30.0
"""How long the daemon may take to begin an answer. What follows may take as long as it does."""

_HOW_TO_START = (
    "Start it with `systemctl start llmuxd`, or `llmuxd --config FILE`; to try it out: `llmuxd --demo`.\n"
    f"If it runs with another socket, name it: --socket PATH or {CONTROL_SOCKET_ENV}."
)

_EXIT_OF_STATUS = {400: Exit.USAGE, 403: Exit.NOT_ALLOWED}


class Failed(click.ClickException):
    """The command did not succeed; the text is for the terminal."""

    def __init__(self, exit_code: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = exit_code  # type: ignore[misc]  # Recent click has it per class, by its types.

    def show(self, file: Any = None) -> None:
        print("\n".join(map(clean, self.message.splitlines())), file=file or sys.stderr)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, patience: float) -> None:
        super().__init__("localhost", timeout=patience)
        self._path = path
        self._patience = patience

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self._patience)
        self.sock.connect(self._path)


class Client:
    """Calls to one daemon. Every method raises Failed.

    `patience` is in seconds, `ANSWER_SECS` by default. A quiet one does not warn of another version.
    """

    def __init__(self, path: str, patience: float | None = None, quiet: bool = False) -> None:
        self._path = path
        self._patience = ANSWER_SECS if patience is None else patience
        self._quiet = quiet

    @property
    def path(self) -> str:
        """The socket."""
        return self._path

    def get(self, call: str) -> Any:
        """The JSON that a GET answers."""
        with self._answer("GET", call) as answer:
            return _json(answer.read())

    def post(self, call: str, **body: Any) -> Any:
        """The JSON that a POST answers."""
        with self._answer("POST", call, body) as answer:
            return _json(answer.read())

    def steps(self, call: str, **body: Any) -> Iterator[dict[str, Any]]:
        """The steps of a long operation; the last one has `result`. A failed one is yielded, too."""
        with self._answer("POST", call, body, {"Accept": NDJSON}, endless=True) as answer:
            for line in answer:
                step = _json(line)
                yield step
                if "result" in step:
                    return
            raise _broken_off()

    def lines(self, call: str) -> Generator[dict[str, Any], None, None]:
        """The objects that a GET answers, a line each, as they come. Raises Failed when the daemon ends."""
        with self._answer("GET", call, endless=True) as answer:
            for line in answer:
                yield _json(line)
            raise _broken_off()

    def chunks(self, call: str) -> Iterator[bytes]:
        """The bytes of a text that a GET answers, as they come."""
        with self._answer("GET", call, endless=True) as answer:
            while chunk := answer.read1(65536):
                yield chunk

    @contextmanager
    def _answer(
        self,
        method: str,
        call: str,
        body: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        endless: bool = False,
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer to a call, if it is a good one. In the block, an answer that breaks off raises Failed."""
        connection = _UnixConnection(self._path, self._patience)
        try:
            answer = self._ask(connection, method, call, body, headers or {})
            if endless and connection.sock is not None:
                connection.sock.settimeout(None)
            if not self._quiet:
                _warn_of_other_version(answer)
            try:
                if answer.status >= 400:
                    raise _refusal(answer.status, answer.read())
                yield answer
            except (http.client.HTTPException, TimeoutError, ConnectionResetError):
                raise _broken_off() from None
        finally:
            connection.close()

    def _ask(
        self,
        connection: _UnixConnection,
        method: str,
        call: str,
        body: dict[str, Any] | None,
        headers: dict[str, str],
    ) -> http.client.HTTPResponse:
        payload = None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, f"{CONTROL_PREFIX}/{call}", payload, headers)
            return connection.getresponse()
        except PermissionError:
            text = f"You may not use {self._path}: be root, or a member of its group (usually {CONTROL_GROUP})."
            raise Failed(Exit.NOT_ALLOWED, text) from None
        except FileNotFoundError:
            reason = f"llmuxd is not running: there is no {self._path}."
        except ConnectionRefusedError:
            reason = f"llmuxd is not running: nobody answers on {self._path}."
        except (TimeoutError, BlockingIOError):
            text = f"llmuxd has {self._path}, but has not answered for {self._patience:g} s. Its log may say why."
            raise Failed(Exit.UNREACHABLE, text) from None
        except (OSError, http.client.HTTPException) as error:
            reason = f"llmuxd cannot be reached on {self._path}: {error or type(error).__name__}."
        raise Failed(Exit.UNREACHABLE, f"{reason}\n{_HOW_TO_START}")


def failure_of(step: dict[str, Any]) -> Failed | None:
    """What the last step of an operation says that went wrong."""
    if step.get("result") == "ok":
        return None
    return Failed(_exit_of(step.get("status", 500), step), str(step.get("error", "it failed")))


def _refusal(status: int, body: bytes) -> Failed:
    try:
        answer = json.loads(body)
        return Failed(_exit_of(status, answer), str(answer["error"]))
    except (ValueError, KeyError, TypeError):
        return Failed(Exit.FAILED, f"llmuxd answered {status}: {body[:200].decode(errors='replace')}")


def _exit_of(status: int, answer: dict[str, Any]) -> Exit:
    # The 404 of a daemon that does not know the call names no models.
    if status == 404 and "known" in answer:
        return Exit.NO_SUCH_MODEL
    return _EXIT_OF_STATUS.get(status, Exit.FAILED)


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise _broken_off() from None


def _broken_off() -> Failed:
    return Failed(Exit.FAILED, "llmuxd broke off its answer: it has stopped, or was killed.")


def _warn_of_other_version(answer: http.client.HTTPResponse) -> None:
    version = answer.headers.get(VERSION_HEADER)
    if version != __version__:
        print(f"warning: llmuxd is {clean(version or 'unknown')}, llmuxctl is {__version__}", file=sys.stderr)
