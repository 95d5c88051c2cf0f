"""`llmuxctl doctor` and the keys of the object store. What the store says to them is tested with a real one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmuxctl.doctor.box import Box
from llmuxctl.doctor.finding import Status
from llmuxctl.doctor.situation import Situation
from llmuxctl.doctor.store import object_store
from llmuxd.config import parse_config
from llmuxd.config.secrets import CREDENTIALS_ENV


def _there(root: Path, uid: int, environ: dict[str, str] | None = None, **keys: str) -> Situation:
    data: dict[str, Any] = {}
    if keys:
        store = {"endpoint": "http://127.0.0.1:1", "bucket": "b", **keys}
        data = {"checkpoint": {"object_store": store}}
    config = parse_config(data, environ={})
    return Situation(Box(root, {}, uid), "/none", Path("/none"), config, environ=environ or {})


def test_there_need_not_be_one(tmp_path: Path) -> None:
    there = _there(tmp_path, 0)
    assert object_store(there).status is Status.SKIPPED
    assert object_store(replace(there, config=None)).status is Status.SKIPPED


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "access"
    found = object_store(_there(tmp_path, 0, access_key_file=str(missing), secret_key="very-secret"))
    assert found.status is Status.FAIL
    assert f"{missing} cannot be read" in found.found
    assert "very-secret" not in found.found + found.advice


@pytest.mark.parametrize(("uid", "name"), [(1000, "secret"), (0, "llmux-no-such-credential")])
def test_what_only_root_or_the_daemon_may_read_is_no_failure(tmp_path: Path, uid: int, name: str) -> None:
    path = name if uid == 0 else str(tmp_path / name)
    found = object_store(_there(tmp_path, uid, access_key="a", secret_key_file=path))
    assert found.status is Status.SKIPPED
    assert "as root, and while the daemon runs" in found.found


def test_credentials_are_those_of_the_daemon(tmp_path: Path) -> None:
    environ = {CREDENTIALS_ENV: str(tmp_path)}
    there = _there(tmp_path, 0, environ, access_key="a", secret_key_file="llmux-secret")
    assert f"{tmp_path}/llmux-secret cannot be read" in object_store(there).found
    (tmp_path / "llmux-secret").write_text("very-secret\n")
    found = object_store(there)
    assert found.status is Status.FAIL, "nothing listens there, or there is no boto3"
    assert "cannot be read" not in found.found
    assert "very-secret" not in found.found
