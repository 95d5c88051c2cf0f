"""The policies that come with llmux, and the table of their names.

A policy of a third party is registered in the entry points group `llmux.policies`, as a callable that takes
`PolicyParameters`; it is found by the shell, not here.
"""

from __future__ import annotations

from llmuxd.core.policies.cost_aware import CostAware
from llmuxd.core.policies.fifo import Fifo
from llmuxd.core.policies.tenure import Tenure
from llmuxd.core.policies.time_slice import TimeSlice
from llmuxd.core.policy import PolicyRegistry

POLICIES: PolicyRegistry = {
    "fifo": Fifo.build,
    "cost_aware": CostAware.build,
    "time_slice": TimeSlice.build,
    "tenure": Tenure.build,
}
"""Name -> how it is built."""

DEFAULT_POLICY = "tenure"

__all__ = ["DEFAULT_POLICY", "POLICIES", "CostAware", "Fifo", "Tenure", "TimeSlice"]
