"""Where vLLM and its models are, and the one stack that most of the tests share.

A missing vLLM fails the tests: nothing here may pass by not having run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.real.stack import Stack

MODELS = ("tiny-a", "tiny-b", "big")
SET_UP = "run tests/real/setup-vllm.sh, or `make test-vllm`, first"


def cache_folder() -> Path:
    """What the set-up scripts have made."""
    given = os.environ.get("LLMUX_TEST_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmux-tests"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    """Show with a failure what the daemons said while the test ran."""
    outcome = yield
    report: pytest.TestReport = outcome.get_result()
    if report.failed:
        report.sections += [(f"log {one.log}", said) for one in Stack.made if (said := one.said_since(call.start))]


@pytest.fixture(scope="session")
def vllm() -> Path:
    """The `vllm` command: LLMUX_TEST_VLLM, else the one that setup-vllm.sh has made."""
    path = Path(os.environ.get("LLMUX_TEST_VLLM") or cache_folder() / "vllm-0.32.0" / "bin" / "vllm")
    assert os.access(path, os.X_OK), f"there is no {path}: {SET_UP}"
    return path


@pytest.fixture(scope="session")
def models() -> dict[str, Path]:
    """The models that setup-vllm.sh has made, by name."""
    found = {name: cache_folder() / "models-1" / name for name in MODELS}
    for path in found.values():
        assert (path / "config.json").exists(), f"there is no model {path}: {SET_UP}"
    return found


@pytest.fixture(scope="session")
def warm_stack(
    tmp_path_factory: pytest.TempPathFactory, vllm: Path, models: dict[str, Path]
) -> Iterator[Callable[[], Stack]]:
    """Gives a stack with `warmup = true` that serves: the last one, or, where a test has ended that, a new one.

    Its models are those of `models`, and `broken`, which has no files.
    """
    made: list[Stack] = []

    def give() -> Stack:
        if not made or not made[-1].running:
            configured = {**models, "broken": Path("/nonexistent/model")}
            made.append(Stack(tmp_path_factory.mktemp("stack"), vllm, configured, warmup=True))
            made[-1].start()
            made[-1].wait_for_port()
        return made[-1]

    yield give
    for stack in made:
        stack.kill()


@pytest.fixture
def warm(warm_stack: Callable[[], Stack]) -> Iterator[Stack]:
    """A warm stack in auto mode, every model evicted as the config says."""
    stack = warm_stack()
    yield stack
    if stack.running:
        for model in MODELS:
            stack.ctl("eviction", model, "offload+keep_running")


@pytest.fixture
def client(warm: Stack) -> Iterator[openai.OpenAI]:
    """A client of the warm stack."""
    with warm.client() as made:
        yield made
