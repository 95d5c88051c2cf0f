"""Taking configuration files in, one after the other, and checking each value against the table of keys.

What concerns several keys at once is in `checks`; files are opened in `load`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from llmuxd.config import kinds, schema
from llmuxd.config.errors import Problem, quoted, shown
from llmuxd.config.schema import TABLES, Key, nearest, tables_in


class Reading:
    """One reading of a configuration: the values found, where each came from, and what is wrong.

    A path is that of one key, `models.llama.port`; a pattern is that of the table of keys, `models.*.port`.
    """

    def __init__(self, problems: list[Problem] | None = None) -> None:
        self.problems: list[Problem] = [] if problems is None else problems
        self.models: dict[str, None] = {}
        self._values: dict[str, Any] = {}
        self._sources: dict[str, str] = {}
        self._tables: dict[str, tuple[str, str]] = {}
        self._arrays: dict[str, list[tuple[str, Reading]]] = {}

    def merge(self, data: Mapping[str, Any], source: str) -> None:
        """Take in one file."""
        self._take_table(data, "", "", source)

    def require(self) -> None:
        """Find what is missing, once all files are in: a table may be spread over several."""
        for path, (pattern, source) in self._tables.items():
            for name, key in TABLES.get(pattern, {}).items():
                if key.required and f"{path}.{name}" not in self._sources:
                    self.wrong(f"{path}.{name}", f"is missing; allowed: {key.allowed}", source)
        for _, entry in (each for entries in self._arrays.values() for each in entries):
            entry.require()

    def section(self, path: str, kind: type) -> dict[str, Any]:
        """The right values of one table, by the field names of the class that holds them."""
        prefix = f"{path}." if path else ""
        names = [field.name for field in fields(kind)]
        return {name: self._values[prefix + name] for name in names if prefix + name in self._values}

    def entries(self, path: str) -> list[tuple[str, Reading]]:
        """The tables of an array, over all files: each with its path in its file, and a reading of its own.

        Every file counts them from 0, so their paths are not unique; and none is spread over several files.
        """
        return self._arrays.get(path, [])

    def source(self, path: str) -> str:
        """The file that sets this key."""
        return self._sources[path]

    def given(self, path: str) -> bool:
        """Whether some file sets this key."""
        return path in self._sources

    def failed(self, path: str) -> bool:
        """Whether some file sets this key to what it may not be: an error says so already."""
        return path in self._sources and path not in self._values

    def wrong(self, path: str, text: str, source: str = "") -> None:
        """Note a problem of a key, in the file that sets it if no other is named."""
        self.problems.append(Problem(source or self._sources[path], path, text))

    def _take_table(self, data: Mapping[str, Any], path: str, pattern: str, source: str) -> None:
        keys = TABLES.get(pattern, {})
        inner = tables_in(pattern)
        for name, value in data.items():
            at = f"{path}.{quoted(name)}" if path else quoted(name)
            if value is None:
                # JSON's null is how llmux 0.7 writes what is not set.
                if name not in keys and name not in inner:
                    self._unknown(name, pattern, at, source, [*keys, *inner])
            elif name in inner:
                self._take_inner(value, at, f"{pattern}.{name}" if pattern else name, source)
            elif name in keys:
                self._take_value(keys[name], value, at, source)
            else:
                self._unknown(name, pattern, at, source, [*keys, *inner])

    def _take_inner(self, value: Any, path: str, pattern: str, source: str) -> None:
        if f"{pattern}[]" in TABLES:
            self._take_array(value, path, f"{pattern}[]", source)
            return
        if not isinstance(value, dict):
            self.wrong(path, f"found {shown(value)}; allowed: a table", source)
            return
        if pattern == "models":
            for name, model in value.items():
                self._take_model(name, model, f"{path}.{quoted(name)}", source)
            return
        self._tables.setdefault(path, (pattern, source))
        self._take_table(value, path, pattern, source)

    def _take_model(self, name: str, value: Any, path: str, source: str) -> None:
        try:
            kinds.NAME.read(name)
        except kinds.Wrong:
            self.wrong(path, f"found {shown(name)} for a model's name; allowed: {kinds.NAME.allowed}", source)
            return
        self.models[name] = None
        self._take_inner(value, path, "models.*", source)

    def _take_array(self, value: Any, path: str, pattern: str, source: str) -> None:
        # What is found is not shown: it may hold a secret.
        if not isinstance(value, list):
            found = "a single table" if isinstance(value, dict) else f"a value of the type {type(value).__name__}"
            self.wrong(path, f"found {found}; allowed: an array of tables, {_place(pattern)} above each", source)
            return
        for number, table in enumerate(value):
            at = f"{path}[{number}]"
            if not isinstance(table, dict):
                self.wrong(at, f"found a value of the type {type(table).__name__}; allowed: a table", source)
                continue
            entry = Reading(self.problems)
            entry._take_inner(table, at, pattern, source)
            self._arrays.setdefault(path, []).append((at, entry))

    def _take_value(self, key: Key, value: Any, path: str, source: str) -> None:
        if path in self._sources:
            self.wrong(path, f"is set in {self._sources[path]} already", source)
            return
        self._sources[path] = source
        try:
            self._values[path] = key.kind.read(value)
        except kinds.Wrong as wrong:
            found = str(wrong) or ('"***"' if key.secret else shown(value))
            self.wrong(path, f"found {found}; allowed: {key.allowed}", source)

    def _unknown(self, name: str, pattern: str, path: str, source: str, known: Collection[str]) -> None:
        if f"{pattern}.{name}" in schema.NOT_YET:
            self.wrong(path, "is not supported yet", source)
            return
        homes = schema.homes_of(name)
        meant = nearest(name, known)
        if homes:
            # Under the wrong header, most likely.
            hint = f"it belongs {' or '.join(map(_way_to, homes))}"
        elif meant:
            hint = f"did you mean {meant!r}?"
        else:
            hint = f"allowed: {', '.join(sorted(known))}"
        self.wrong(path, f"unknown key; {hint}", source)


def _way_to(table: str) -> str:
    return f"into {_place(table)}" if table else "to the top, before the first [table]"


def _place(table: str) -> str:
    """A table's header."""
    name = table.replace("*", "NAME")
    return f"[[{name.removesuffix('[]')}]]" if name.endswith("[]") else f"[{name}]"
