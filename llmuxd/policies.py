"""The switching policies that a config may name: those of the core, and those of installed packages.

A package adds one by an entry point in the group `llmux.policies`, whose name is the policy's and whose object is a
callable that takes `llmuxd.PolicyParameters` and returns a `llmuxd.Policy`. It is imported when it is chosen.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points

from llmuxd.core.policies import POLICIES
from llmuxd.core.policy import Policy, PolicyParameters

GROUP = "llmux.policies"

log = logging.getLogger("llmuxd")


class PolicyBroken(Exception):
    """An installed package's policy cannot be made."""


def policy_names() -> list[str]:
    """Every name that `policy.policy_type` may have, the core's first."""
    return [*POLICIES, *sorted({entry.name for entry in _third_parties()})]


def build_policy(name: str, parameters: PolicyParameters) -> Policy:
    """The policy of that name. Raises PolicyBroken, KeyError if there is none of that name."""
    if name in POLICIES:
        return POLICIES[name](parameters)
    for entry in _third_parties():
        if entry.name == name:
            try:
                policy: Policy = entry.load()(parameters)
            except Exception as error:
                raise PolicyBroken(f"policy {name} ({entry.value}) cannot be made: {error!r}") from error
            return policy
    raise KeyError(name)


def _third_parties() -> Iterable[EntryPoint]:
    for entry in entry_points(group=GROUP):
        if entry.name in POLICIES:
            log.warning("%s is a policy of llmux's own: that of %s is not used", entry.name, entry.value)
        else:
            yield entry
