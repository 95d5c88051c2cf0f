"""How bytes are made wrong at random: inserted, deleted, doubled, changed, swapped, cut into segments.

hypothesis chooses, so that what fails is made small again. With the same seed in every run; LLMUX_FUZZ_EXAMPLES=10000
tries other ones, and more.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]

_EXAMPLES = os.environ.get("LLMUX_FUZZ_EXAMPLES")


def bounded(examples: int) -> Any:
    """How long to go on: so many examples, always the same, if nothing else is said."""
    return settings(
        max_examples=int(_EXAMPLES) if _EXAMPLES else examples,
        derandomize=not _EXAMPLES,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )


PIECES = [
    b"\r\n", b"\r\n\r\n", b"\r", b"\n", b"\x00", b" ", b"\t", b"\x0b", b"\x7f", b"\xff", b"\xc3\xa9", b":", b";", b",", b"0", b"1",
    b"-", b"+", b"0x", b"_", b"%2e", b"%2f", b"/", b"//", b"/..", b"..;", b"\\", b"?", b"#", b"*", b"http://h", b"\"",
    b"chunked", b"0\r\n\r\n", b"5\r\nabcde\r\n", b"f" * 16, b" HTTP/1.1", b"HTTP/1.0", b"HEAD", b"CONNECT",
    b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip\r\n",
    b"Connection: close\r\n", b"Connection: upgrade\r\n", b"Upgrade: websocket\r\n", b"Expect: 100-continue\r\n",
    b"Host: i\r\n", b"X : y\r\n", b" folded\r\n", b"x-llmux-wait: 0\r\n", b"model-override: b\r\n", b"Content-Encoding: gzip\r\n",
    b"data: x\n\n", b"EngineCore encountered an issue", b"\"error\"", b"HTTP/1.1 103 x\r\n\r\n",
]  # fmt: skip


def _insert(draw: Draw, data: bytes, at: int) -> bytes:
    return data[:at] + draw(st.sampled_from(PIECES)) + data[at:]


def _delete(draw: Draw, data: bytes, at: int) -> bytes:
    return data[:at] + data[at + draw(st.integers(1, 12)) :]


def _double(draw: Draw, data: bytes, at: int) -> bytes:
    return data[:at] + data[at : at + draw(st.integers(1, 60))] + data[at:]


def _change(draw: Draw, data: bytes, at: int) -> bytes:
    return data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]


def _flip_case(draw: Draw, data: bytes, at: int) -> bytes:
    end = at + draw(st.integers(1, 20))
    return data[:at] + data[at:end].swapcase() + data[end:]


def _swap_lines(draw: Draw, data: bytes, at: int) -> bytes:
    lines = data.split(b"\r\n")
    one, other = at % len(lines), draw(st.integers(0, len(lines) - 1))
    lines[one], lines[other] = lines[other], lines[one]
    return b"\r\n".join(lines)


def _move_line(draw: Draw, data: bytes, at: int) -> bytes:
    lines = data.split(b"\r\n")
    lines.insert(draw(st.integers(0, len(lines))), lines[at % len(lines)])
    return b"\r\n".join(lines)


_WAYS = [_insert, _insert, _delete, _double, _change, _flip_case, _swap_lines, _move_line]


def made_wrong(draw: Draw, data: bytes, most: int = 3) -> bytes:
    """These bytes, changed in up to so many places."""
    for _ in range(draw(st.integers(0, most))):
        way = draw(st.sampled_from(_WAYS))
        data = way(draw, data, draw(st.integers(0, len(data))))
    return data


def in_segments(draw: Draw, data: bytes) -> list[bytes]:
    """Cut at random: mostly nowhere or in a few places, now and then everywhere."""
    if draw(st.integers(0, 19)) == 19 and 0 < len(data) < 600:
        return [bytes([byte]) for byte in data]
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=4)))
    return [data[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
