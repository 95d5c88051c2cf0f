"""The switching policies that a config may name: those of the core, and those of installed packages.

A package adds one by an entry point in the group `llmux.policies`, whose name is the policy's and whose object is a
callable that takes `llmuxd.PolicyParameters` and returns a `llmuxd.Policy`. It is imported when it is chosen.
"""

from __future__ import annotations

import logging
from functools import partial
from importlib.metadata import EntryPoint, entry_points

from llmuxd.core.policies import POLICIES
from llmuxd.core.policy import BuildPolicy, Policy, PolicyParameters, PolicyRegistry

GROUP = "llmux.policies"

log = logging.getLogger("llmuxd")


class PolicyBroken(Exception):
    """An installed package's policy cannot be made, or is none."""


def find_policies() -> PolicyRegistry:
    """Name -> how it is built, the core's first. Nothing is imported before it is built, which raises PolicyBroken."""
    found: dict[str, BuildPolicy] = dict(POLICIES)
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        if entry.name in POLICIES:
            log.warning("%s is a policy of llmux's own: that of %s is not used", entry.name, entry.value)
        elif entry.name in found:
            log.warning("there is another policy %s already: that of %s is not used", entry.name, entry.value)
        else:
            found[entry.name] = partial(_build, entry)
    return found


def build_policy(name: str, parameters: PolicyParameters) -> Policy:
    """The policy of that name. Raises PolicyBroken, KeyError if there is none of that name."""
    return (POLICIES if name in POLICIES else find_policies())[name](parameters)


def _build(entry: EntryPoint, parameters: PolicyParameters) -> Policy:
    try:
        policy: Policy = entry.load()(parameters)
        problem = _problem_of(policy)
    # A package that ends the program when it is imported ends no daemon.
    except (Exception, SystemExit) as error:
        raise PolicyBroken(f"policy {entry.name} ({entry.value}) cannot be made: {error!r}") from error
    if problem:
        raise PolicyBroken(f"policy {entry.name} ({entry.value}) is none: {problem}")
    return policy


def _problem_of(policy: Policy) -> str:
    """What keeps an object from being a policy, as far as it shows before anything is decided."""
    if not isinstance(getattr(policy, "name", None), str):
        return "it has no name"
    if not callable(getattr(policy, "decide", None)) or not callable(getattr(policy, "bound", None)):
        return "it has no decide(snapshot), or no bound(typical_switch_secs)"
    bound = policy.bound(10.0)
    if bound is not None and (isinstance(bound, bool) or not isinstance(bound, (int, float))):
        return f"its bound(10.0) is {bound!r}, which is neither None nor seconds"
    return ""
