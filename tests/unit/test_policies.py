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
from llmuxd.policies import PolicyBroken, build_policy, policy_names
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


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An installed package with policies."""
    (tmp_path / "acme_policies.py").write_text(PACKAGE)
    info = tmp_path / "acme_policies-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-policies\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("acme_policies", None)


def test_without_packages_there_are_the_four():
    assert policy_names()[:4] == ["fifo", "cost_aware", "time_slice", "tenure"]
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
    assert policy_names().count("fifo") == 1
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
