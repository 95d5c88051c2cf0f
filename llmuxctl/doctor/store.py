"""The check of the object store that the config names: one list is asked for, with the daemon's keys."""

from __future__ import annotations

from dataclasses import replace

from llmuxctl.doctor.finding import Finding, fail, ok, skipped
from llmuxctl.doctor.situation import Situation

_ADVICE = "See docs/checkpoints.md. Until it works, images are neither sent nor fetched, and the local ones count."
_ANY_MODEL = "doctor"
"""Whose images are asked for if the config has no models."""


def object_store(there: Situation) -> Finding:
    """Whether the store answers, and lets these keys in.

    Takes some 15 seconds if nobody answers, and 90 if somebody does and says nothing.
    """
    from llmuxd.config.secrets import CREDENTIALS_ENV, SecretMissing, access_of
    from llmuxd.engine.object_store import ObjectStore, StoreError

    store = None if there.config is None else there.config.checkpoint.object_store
    if there.config is None or store is None:
        return skipped("not in the config")
    where = f"{store.bucket} at {store.endpoint}"
    try:
        access, secret = access_of(store, there.environ)
    except SecretMissing as missing:
        files = [path for path in (store.access_key_file, store.secret_key_file) if path is not None]
        credentials = any(path.name == str(path) for path in files)
        if there.box.uid != 0 or (credentials and CREDENTIALS_ENV not in there.environ):
            return skipped(f"{where}: {missing}; as root, and while the daemon runs, doctor also asks the store")
        return fail(f"{where}: {missing}", _ADVICE)
    known = replace(store, access_key=access, secret_key=secret, access_key_file=None, secret_key_file=None)
    try:
        ObjectStore(known).newest(next(iter(there.config.models), _ANY_MODEL))
    except StoreError as error:
        return fail(f"{store.bucket}: {error}", _ADVICE)
    return ok(f"{where} lets the daemon in")
