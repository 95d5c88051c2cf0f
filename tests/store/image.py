"""An image that was never a process: as the object store sees one, all are the same."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

from llmuxd.core.eviction import WeightStrategy
from llmuxd.engine.manifest import NAME, Host, Manifest, Subject, states_of
from llmuxd.engine.object_store import PIECE_BYTES

SUBJECT = Subject(
    "qwen", ("vllm", "serve"), "f" * 64, WeightStrategy.DISCARD, "0.32.0", True, True, 77, "t" * 32, "/log"
)


def make_image(folder: Path, generation: str = "20261129T000000.000001", seed: int = 1, pieces: int = 3) -> Path:
    """With random pages, pages that can be compressed, holes, a file of no bytes, and a file with two names."""
    image = folder / generation
    (image / "criu").mkdir(parents=True)
    (image / "files").mkdir()
    dice = random.Random(seed)
    with (image / "criu" / "pages-1.img").open("wb") as pages:
        for _ in range(pieces):
            pages.write(dice.randbytes(PIECE_BYTES))
        pages.write(dice.randbytes(17))
    (image / "criu" / "pages-2.img").write_bytes(dice.randbytes(1000) * (2 * PIECE_BYTES // 1000))
    with (image / "files" / "0000").open("wb") as sparse:
        sparse.truncate(4 * PIECE_BYTES)
        sparse.seek(2 * PIECE_BYTES + 5)
        sparse.write(b"here")
    os.link(image / "files" / "0000", image / "files" / "0001")
    (image / "criu" / "empty.img").touch()
    content = states_of(sorted(path for path in image.rglob("*") if path.is_file()), relative_to=image)
    manifest = Manifest(generation, 1.0, 2.0, replace(SUBJECT), Host.here(), "4.2.1", (77,), (), (), tuple(content))
    (image / NAME).write_text(manifest.as_json())
    return image


def same(one: Path, other: Path) -> bool:
    """Whether two images have the same files, and the same names for the same ones."""

    def content(image: Path) -> dict[str, bytes]:
        return {str(path.relative_to(image)): path.read_bytes() for path in image.rglob("*") if path.is_file()}

    twins = [(image / "files" / "0000").samefile(image / "files" / "0001") for image in (one, other)]
    return content(one) == content(other) and all(twins)
