"""Run a command where io_uring is refused, and without capabilities: CRIU cannot save a process that uses the former,
and what CRIU needs of the latter is nothing for an engine.

vLLM's event loop (uvloop, by libuv) opens io_uring where it can, whatever its environment says, and does without where
the kernel has none. So this process puts a filter on itself that answers io_uring_setup(2) as a kernel without it, and
becomes the command. It is started as a script, by `llmuxd.engine.spec`, and uses nothing of llmuxd.

A daemon that is not root, and saves engines all the same, has ambient capabilities, and what it starts would have them.

The filter is classic BPF, see seccomp(2) and linux/filter.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_IO_URING_SETUP = 425
"""Its number is the same on every architecture."""
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _FAIL_WITH = 0x7FFF0000, 0x00050000


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def refuse_io_uring() -> None:
    """From now on io_uring_setup(2) fails with ENOSYS in this process and its children. Raises OSError."""
    code = b"".join(
        struct.pack("HBBI", *instruction)
        for instruction in (
            (_LOAD_WORD, 0, 0, 0),
            (_JUMP_IF_EQUAL, 0, 1, _IO_URING_SETUP),
            (_RETURN, 0, 0, _FAIL_WITH | errno.ENOSYS),
            (_RETURN, 0, 0, _ALLOW),
        )
    )
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.addressof(buffer))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program), 0, 0)


def drop_capabilities() -> None:
    """What this process becomes has no capabilities, unless it is root. Raises OSError."""
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)


def _prctl(option: int, *arguments: int) -> None:
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
    if prctl(option, *arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def main() -> None:
    """Become the command that the arguments are."""
    drop_capabilities()
    try:
        refuse_io_uring()
    except OSError as error:
        # The engine serves all the same; it is the saving that will say why it does not work.
        sys.stderr.write(f"io_uring cannot be refused: {error}\n")
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
