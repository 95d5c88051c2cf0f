"""The secrets of the object store: from the config itself, from files, or from systemd's credentials."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from llmuxd.config.types import ObjectStoreConfig

CREDENTIALS_ENV = "CREDENTIALS_DIRECTORY"
"""Where systemd puts what LoadCredential= and SetCredentialEncrypted= name."""


class SecretMissing(Exception):
    """A secret cannot be read, or cannot be one; the text says where it stands, and has nothing of it."""


def access_of(config: ObjectStoreConfig, environ: Mapping[str, str] | None = None) -> tuple[str, str]:
    """The access key and the secret key. Read each time: they may be changed without a restart.

    Raises SecretMissing.
    """
    environ = os.environ if environ is None else environ
    access = _read(config.access_key_file, config.access_key, environ)
    return access, _read(config.secret_key_file, config.secret_key, environ)


def _read(path: Path | None, given: str, environ: Mapping[str, str]) -> str:
    """The content of a file, which goes before what the config says; one that is named without a folder is a credential
    of systemd's, if there are any."""
    if path is None:
        return _checked(given, "the one in the config")
    folder = environ.get(CREDENTIALS_ENV)
    where = Path(folder) / path if folder and path.name == str(path) else path
    try:
        return _checked(where.read_text().strip(), str(where))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise SecretMissing(f"{where} cannot be read: {reason}") from error


def _checked(secret: str, where: str) -> str:
    """A key is one printable line. A header would not take another, and its error would have all of it, in quotes."""
    if not secret or not secret.isprintable():
        raise SecretMissing(f"{where} is not one line of text; it is to be the key and nothing else")
    return secret
