"""A real S3 server for the tests. Without it they fail: nothing here may pass by not having run."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from llmuxd.config import ObjectStoreConfig
from llmuxd.engine.object_store import ObjectStore
from tests.ports import free_port

ACCESS, SECRET = "llmux-access", "llmux-very-secret"
BUCKET = "checkpoints"
UP_SECS = 60.0


def _gateway() -> Path:
    given = os.environ.get("LLMUX_TEST_CACHE")
    cache = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmux-tests"
    path = Path(os.environ.get("LLMUX_TEST_JUICEFS") or cache / "store-1" / "bin" / "juicefs")
    assert os.access(path, os.X_OK), f"there is no {path}: run tests/store/setup-store.sh, or `make test-store`, first"
    return path


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStoreConfig]:
    """A server with an empty bucket."""
    folder = tmp_path_factory.mktemp("s3")
    meta = f"sqlite3:///{folder}/meta.db"
    juicefs = str(_gateway())
    made = [juicefs, "format", meta, "llmux", "--storage", "file", "--bucket", f"{folder}/data/"]
    subprocess.run(made, check=True, capture_output=True, timeout=UP_SECS)
    port = free_port()
    env = {**os.environ, "MINIO_ROOT_USER": ACCESS, "MINIO_ROOT_PASSWORD": SECRET}
    served = [juicefs, "gateway", "--multi-buckets", "--no-usage-report", meta, f"127.0.0.1:{port}"]
    with (folder / "gateway.log").open("wb") as log:
        gateway = subprocess.Popen(
            served, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    config = ObjectStoreConfig(f"http://127.0.0.1:{port}", BUCKET, ACCESS, SECRET)
    try:
        _make_bucket(config, gateway, folder / "gateway.log")
        yield config
    finally:
        gateway.terminate()
        try:
            gateway.wait(20)
        except subprocess.TimeoutExpired:
            gateway.kill()
            gateway.wait()


@pytest.fixture
def store(s3: ObjectStoreConfig) -> ObjectStore:
    """Over an empty bucket."""
    client = client_of(s3)
    for entry in client.list_objects_v2(Bucket=BUCKET).get("Contents", ()):
        client.delete_object(Bucket=BUCKET, Key=entry["Key"])
    return ObjectStore(s3)


def client_of(config: ObjectStoreConfig):
    """A client of one's own."""
    return boto3.session.Session().client(
        "s3",
        endpoint_url=config.endpoint,
        region_name=config.region,
        aws_access_key_id=config.access_key,
        aws_secret_access_key=config.secret_key,
    )


def _make_bucket(config: ObjectStoreConfig, gateway: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + UP_SECS
    while True:
        try:
            client_of(config).create_bucket(Bucket=config.bucket)
            return
        except Exception as error:
            if gateway.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"no S3 server within {UP_SECS:g} s: {log.read_text()}") from error
            time.sleep(0.1)
