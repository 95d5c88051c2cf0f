"""Where CRIU and vLLM are. Whatever is missing fails the tests: nothing here may pass by not having run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.real.conftest import cache_folder, models, pytest_runtest_makereport, vllm

__all__ = ["models", "pytest_runtest_makereport", "vllm"]


@pytest.fixture(scope="session")
def criu() -> Path:
    """The `criu` command: LLMUX_TEST_CRIU, else the one that setup-criu.sh has made."""
    path = Path(os.environ.get("LLMUX_TEST_CRIU") or cache_folder() / "criu-1" / "criu")
    assert os.access(path, os.X_OK), f"there is no {path}: run tests/criu/setup-criu.sh, or `make test-criu`, first"
    return path
