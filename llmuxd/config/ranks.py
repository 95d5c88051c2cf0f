"""How many ranks an engine has, by the arguments of `vllm serve` in the config."""

from __future__ import annotations

import re
from collections.abc import Sequence

_KINDS = {
    "--tensor-parallel-size": "tensor",
    "-tp": "tensor",
    "--pipeline-parallel-size": "pipeline",
    "-pp": "pipeline",
}


def parallel_size(extra_args: Sequence[str]) -> int:
    """Tensor times pipeline; of an argument that says nothing, 1."""
    sizes: dict[str, int] = {}
    for index, argument in enumerate(extra_args):
        flag, equals, value = argument.partition("=")
        kind = _KINDS.get(flag.replace("_", "-"))
        if kind is not None:
            value = value if equals else next(iter(extra_args[index + 1 : index + 2]), "")
            sizes[kind] = int(value) if re.fullmatch(r"[1-9][0-9]{0,3}", value) else 1
    return sizes.get("tensor", 1) * sizes.get("pipeline", 1)
