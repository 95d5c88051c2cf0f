"""The core decides and does nothing else: what it imports shows that."""

from __future__ import annotations

import ast
from pathlib import Path

import llmuxd.core

ALLOWED = {"__future__", "bisect", "collections.abc", "dataclasses", "enum", "heapq", "math", "typing"}


def test_the_core_imports_nothing_that_could_act_wait_or_look():
    files = list(Path(llmuxd.core.__file__).parent.rglob("*.py"))
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
                names = [str(node.module)]
            for name in names:
                assert name in ALLOWED or name.startswith("llmuxd.core"), f"{file.name} imports {name}"
