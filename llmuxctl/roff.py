"""Man pages as roff: what has to be escaped, and the few macros that the pages need. Their content is in `man`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_ESCAPES = {
    "\\": "\\e",
    # As typed, not as typeset: people copy options, quotes and paths out of a man page.
    "-": "\\-",
    "'": "\\(aq",
    "`": "\\(ga",
    "^": "\\(ha",
    "~": "\\(ti",
    '"': "\\(dq",
}


def escape(text: str) -> str:
    """Text that is shown as it is. Only within a line: `line` takes care of its beginning."""
    return "".join(_ESCAPES.get(c, c if c.isascii() else f"\\[u{ord(c):04X}]") for c in text)


def inline(text: str) -> str:
    """Text in which `this` is bold."""
    parts = re.split(r"`([^`]+)`", text)
    return "".join(f"\\fB{escape(part)}\\fR" if i % 2 else escape(part) for i, part in enumerate(parts))


def bold(text: str) -> str:
    return f"\\fB{escape(text)}\\fR"


def italic(text: str) -> str:
    return f"\\fI{escape(text)}\\fR"


def _line(roff: str) -> str:
    """A line of text, which must not be taken for a macro."""
    return f"\\&{roff}" if roff.startswith((".", "'")) else roff


@dataclass
class Page:
    """A page that is being written, from top to bottom."""

    title: str
    section: int
    date: str
    source: str
    about: str
    _lines: list[str] = field(default_factory=list)

    @property
    def file(self) -> str:
        return f"{self.title}.{self.section}"

    def heading(self, text: str) -> None:
        self._lines.append(f".SH {escape(text)}")

    def subheading(self, text: str) -> None:
        self._lines.append(f".SS {escape(text)}")

    def raw(self, roff: str) -> None:
        """A line that is roff already."""
        self._lines.append(_line(roff))

    def text(self, *paragraphs: str) -> None:
        """Paragraphs, in which `this` is bold."""
        for paragraph in paragraphs:
            self._lines += [".PP", _line(inline(paragraph))]

    def item(self, tag: str, *paragraphs: str) -> None:
        """A term, which is roff already, and below it what it means."""
        self._lines += [".TP", _line(tag)]
        for i, paragraph in enumerate(paragraphs):
            self._lines += ([] if i == 0 else [".IP"]) + [_line(inline(paragraph))]

    def example(self, lines: Iterable[str]) -> None:
        """Lines as they are typed."""
        self._lines += [".PP", ".RS 4", ".nf", *(_line(escape(line)) for line in lines), ".fi", ".RE"]

    def see_also(self, *pages: str) -> None:
        self.heading("SEE ALSO")
        shown = [re.sub(r"^(.*)\((\d)\)$", lambda m: f"{bold(m[1])}({m[2]})", page) for page in pages]
        self.raw(", ".join(shown))

    def __str__(self) -> str:
        head = [
            ".\\\" Made by `python3 -m llmuxctl.man` from the program's own tables.",
            f'.TH {escape(self.title.upper())} {self.section} {escape(self.date)} "{escape(self.source)}" "llmux"',
            ".nh",
            ".ad l",
            ".SH NAME",
            f"{escape(self.title)} \\- {escape(self.about)}",
        ]
        return "\n".join([*head, *self._lines]) + "\n"
