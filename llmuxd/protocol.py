"""The names that `llmuxd` and `llmuxctl` share: control paths, exit codes, defaults.

Stdlib only and quick to import, since `llmuxctl` loads it on every call. The handlers are in
`llmuxd.control`, the commands in `llmuxctl`.
"""

from __future__ import annotations

import os
from enum import IntEnum

DEFAULT_CONFIG_PATH = "/etc/llmux/llmux.toml"
DEFAULT_RUNTIME_DIR = "/run/llmux"
DEFAULT_STATE_DIR = "/var/lib/llmux"
RUNTIME_DIR_ENV = "LLMUX_RUNTIME_DIR"
STATE_DIR_ENV = "LLMUX_STATE_DIR"
CONTROL_SOCKET_NAME = "control.sock"
CONTROL_SOCKET_ENV = "LLMUX_CONTROL_SOCKET"
CONTROL_GROUP = "llmux"
"""The group whose members may steer the daemon."""

CONTROL_PREFIX = "/control"
VERSION_HEADER = "x-llmux-version"
NDJSON = "application/x-ndjson"


class Exit(IntEnum):
    """Exit codes of `llmuxctl`."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    NO_SUCH_MODEL = 4
    NOT_ALLOWED = 5


def runtime_dir() -> str:
    """The folder of sockets and other files that live as long as the daemon."""
    return os.environ.get(RUNTIME_DIR_ENV) or DEFAULT_RUNTIME_DIR


def state_dir() -> str:
    """The folder of what outlives the daemon: logs of engines and the state file."""
    return os.environ.get(STATE_DIR_ENV) or DEFAULT_STATE_DIR


def default_control_socket() -> str:
    """Where the control socket is when the config does not say."""
    return os.path.join(runtime_dir(), CONTROL_SOCKET_NAME)
