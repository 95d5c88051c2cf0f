"""What a found engine is, by the record and by its own word."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.events import FailureKind
from llmuxd.core.eviction import EvictionPolicy
from llmuxd.engine import EngineError, adopting
from llmuxd.engine.api import Health
from llmuxd.engine.cgroup import Cgroup, delegated, engines_in, group_of
from llmuxd.engine.run import EngineInfo

OFFLOAD, DISCARD, RETAIN = (
    EvictionPolicy.parse(f"{weights}+keep_running") for weights in ("offload", "discard", "retain")
)


class Api:
    """An engine's answers; the last one is given again and again, until it is told to sleep."""

    def __init__(self, *sleeping: bool | EngineError, health: Health = Health.OK, obeys: bool = True) -> None:
        self._sleeping = list(sleeping)
        self._health = health
        self._obeys = obeys
        self.told: list[tuple[int, str | None]] = []
        """With what level and mode it was told to sleep."""

    async def health(self, _timeout: float) -> Health:
        return self._health

    async def is_sleeping(self) -> bool:
        answer = self._sleeping.pop(0) if len(self._sleeping) > 1 else self._sleeping[0]
        if isinstance(answer, EngineError):
            raise answer
        return answer

    async def sleep(self, level: int, mode: str | None) -> None:
        self.told.append((level, mode))
        if self._obeys:
            self._sleeping = [True]

    async def verify_sleeping(self, expected: bool) -> None:
        if await self.is_sleeping() is not expected:
            raise EngineError(FailureKind.LIED, "the engine is awake")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adopting, "BEGIN_SECS", 0.02)
    monkeypatch.setattr(adopting, "SETTLE_SECS", 0.02)
    monkeypatch.setattr(adopting, "BUSY_SECS", 0.02)
    monkeypatch.setattr(adopting, "_POLL_SECS", 0.001)


def found(api: Any, was: S, by: EvictionPolicy | None = None, *, can_park: bool = True, can_sleep: bool = True) -> S:
    info = EngineInfo(1, 0.0, "0.32.0", can_park, can_sleep)
    return asyncio.run(adopting.state_of(api, info, was, by))


@pytest.mark.parametrize(
    ("was", "by", "sleeping", "now"),
    [
        (S.AWAKE, None, [False], S.AWAKE),
        (S.ASLEEP, OFFLOAD, [True], S.ASLEEP),
        (S.ASLEEP, OFFLOAD, [False], S.AWAKE),
        (S.FALLING_ASLEEP, OFFLOAD, [False, False, True], S.ASLEEP),
        (S.FALLING_ASLEEP, DISCARD, [False, True], S.ASLEEP),
        (S.WAKING, OFFLOAD, [True, True, False], S.AWAKE),
        (S.WAKING, OFFLOAD, [True], S.ASLEEP),
        (S.WAKING, DISCARD, [True, False], S.AWAKE),
    ],
)
def test_it_is_what_it_says_once_it_has_settled(was, by, sleeping, now):
    api = Api(*sleeping)
    assert found(api, was, by) is now
    assert api.told == []


@pytest.mark.parametrize(("by", "level"), [(RETAIN, 0), (OFFLOAD, 1), (DISCARD, 2)])
def test_one_that_does_not_fall_asleep_is_told_to(by, level):
    """Whoever meant to tell it was killed before; what it has in flight is nobody's."""
    api = Api(False)
    assert found(api, S.FALLING_ASLEEP, by) is S.ASLEEP
    assert api.told == [(level, "abort")]


def test_an_old_one_knows_no_modes():
    api = Api(False)
    assert found(api, S.FALLING_ASLEEP, OFFLOAD, can_park=False) is S.ASLEEP
    assert api.told == [(1, None)]


def test_one_that_does_not_sleep_though_it_was_told_is_not_used():
    with pytest.raises(EngineError, match="the engine is awake"):
        found(Api(False, obeys=False), S.FALLING_ASLEEP, OFFLOAD)


@pytest.mark.parametrize(
    ("was", "by", "sleeping", "why"),
    [
        (S.AWAKE, None, [True], "nobody knows by which level"),
        (S.WAKING, DISCARD, [True], "in the middle of getting its weights back"),
        (S.STOPPING, None, [False], "it was being stopped"),
    ],
)
def test_it_is_not_used_where_it_cannot_be_told(was, by, sleeping, why):
    with pytest.raises(EngineError, match=why):
        found(Api(*sleeping), was, by)


BUSY = EngineError(FailureKind.TIMEOUT, "/is_sleeping was not answered")


def test_one_that_is_too_busy_to_say_it_is_asked_again_while_it_falls_asleep_or_wakes():
    assert found(Api(BUSY, BUSY, True), S.FALLING_ASLEEP, OFFLOAD) is S.ASLEEP
    assert found(Api(BUSY, False), S.WAKING, DISCARD) is S.AWAKE
    for was, *answers in ((S.FALLING_ASLEEP, BUSY), (S.ASLEEP, BUSY, True)):
        with pytest.raises(EngineError, match="not answered"):
            found(Api(*answers), was, OFFLOAD)


@pytest.mark.parametrize("health", [Health.DEAD, Health.REFUSED, Health.UNKNOWN])
def test_it_is_not_used_if_it_does_not_answer(health):
    with pytest.raises(EngineError, match=f"/health: {health.value}"):
        found(Api(False, health=health), S.AWAKE)


def test_one_that_was_starting_may_be_up_by_now():
    assert found(Api(False), S.STARTING) is S.AWAKE
    assert found(Api(False, health=Health.REFUSED), S.STARTING) is S.STARTING


def test_one_that_cannot_sleep_is_awake():
    assert found(Api(True), S.AWAKE, can_sleep=False) is S.AWAKE


@pytest.mark.parametrize(("was", "now"), [(S.ASLEEP, S.ASLEEP), (S.FALLING_ASLEEP, S.ASLEEP), (S.WAKING, S.AWAKE)])
def test_an_old_one_that_retains_its_weights_sleeps_by_our_word(was, now):
    assert found(Api(False), was, RETAIN, can_park=False) is now


class TestCgroups:
    def test_a_group_of_ours_is_divided_and_no_other(self, tmp_path):
        own = tmp_path / "own"
        own.write_text("1:name=systemd:/x\n0::/system.slice/llmuxd.service\n")
        group = tmp_path / "system.slice" / "llmuxd.service"
        assert delegated(tmp_path, own) is None, "there is no such group"
        group.mkdir(parents=True)
        (group / "cgroup.procs").write_text("")
        assert delegated(tmp_path, own) is None, "it cannot be killed"
        (group / "cgroup.kill").write_text("")
        assert delegated(tmp_path, own) is None, "it is root's, and not marked as delegated"

    def test_one_that_is_given_to_another_user_is_divided(self, tmp_path, monkeypatch):
        own = tmp_path / "own"
        own.write_text("0::/a\n")
        (tmp_path / "a").mkdir()
        for name in ("cgroup.procs", "cgroup.kill"):
            (tmp_path / "a" / name).write_text("")
        monkeypatch.setattr("os.getuid", lambda: 1234)
        monkeypatch.setattr(Path, "stat", lambda self, **_: type("Stat", (), {"st_uid": 1234})())
        assert delegated(tmp_path, own) == tmp_path / "a"

    @pytest.mark.parametrize(
        ("own", "divided"),
        [
            ("/app/llmuxd.service", "app/llmuxd.service"),
            (f"/app/{group_of(Path('llmuxd.service'), '/state', 'a')}/deeper", "app/llmuxd.service"),
            ("/app/engine-room.service", "app/engine-room.service"),
        ],
    )
    def test_the_group_of_an_engine_is_left_for_the_daemons(self, tmp_path, monkeypatch, own, divided):
        (tmp_path / "own").write_text(f"0::{own}\n")
        for folder in (tmp_path / "app", tmp_path / divided):
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("cgroup.procs", "cgroup.kill"):
                (folder / name).write_text("")
        monkeypatch.setattr("os.getuid", lambda: 1234)
        monkeypatch.setattr(Path, "stat", lambda self, **_: type("Stat", (), {"st_uid": 1234})())
        assert delegated(tmp_path, tmp_path / "own") == tmp_path / divided

    def test_with_v1_alone_there_is_none(self, tmp_path):
        own = tmp_path / "own"
        own.write_text("12:pids:/x\n1:name=systemd:/x\n")
        assert delegated(tmp_path, own) is None
        assert delegated(tmp_path, tmp_path / "missing") is None

    def test_a_process_is_moved_found_and_killed(self, tmp_path):
        group = Cgroup(group_of(tmp_path, "/state", "a"))
        assert group.pids() == set()
        assert group.enter(17)
        assert (group.path / "cgroup.procs").read_text() == "17"
        (group.path / "cgroup.procs").write_text("17\n18\n")
        assert group.pids() == {17, 18}
        group.kill()
        assert (group.path / "cgroup.kill").read_text() == "1"
        group.remove()
        assert group.path.exists(), "it is not empty"
        assert [one.path for one in engines_in(tmp_path, "/state")] == [group.path]
        assert engines_in(tmp_path, "/another") == [], "those of another daemon are not ours"

    def test_where_it_cannot_be_made_nothing_is_lost(self, tmp_path):
        group = Cgroup(tmp_path / "missing" / "engine-a")
        assert not group.enter(17)
        group.kill()
        group.remove()
        assert engines_in(tmp_path / "missing", "/state") == []
