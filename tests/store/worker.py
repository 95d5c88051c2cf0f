"""Sends or fetches so many pieces of an image, and waits for a test to kill it: ACTION ENDPOINT FOLDER PIECES."""

from __future__ import annotations

import itertools
import sys
import threading
from pathlib import Path

from llmuxd.config import ObjectStoreConfig
from llmuxd.engine import object_store
from llmuxd.engine.object_store import ObjectStore
from tests.store.conftest import ACCESS, BUCKET, SECRET


def main() -> None:
    action, endpoint, folder, pieces = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    store = ObjectStore(ObjectStoreConfig(endpoint, BUCKET, ACCESS, SECRET))
    name = "_put" if action == "upload" else "_get"
    right = getattr(store, name)
    numbers = itertools.count(1)

    def so_many(key, *content, **options):
        done = right(key, *content, **options)
        print(key, flush=True)
        if "/pieces/" in key and next(numbers) == pieces:
            threading.Event().wait()
        return done

    setattr(store, name, so_many)
    object_store.THREADS = 1
    if action == "upload":
        store.upload(folder, "qwen", print, threading.Event())
    else:
        image = store.newest("qwen")
        assert image is not None
        store.download(image, folder, print, threading.Event())


if __name__ == "__main__":
    main()
