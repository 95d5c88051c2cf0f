"""`llmuxctl doctor` over a real store: it lets the daemon in, or says why not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llmuxctl.doctor.box import Box
from llmuxctl.doctor.finding import Status
from llmuxctl.doctor.situation import Situation
from llmuxctl.doctor.store import object_store
from llmuxd.config import ObjectStoreConfig, parse_config
from tests.store.conftest import SECRET


def there(tmp_path: Path, store: ObjectStoreConfig) -> Situation:
    config = parse_config({}, environ={})
    config = replace(config, checkpoint=replace(config.checkpoint, object_store=store))
    return Situation(Box(tmp_path, {}, 0), "/none", Path("/none"), config)


def test_the_keys_of_the_config_and_those_of_files_are_let_in(s3: ObjectStoreConfig, tmp_path: Path) -> None:
    assert object_store(there(tmp_path, s3)).status is Status.OK
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    from_file = replace(s3, secret_key="", secret_key_file=tmp_path / "secret")
    found = object_store(there(tmp_path, from_file))
    assert (found.status, found.found) == (Status.OK, f"{s3.bucket} at {s3.endpoint} lets the daemon in")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"secret_key": "another-secret"}, "SignatureDoesNotMatch"),
        ({"bucket": "nowhere"}, "NoSuchBucket"),
        ({"endpoint": "http://127.0.0.1:1"}, "Could not connect"),
    ],
)
def test_a_refusal_says_why_and_no_secret(
    s3: ObjectStoreConfig, tmp_path: Path, changed: dict[str, str], says: str
) -> None:
    found = object_store(there(tmp_path, replace(s3, **changed)))
    assert found.status is Status.FAIL
    assert says in found.found
    assert "docs/checkpoints.md" in found.advice
    assert "secret" not in found.found
