"""What the core tells of engines and switches, as lines of the log."""

from __future__ import annotations

import logging

from llmuxd.core import commands as c
from llmuxd.logs import about

log = logging.getLogger("llmuxd")


def log_notice(notice: c.Notice) -> None:
    """A line for a human, with the model's name and the number of the switch for a machine."""
    model = getattr(notice, "model", None) or getattr(notice, "target", None)
    extra = about(model, getattr(notice, "switch", None))
    if isinstance(notice, c.EngineChanged):
        # The whole of a long reason, an engine's last words, is told once: where the switch fails for it.
        reason = f": {notice.reason.splitlines()[0]}" if notice.reason else ""
        level = logging.WARNING if notice.new.value == "failed" else logging.INFO
        text = f"{notice.model}: {notice.old.value} -> {notice.new.value} after {notice.seconds:.1f} s{reason}"
        log.log(level, text, extra=extra)
    elif isinstance(notice, c.SwitchBegan):
        log.info("switch %d begins: %s", notice.switch, _route(notice.target, notice.victims), extra=extra)
    elif isinstance(notice, c.SwitchPhaseEnded):
        log.debug("switch %d: %s took %.2f s", notice.switch, notice.phase.value, notice.seconds, extra=extra)
    elif isinstance(notice, c.PolicyFailed):
        return  # It may be with every event: the self-check tells it once a minute.
    elif isinstance(notice, c.ModelGone):
        log.info("%s is gone: it was taken out of the config", notice.model, extra=extra)
    elif notice.cancelled:
        log.info("switch %d is not needed any more", notice.switch, extra=extra)
    elif notice.error:
        log.error("switch %d failed after %.1f s: %s", notice.switch, notice.seconds, notice.error, extra=extra)
    else:
        log.info("switch %d done in %.1f s", notice.switch, notice.seconds, extra=extra)


def _route(target: str | None, victims: tuple[str, ...]) -> str:
    return f"{', '.join(victims) or 'nothing'} out, {target or 'nothing'} in"
