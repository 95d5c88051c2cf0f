"""Machines for the tests of the Debian package; `make test-deb` sets up what they need."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.deb.machine import Machine, download, remove_leftovers

TOP = Path(__file__).parents[2]
RELEASES = ("bookworm", "trixie")
# For the package's own tests.
EXTRA_PACKAGES = ("curl", "procps")

MakeMachine = Callable[..., Machine]


@pytest.fixture(scope="session")
def cache() -> Path:
    folder = os.environ.get("LLMUX_TEST_CACHE")
    if not folder or not all((Path(folder) / "deb" / release / ".complete").exists() for release in RELEASES):
        pytest.fail("run `make test-deb`, which makes the machines these tests boot")
    runs = Path(folder) / "deb" / "runs"
    runs.mkdir(exist_ok=True)
    remove_leftovers(runs)
    return Path(folder) / "deb"


def build(out: Path, suffix: str = "") -> Path:
    argv = [str(TOP / "packaging/deb/build"), *(["--suffix", suffix] if suffix else []), str(out)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def deb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built from this checkout."""
    return build(tmp_path_factory.mktemp("deb"))


@pytest.fixture(scope="session")
def newer_deb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same code with a higher version, to upgrade to."""
    return build(tmp_path_factory.mktemp("newer"), "+upgrade1")


@pytest.fixture(scope="session")
def archive(request: pytest.FixtureRequest, cache: Path) -> Callable[[str], Path]:
    """Per release, a folder with all packages that ours needs: fetched once for each set of dependencies."""

    def for_release(release: str) -> Path:
        deb = request.getfixturevalue("deb")  # Not built for tests that install no package.
        fields = ["dpkg-deb", "-f", str(deb), "Depends", "Recommends"]
        needs = subprocess.run(fields, capture_output=True, check=True).stdout + repr(EXTRA_PACKAGES).encode()
        folder = cache / f"{release}-archive-{hashlib.sha256(needs).hexdigest()[:12]}"
        if not folder.exists():
            download(cache / release, deb, folder, EXTRA_PACKAGES)
        return folder

    return for_release


@pytest.fixture(scope="session")
def make_machine(cache: Path, archive: Callable[[str], Path]) -> Iterator[MakeMachine]:
    """Boots machines that live until the end of the session."""
    with ExitStack() as stack:

        def make(release: str, *, unified: bool = True, packages: bool = True, criu: Path | None = None) -> Machine:
            found = archive(release) if packages else None
            machine = Machine(cache / release, cache / "runs", unified=unified, archive=found, criu=criu)
            return stack.enter_context(machine)

        yield make


@pytest.fixture(scope="module", params=RELEASES)
def machine(request: pytest.FixtureRequest, cache: Path, archive: Callable[[str], Path]) -> Iterator[Machine]:
    """A fresh machine of each release, for the tests of one module; nothing of ours is installed yet."""
    with Machine(cache / request.param, cache / "runs", archive=archive(request.param)) as booted:
        yield booted
