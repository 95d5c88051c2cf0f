"""Sends or fetches an image, so that a test can kill it: ACTION ENDPOINT FOLDER [SLOW-SECS-PER-PIECE]."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from llmuxd.config import ObjectStoreConfig
from llmuxd.engine import object_store
from llmuxd.engine.object_store import ObjectStore
from tests.store.conftest import ACCESS, BUCKET, SECRET


def main() -> None:
    action, endpoint, folder, slow = sys.argv[1], sys.argv[2], Path(sys.argv[3]), float(sys.argv[4])
    store = ObjectStore(ObjectStoreConfig(endpoint, BUCKET, ACCESS, SECRET))
    name = "_put" if action == "upload" else "_get"
    right = getattr(store, name)

    def slowly(key, *content, **options):
        done = right(key, *content, **options)
        print(key, flush=True)
        time.sleep(slow)
        return done

    setattr(store, name, slowly)
    object_store.THREADS = 1
    if action == "upload":
        store.upload(folder, "qwen", print, threading.Event())
    else:
        image = store.newest("qwen")
        assert image is not None
        store.download(image, folder, print, threading.Event())


if __name__ == "__main__":
    main()
