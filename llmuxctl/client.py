"""HTTP over the control socket, and what each way of failing means to the one who typed the command."""

from __future__ import annotations

import http.client
import json
import socket
import sys
from collections.abc import Iterator
from typing import Any

from llmuxd.protocol import NDJSON, VERSION_HEADER, Exit
from llmuxd.version import __version__


class Failed(Exception):
    """The command did not succeed; the text is for the terminal."""

    def __init__(self, exit_code: Exit, text: str) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


_HOW_TO_START = (
    "Start it with `systemctl start llmuxd`, or `llmuxd --config FILE`; to try it out: `llmuxd --demo`.\n"
    "If it runs with another socket, name it: --socket PATH or LLMUX_CONTROL_SOCKET."
)

_EXIT_OF_STATUS = {403: Exit.NOT_ALLOWED, 404: Exit.NO_SUCH_MODEL}


class Client:
    """Calls to one daemon. Every method raises Failed."""

    def __init__(self, path: str) -> None:
        self._path = path

    def get(self, call: str) -> Any:
        """The JSON that a GET answers."""
        return json.loads(self._answer("GET", call).read())

    def post(self, call: str, **body: Any) -> Any:
        """The JSON that a POST answers."""
        return json.loads(self._answer("POST", call, body).read())

    def steps(self, call: str, **body: Any) -> Iterator[dict[str, Any]]:
        """The steps of a long operation; the last one has `result`. A failed one is yielded, too."""
        answer = self._answer("POST", call, body, {"Accept": NDJSON})
        for line in self._lines(answer):
            yield json.loads(line)

    def chunks(self, call: str) -> Iterator[bytes]:
        """The bytes of a text that a GET answers, as they come."""
        answer = self._answer("GET", call)
        while chunk := answer.read1(65536):
            yield chunk

    def _lines(self, answer: http.client.HTTPResponse) -> Iterator[bytes]:
        ended = False
        try:
            for line in answer:
                ended = b'"result"' in line
                yield line
        except (http.client.HTTPException, OSError):
            ended = False
        if not ended:
            raise Failed(Exit.FAILED, "The daemon went away before the operation was done.")

    def _answer(
        self, method: str, call: str, body: dict[str, Any] | None = None, headers: dict[str, str] | None = None
    ) -> http.client.HTTPResponse:
        connection = _UnixConnection(self._path)
        payload = None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, f"/control/{call}", payload, headers or {})
            answer = connection.getresponse()
        except PermissionError:
            text = f"You may not use {self._path}: be root, or a member of the socket's group (usually llmux)."
            raise Failed(Exit.NOT_ALLOWED, text) from None
        except FileNotFoundError:
            raise Failed(Exit.UNREACHABLE, f"llmuxd is not running: no {self._path}.\n{_HOW_TO_START}") from None
        except ConnectionRefusedError:
            text = f"llmuxd is not running: nobody answers on {self._path}.\n{_HOW_TO_START}"
            raise Failed(Exit.UNREACHABLE, text) from None
        except (OSError, http.client.HTTPException) as error:
            text = f"llmuxd cannot be reached on {self._path}: {error or type(error).__name__}.\n{_HOW_TO_START}"
            raise Failed(Exit.UNREACHABLE, text) from None
        version = answer.headers.get(VERSION_HEADER)
        if version != __version__:
            print(f"warning: llmuxd is {version or 'unknown'}, llmuxctl is {__version__}", file=sys.stderr)
        if answer.status >= 400:
            raise Failed(_EXIT_OF_STATUS.get(answer.status, Exit.FAILED), _reason(answer))
        return answer


def exit_of(step: dict[str, Any]) -> Exit:
    """The exit code for the last step of an operation."""
    if step.get("result") == "ok":
        return Exit.DONE
    return _EXIT_OF_STATUS.get(step.get("status", 500), Exit.FAILED)


def _reason(answer: http.client.HTTPResponse) -> str:
    text = answer.read().decode(errors="replace")
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return f"llmuxd answered {answer.status} {answer.reason}: {text[:200]}"
