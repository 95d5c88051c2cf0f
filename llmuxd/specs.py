"""From the config to what the core and the gate are told: models, settings, policy, names."""

from __future__ import annotations

from collections.abc import Callable

from llmuxd.book import Book
from llmuxd.config import Config, ModelConfig, PolicyConfig
from llmuxd.core.policy import Policy
from llmuxd.core.settings import InFlight, ModelSpec, Placement, Settings
from llmuxd.core.state import SwitchMode
from llmuxd.core.switcher import Switcher
from llmuxd.depot import Depot
from llmuxd.engine.criu import Criu
from llmuxd.engine.cuda import CudaCheckpoint
from llmuxd.engine.images import Image, Images
from llmuxd.engine.spec import OWNER_ENV, slug
from llmuxd.engine.tools import Tools
from llmuxd.gate import ServedModel
from llmuxd.policies import build_policy

DEVICE = "gpu0"
"""Until models are placed by memory there is one device, with room for one model."""


def build_switcher(config: Config, now: float, book: Book | None = None) -> Switcher:
    """The core, as the config wants it, with the mode and the measured costs that an earlier daemon has left.

    Raises PolicyBroken.
    """
    mode = SwitchMode() if book is None else book.mode
    if mode.pinned is not None and mode.pinned not in config.models:
        mode = SwitchMode(manual=mode.manual)
    costs = None if book is None else book.costs
    return Switcher(model_specs(config), {DEVICE: 1}, settings_of(config), policy_of(config), now, mode, costs)


def model_specs(config: Config) -> tuple[ModelSpec, ...]:
    """The models."""
    return tuple(
        ModelSpec(
            name=model.name,
            eviction=model.eviction,
            placement=Placement(awake={DEVICE: 1}),
            start_timeout=model.start_timeout_secs,
            max_in_flight=model.max_in_flight,
            max_queue=model.max_queue,
            ttl=model.ttl_secs,
            priority=model.priority,
        )
        for model in config.models.values()
    )


def settings_of(config: Config) -> Settings:
    """The bounds."""
    policy = config.policy
    return Settings(
        request_timeout=policy.request_timeout_secs,
        in_flight=_in_flight_of(policy),
        min_active=policy.min_active_secs,
        sleep_timeout=config.sleep_timeout_secs,
        wake_timeout=config.wake_timeout_secs,
        stop_grace=config.stop_timeout_secs,
        max_queue=config.max_queue,
    )


def policy_of(config: Config) -> Policy:
    """The switching policy. Raises PolicyBroken."""
    return build_policy(config.policy.policy_type, config.policy.parameters)


def tools_of(
    config: Config, model: ModelConfig, depot: Depot, before_saving: Callable[[], None], tell: Callable[[str], None]
) -> Tools:
    """What the engine of a model is suspended and saved with."""
    checkpoint = config.checkpoint
    criu = Criu(checkpoint.criu_path, checkpoint.cuda_plugin_dir, {OWNER_ENV: str(config.state_dir)})
    images = Images(checkpoint.images_dir / slug(model.name, 64), criu, checkpoint.keep_images, model.checkpoint_path)

    async def fetch(local: Image | None, timeout: float) -> None:
        await depot.fetch(model.name, images.folder, local, min(timeout, config.wake_timeout_secs / 2), tell)

    return Tools(CudaCheckpoint(checkpoint.cuda_checkpoint_path), images, before_saving, tell, fetch)


def served_models(config: Config) -> list[ServedModel]:
    """Every name that clients may use, aliases included."""
    return [
        ServedModel(name, model.name, model.model_path)
        for model in config.models.values()
        for name in (model.name, *model.further_names)
    ]


def _in_flight_of(policy: PolicyConfig) -> InFlight:
    if not policy.drain_before_switch:
        return InFlight.CUT
    return policy.in_flight
