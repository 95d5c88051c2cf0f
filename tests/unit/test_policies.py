"""A package brings a policy of its own: it is found by name, built, and decides."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llmuxd.config import ConfigError, parse_config
from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.policies import POLICIES, Tenure
from llmuxd.core.policy import PolicyParameters
from llmuxd.policies import PolicyBroken, build_policy, find_policies
from llmuxd.runtime import build_switcher

PACKAGE = """
from llmuxd import Stay, SwitchTo

class Last:
    name = "last_in_the_alphabet"
    def __init__(self, parameters):
        self.max_wait = parameters.max_wait
    def bound(self, typical_switch_secs):
        return None
    def decide(self, snapshot):
        names = [model.name for model, _ in snapshot.candidates]
        return SwitchTo(max(names)) if names else Stay()

def broken(parameters):
    raise RuntimeError("no licence")
"""

ENTRY_POINTS = """
[llmux.policies]
last = acme_policies:Last
broken = acme_policies:broken
fifo = acme_policies:Last
"""


def package(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str, entries: str) -> None:
    """Install a package with one module and the policies that it names."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{name}.py").write_text(source)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    header = "" if "[" in entries else "[llmux.policies]\n"
    (info / "entry_points.txt").write_text(header + entries + "\n")
    monkeypatch.syspath_prepend(str(folder))
    # The module that is imported meanwhile is forgotten again.
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An installed package with policies."""
    package(tmp_path, monkeypatch, "acme_policies", PACKAGE, ENTRY_POINTS)


def test_without_packages_there_are_the_four():
    assert list(find_policies())[:4] == ["fifo", "cost_aware", "time_slice", "tenure"]
    assert build_policy("tenure", PolicyParameters(max_wait=3.0)) == Tenure(max_wait=3.0)
    with pytest.raises(KeyError):
        build_policy("nobody", PolicyParameters())


@pytest.mark.usefixtures("acme")
def test_the_policy_of_a_package_decides():
    models = {name: {"model_path": "p"} for name in "abc"}
    config = parse_config({"models": models, "policy": {"policy_type": "last", "max_wait_secs": 7}}, environ={})
    assert (config.policy.policy_type, config.policy.min_active_secs) == ("last", 0.0)
    switcher = build_switcher(config, 0.0)
    assert switcher.policy.name == "last_in_the_alphabet"
    assert switcher.policy.max_wait == 7  # type: ignore[attr-defined]
    switcher.handle(e.RequestArrived(1, "a"), 0.0)
    for request, model in ((2, "b"), (3, "c")):
        switcher.handle(e.RequestArrived(request, model), 1.0)
    op = switcher.state.models["a"].op
    commands = switcher.handle(e.EngineStarted("a", op), 2.0)
    assert [command.target for command in commands if isinstance(command, c.SwitchBegan)] == ["c"]


@pytest.mark.usefixtures("acme")
def test_a_package_cannot_take_the_name_of_ours(caplog: pytest.LogCaptureFixture):
    assert find_policies()["fifo"] is POLICIES["fifo"]
    assert type(build_policy("fifo", PolicyParameters())) is type(POLICIES["fifo"](PolicyParameters()))
    assert "fifo is a policy of llmux's own" in caplog.text


@pytest.mark.usefixtures("acme")
def test_one_that_cannot_be_made_is_an_error_only_where_it_is_chosen():
    assert build_policy("last", PolicyParameters()).name == "last_in_the_alphabet"
    with pytest.raises(PolicyBroken, match=r"policy broken \(acme_policies:broken\) cannot be made: .*no licence"):
        build_policy("broken", PolicyParameters())


@pytest.mark.usefixtures("acme")
def test_a_typing_error_is_told_with_what_is_there():
    with pytest.raises(ConfigError, match=r"allowed: fifo, cost_aware, time_slice, tenure, broken, last \(did you"):
        parse_config({"policy": {"policy_type": "lats"}}, environ={})


@pytest.mark.usefixtures("acme")
def test_a_chosen_policy_that_cannot_be_made_is_an_error_of_the_config():
    with pytest.raises(ConfigError, match=r'^f: policy\.policy_type: found "broken": policy broken \(acme.*no licence'):
        parse_config({"policy": {"policy_type": "broken"}}, "f", environ={})
    assert parse_config({"policy": {"policy_type": "last"}}, "f", environ={}).policy.policy_type == "last"


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("import nowhere_to_be_found", "ModuleNotFoundError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("other = 1", "AttributeError"),
        ("def odd(parameters): return None", "it has no name"),
        ("class odd:\n name = 'odd'\n def __init__(self, p): pass", "it has no decide"),
        ("class odd:\n name = 'odd'\n def __init__(self, p): pass\n decide = bound = print", None),
        (
            "class odd:\n name = 'odd'\n def __init__(self, p): pass\n def decide(self, s): 0\n def bound(self, t): return 'x'",
            "its bound\\(10.0\\) is 'x'",
        ),
        (
            "class odd:\n name = 'odd'\n def __init__(self, p): pass\n def decide(self, s): 0\n def bound(self, t): 1 / 0",
            "ZeroDivisionError",
        ),
    ],
)
def test_what_a_package_brings_is_tried_before_it_is_used(tmp_path, monkeypatch, source, problem):
    package(tmp_path, monkeypatch, "odd_policies", source, "odd = odd_policies:odd")
    assert parse_config({}, "f", environ={}).policy.policy_type == "tenure", "nobody chose it"
    if problem is None:
        assert build_policy("odd", PolicyParameters()).name == "odd"
        return
    with pytest.raises(PolicyBroken, match=problem):
        build_policy("odd", PolicyParameters())


@pytest.mark.usefixtures("acme")
def test_of_two_packages_with_one_name_one_is_used_and_it_is_told(tmp_path, monkeypatch, caplog):
    package(tmp_path / "other", monkeypatch, "zz_policies", "last = None", "last = zz_policies:last")
    assert build_policy("last", PolicyParameters()).name == "last_in_the_alphabet"
    assert "there is another policy last already: that of zz_policies:last is not used" in caplog.text


@pytest.mark.usefixtures("acme")
def test_a_package_is_imported_when_it_is_chosen_and_not_before():
    assert "last" in find_policies()
    assert "acme_policies" not in sys.modules


def test_priority_and_cooldown_come_to_the_core():
    models = {"a": {"model_path": "p", "priority": 2.5}, "b": {"model_path": "p"}}
    for policy, cooldown in (({}, 0.0), ({"policy_type": "fifo"}, 5.0), ({"min_active_secs": 3}, 3.0)):
        state = build_switcher(parse_config({"models": models, "policy": policy}, environ={}), 0.0).state
        assert [model.spec.priority for model in state.models.values()] == [2.5, 1.0]
        assert state.settings.min_active == cooldown
