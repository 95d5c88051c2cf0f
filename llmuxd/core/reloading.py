"""A new config while engines run: what changes at once, and what has to wait until an engine is idle."""

from __future__ import annotations

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.engines import Engines
from llmuxd.core.state import WITHOUT_PROCESS, IllegalEvent, Model, State, SwitchMode, check_placement


def reload(state: State, event: e.Reload, now: float) -> frozenset[str]:
    """Take over models and settings; the names of the models that are retired by it.

    Raises IllegalEvent, and changes nothing, if a model does not fit the devices.
    """
    for spec in event.models:
        try:
            check_placement(spec, state.devices)
        except ValueError as error:
            raise IllegalEvent(str(error)) from error
    state.settings = event.settings
    specs = {spec.name: spec for spec in event.models}
    retired = frozenset(name for name, model in state.models.items() if name not in specs and not model.retired)
    for name in retired:
        state.models[name].retired = True
    for name, spec in specs.items():
        model = state.models.get(name)
        if model is None:
            state.models[name] = Model(spec, since=now)
            state.models[name].evict_by(spec.eviction)
            continue
        model.retired = False
        if spec.eviction != model.spec.eviction:
            # Otherwise the operator's word, if there was one, stays in force.
            model.evict_by(spec.eviction)
        model.spec = spec
        if name in event.changed:
            # What made it fail may be mended: it is not waited out.
            model.failures, model.retry_at = 0, 0.0
        model.outdated = name in event.changed and model.state not in WITHOUT_PROCESS
    if state.mode.pinned in retired:
        state.mode = SwitchMode(manual=True)
    return retired


def sweep(state: State, engines: Engines, now: float) -> None:
    """Stop the engines that are to go and are idle; forget the retired models that are gone."""
    if state.closed:
        return  # The next daemon's config will say.
    for model in list(state.models.values()):
        if (model.retired or model.outdated) and _is_idle(state, model):
            engines.stop(model, now, "it is not in the config any more" if model.retired else "its config has changed")
        if model.retired and not model.queue and not model.in_flight and model.state in WITHOUT_PROCESS:
            if state.switch is not None and model.name in (state.switch.target, *state.switch.victims):
                continue
            del state.models[model.name]
            state.out.append(c.ModelGone(model.name))


def _is_idle(state: State, model: Model) -> bool:
    if model.in_flight:
        return False
    if model.state is S.ASLEEP:
        # What waits for a retired model is served by the engine that it has; a changed one is started anew for it.
        return model.outdated or not model.queue
    return model.state is S.AWAKE and not model.queue
