"""`python -m tests.soak --minutes 30`: a real llmuxd, clients of all kinds, engines that are killed, and an account of it."""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
import tempfile
from pathlib import Path

from tests.soak.soak import Plan, soak


def main() -> None:
    """Exit code 0 if everything held, 1 if not, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (30)")
    parser.add_argument("--seed", type=int, help="of all dice; one of its own if not given")
    parser.add_argument("--clients", type=int, default=64, help="how many at once (64)")
    parser.add_argument(
        "--rate", type=float, default=120.0, help="requests per second, all clients together, at most (120)"
    )
    parser.add_argument("--deed-secs", type=float, default=4.0, help="seconds between the saboteur's deeds (4)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there, too")
    parser.add_argument("--home", type=Path, help="keep everything in this new folder instead of a temporary one")
    given = parser.parse_args()
    seed = secrets.randbits(32) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    plan = Plan(given.minutes, seed, given.clients, given.rate, given.deed_secs)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        home = given.home or Path(folder)
        if given.home:
            home.mkdir(parents=True)
        report = asyncio.run(soak(plan, home))
    if given.json:
        given.json.write_text(report.as_json() + "\n")
    print(report.as_text(), flush=True)
    sys.exit(0 if report.held else 1)


if __name__ == "__main__":
    main()
