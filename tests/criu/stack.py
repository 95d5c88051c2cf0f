"""llmuxd over real vLLM engines that a real CRIU saves, with two tiny models."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.real.stack import GREEDY, Stack, until

TWO = ("tiny-a", "tiny-b")


class SavingStack(Stack):
    """A stack whose models are saved when they have to go."""

    def __init__(
        self,
        folder: Path,
        vllm: Path,
        models: Mapping[str, Path],
        criu: Path,
        eviction: str = "discard+checkpoint",
        images: Path | None = None,
        **checkpoint: Any,
    ) -> None:
        self.images = images or folder / "images"
        self._checkpoint = {"criu_path": str(criu), "images_dir": str(self.images), **checkpoint}
        chosen = {name: models[name] for name in TWO}
        super().__init__(folder, vllm, chosen, False, {"eviction": eviction, "request_timeout_secs": 600})

    def _toml(self, vllm: Path, models: Mapping[str, Path], warmup: bool) -> str:
        table = "".join(f"{key} = {json.dumps(value)}\n" for key, value in self._checkpoint.items())
        return super()._toml(vllm, models, warmup) + "[checkpoint]\n" + table

    def say(self, model: str) -> tuple[str, float]:
        """What a model says to always the same prompt, and how long it took, whatever had to be done for it."""
        began = time.monotonic()
        with self.client() as client:
            answer = client.completions.create(model=model, prompt="Once upon a time", max_tokens=16, **GREEDY)
        return answer.choices[0].text, time.monotonic() - began

    def state(self, model: str) -> str:
        found: str = self.status()["models"][model]["engine"]
        return found

    def saved(self, model: str) -> list[Path]:
        """The complete images of a model, the oldest first."""
        return sorted(path.parent for path in self.images.glob(f"{model}/*/manifest.json"))

    def spent(self, model: str, was: str) -> list[float]:
        """How long the model has been in a state, each time, by the daemon's log."""
        lines = [line.split() for line in self.log.read_text().splitlines() if f" {model}: {was} -> " in line]
        return [float(line[line.index("after") + 1]) for line in lines]

    def starts(self, model: str) -> int:
        """How often its engine was started cold."""
        return len(self.spent(model, "starting"))


@contextmanager
def saving_stack(*arguments: Any, **options: Any) -> Iterator[SavingStack]:
    """A stack that serves, and is gone afterwards."""
    made = SavingStack(*arguments, **options)
    try:
        made.start()
        made.wait_for_port()
        yield made
    finally:
        made.kill()


__all__ = ["TWO", "SavingStack", "saving_stack", "until"]
