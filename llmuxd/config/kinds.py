"""The kinds of values that keys have: of what type, in what unit, what is allowed, and how one is read.

Which key has which kind is in `schema`; what concerns several keys at once is in `checks`.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmuxd.config.errors import shown
from llmuxd.core.eviction import AUTO, Auto, EvictionPolicy, ProcessStrategy, WeightStrategy
from llmuxd.core.settings import InFlight


class Wrong(Exception):
    """A value is not what its kind allows. The text, if there is one, is shown in place of the value."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of value. `read` makes of what a file holds what the program uses, or raises Wrong."""

    type: str
    allowed: str
    read: Callable[[Any], Any]
    unit: str = ""


def _string(value: Any) -> str:
    if not isinstance(value, str) or not value or not _passable(value):
        raise Wrong
    return value


def _group(value: Any) -> str:
    return value if value == "" else _string(value)


def _passable(text: str) -> bool:
    """Whether an argument, a path or a variable can hold it. JSON can spell half a character."""
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)


def _name(value: Any) -> str:
    """A model's name: `vllm serve` takes it as an argument, and it is printed wherever the model is named."""
    name = _string(value)
    if not name.isprintable() or name.startswith("-"):
        raise Wrong
    return name


def _argument(value: Any) -> str:
    text = _string(value)
    if text.startswith("-"):
        raise Wrong
    return text


def _key_name(value: Any) -> str:
    """The name of a client's key: a word of its own in every line of the access log, where `-` is nobody."""
    name = _name(value)
    if " " in name:
        raise Wrong
    return name


def _sha256(value: Any) -> str:
    """64 hexadecimal digits, in lower case. What else stands there may be the key itself, and is not shown."""
    if not isinstance(value, str):
        raise Wrong(f"a value of the type {type(value).__name__}")
    if not re.fullmatch(r"[0-9a-fA-F]{64}", value):
        raise Wrong(f"a string of {len(value)} characters")
    return value.lower()


def _some_names(value: Any) -> tuple[str, ...]:
    names = _strings(_name)(value)
    if not names:
        raise Wrong
    return names


_ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[a-z0-9][a-z0-9._-]*|\[[0-9a-f:.]+\])(:(?P<port>[0-9]{1,5}))?"
)
_PORT_OF = {"http": 80, "https": 443}


def _origin(value: Any) -> str:
    """An origin as browsers spell it: in lower case, without the port that its scheme has anyway."""
    text = _string(value)
    found = _ORIGIN.fullmatch(text.lower()) if text.isascii() else None
    if text == "*":
        return text
    if found is None:
        raise Wrong
    scheme, host, port = found["scheme"], found["host"], int(found["port"] or 0)
    if found["port"] is not None and not 1 <= port <= 65535:
        raise Wrong
    return f"{scheme}://{host}" if port in (0, _PORT_OF.get(scheme)) else f"{scheme}://{host}:{port}"


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Wrong
    return value


def _integer(low: int, high: float = math.inf) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise Wrong
        return value

    return read


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Wrong
    try:
        number = float(value)
    except OverflowError:
        raise Wrong from None
    if not math.isfinite(number) or number < 0:
        raise Wrong
    return number


def _positive(value: Any) -> float:
    number = _number(value)
    if number == 0:
        raise Wrong
    return number


def _strings(read: Callable[[Any], str]) -> Callable[[Any], tuple[str, ...]]:
    def read_all(value: Any) -> tuple[str, ...]:
        if not isinstance(value, list):
            raise Wrong
        return tuple(read(item) for item in value)

    return read_all


def _command(value: Any) -> tuple[str, ...]:
    words = (_string(value),) if isinstance(value, str) else _strings(_string)(value)
    if not words:
        raise Wrong
    return words


def _environment(value: Any) -> Mapping[str, str]:
    # Values are not shown: tokens are passed to engines in this way.
    if not isinstance(value, dict):
        raise Wrong(f"a value of the type {type(value).__name__}")
    for name, text in value.items():
        if not name or "=" in name or not _passable(name):
            raise Wrong(f"the name {shown(name)}")
        if not isinstance(text, str):
            raise Wrong(f"{shown(name)} with a value of the type {type(text).__name__}")
        if not _passable(text):
            raise Wrong(f"{shown(name)} with a value that no variable can hold")
    return dict(value)


def _path(value: Any) -> Path:
    return Path(_string(value))


def _absolute(value: Any) -> Path:
    path = _path(value)
    if not path.is_absolute():
        raise Wrong
    return path


def _address(value: Any) -> str:
    address = _string(value)
    try:
        ipaddress.ip_address(address)
    except ValueError:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", address):
            raise Wrong from None
    return address


def _eviction(value: Any) -> EvictionPolicy | Auto:
    """`weights+process`, or llmux 0.7's table, which needs both; or `auto`."""
    try:
        if value == AUTO.value:
            return AUTO
        if isinstance(value, str):
            return EvictionPolicy.parse(value)
        if isinstance(value, dict) and value.keys() == {"weights", "process"}:
            return EvictionPolicy(WeightStrategy(value["weights"]), ProcessStrategy(value["process"]))
    except ValueError:
        pass
    raise Wrong


def _in_flight(value: Any) -> InFlight:
    if value not in (InFlight.DRAIN.value, InFlight.PARK.value):
        raise Wrong
    return InFlight(value)


_WEIGHTS = ", ".join(strategy.value for strategy in WeightStrategy)
_PROCESS = ", ".join(strategy.value for strategy in ProcessStrategy)

TEXT = Kind("string", "a string that is not empty", _string)
GROUP = Kind("string", "the name of a group, or an empty string", _group)
NAME = Kind("string", "a printable name that is not empty and does not begin with '-'", _name)
NAMES = Kind("list of strings", "a list of printable names that do not begin with '-'", _strings(_name))
KEY_NAME = Kind("string", "a printable name without spaces that does not begin with '-'", _key_name)
SHA256 = Kind("string", "the SHA-256 of a key, 64 hexadecimal digits; `llmuxctl key new NAME` makes both", _sha256)
SOME_NAMES = Kind("list of strings", "a list of names or aliases of models, at least one", _some_names)
ORIGINS = Kind(
    "list of strings", 'a list of origins, each SCHEME://HOST or SCHEME://HOST:PORT, or "*" for all', _strings(_origin)
)
ARGUMENT = Kind("string", "a string that is not empty and does not begin with '-'", _argument)
TEXTS = Kind("list of strings", "a list of strings that are not empty", _strings(_string))
COMMAND = Kind(
    "string or list of strings", "a program, or a list of a program and its first arguments, all strings", _command
)
ENVIRONMENT = Kind("table of strings", "a table of strings, its names without '='", _environment)
BOOLEAN = Kind("boolean", "true or false", _boolean)
PATH = Kind("string", "a path", _path)
ABSOLUTE_PATH = Kind("string", "an absolute path", _absolute)
ADDRESS = Kind("string", "an IP address or a host name, without a port", _address)
PORT = Kind("integer", "a port, 1 to 65535", _integer(1, 65535))
PORT_OR_0 = Kind("integer", "a port, 0 to 65535", _integer(0, 65535))
REQUESTS = Kind("integer", "a whole number, 1 or more", _integer(1), "requests")
CONNECTIONS = Kind("integer", "a whole number, 1 or more", _integer(1), "connections")
PRIORITY = Kind("integer", "a whole number, -100 to 100", _integer(-100, 100))
BYTES = Kind("integer", "a whole number of bytes, 1 or more", _integer(1), "bytes")
SECONDS = Kind("number", "a number of seconds, 0 or more", _number, "seconds")
SECONDS_ABOVE_0 = Kind("number", "a number of seconds above 0", _positive, "seconds")
MILLISECONDS = Kind("integer", "a whole number of milliseconds, 0 or more", _integer(0), "milliseconds")
MILLISECONDS_ABOVE_0 = Kind("integer", "a whole number of milliseconds, 1 or more", _integer(1), "milliseconds")
FACTOR_ABOVE_0 = Kind("number", "a number above 0", _positive)
FACTOR = Kind("number", "a number, 0 or more", _number)
IN_FLIGHT = Kind("string", "drain or park", _in_flight)
EVICTION = Kind(
    "string or table",
    '"auto", "WEIGHTS+PROCESS" or a table of weights and process, '
    f"weights one of {_WEIGHTS}, process one of {_PROCESS}",
    _eviction,
)
