"""One daemon for all tests of a run, and the clients of it. Each test leaves it as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before litellm is imported: it would fetch a list of prices, and greet, from elsewhere.
os.environ.update(LITELLM_LOCAL_MODEL_COST_MAP="True", LITELLM_TELEMETRY="False")

import anthropic
import openai
import pytest

from tests.clients.stack import MODELS, Stack, running


def pytest_configure(config: pytest.Config) -> None:
    """What litellm's types, and OpenAI's methods that it has given up, warn about is not ours."""
    config.addinivalue_line("filterwarnings", "ignore:.*`ReadOnly` qualifier:UserWarning")
    config.addinivalue_line("filterwarnings", "ignore:deprecated:DeprecationWarning:tests.clients")


@pytest.fixture(scope="session")
def shared_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(tmp_path_factory.mktemp("clients")) as stack:
        yield stack
        assert stack.intruded() == [], "nothing reaches a development endpoint"


@pytest.fixture
def stack(shared_stack: Stack) -> Iterator[Stack]:
    """The daemon, for tests that break nothing."""
    yield shared_stack
    assert shared_stack.process.poll() is None


@pytest.fixture
def broken(stack: Stack) -> Iterator[Stack]:
    """The same, for tests that let something go wrong."""
    yield stack
    stack.recover()


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    """Each model: one test after the other has to switch."""
    return str(request.param)


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with stack.openai() as made:
        yield made


@pytest.fixture
def claude(stack: Stack) -> Iterator[anthropic.Anthropic]:
    with stack.anthropic() as made:
        yield made
