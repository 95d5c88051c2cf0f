"""The table of every configuration key, and how one value is checked.

`KEYS` is the only place that says which keys there are, what they may be and what they mean: validation and the
documentation are both made from it. What concerns several keys at once is in `load`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmuxd.core.eviction import EvictionPolicy, ProcessStrategy, WeightStrategy


class Wrong(Exception):
    """A value is not what the key allows; the text says what is."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key. `path` has `*` for a model's name; `default` is as one would write it, "" if there is none."""

    path: str
    read: Callable[[Any], Any]
    allowed: str
    default: str
    meaning: str
    required: bool = False


def _string(value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise Wrong
    return value


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Wrong
    return value


def _integer(low: int, high: int | None = None) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise Wrong
        if value < low or (high is not None and value > high):
            raise Wrong
        return value

    return read


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Wrong
    if not math.isfinite(value) or value < 0:
        raise Wrong
    return float(value)


def _positive(value: Any) -> float:
    number = _number(value)
    if number == 0:
        raise Wrong
    return number


def _strings(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise Wrong
    return tuple(_string(item) for item in value)


def _command(value: Any) -> tuple[str, ...]:
    words = (_string(value),) if isinstance(value, str) else _strings(value)
    if not words:
        raise Wrong
    return words


def _environment(value: Any) -> Mapping[str, str]:
    if not isinstance(value, dict):
        raise Wrong
    for key, text in value.items():
        if not key or "=" in key or "\0" in key or not isinstance(text, str) or "\0" in text:
            raise Wrong
    return dict(value)


def _path(value: Any) -> Path:
    return Path(_string(value))


def _absolute(value: Any) -> Path:
    path = _path(value)
    if not path.is_absolute():
        raise Wrong
    return path


def _eviction(value: Any) -> EvictionPolicy:
    """`weights+process`, or llmux 0.7's table of the two."""
    try:
        if isinstance(value, str):
            return EvictionPolicy.parse(value)
        if isinstance(value, dict) and value.keys() <= {"weights", "process"}:
            # 0.7 takes the first of each for what is left out.
            weights = WeightStrategy(value.get("weights", WeightStrategy.RETAIN.value))
            return EvictionPolicy(weights, ProcessStrategy(value.get("process", ProcessStrategy.KEEP_RUNNING.value)))
    except ValueError:
        pass
    raise Wrong


_SECONDS = "a number of seconds, 0 or more"
_MORE_SECONDS = "a number of seconds above 0"
_MILLISECONDS = "a whole number of milliseconds, 0 or more"
_PORT = "a port, 1 to 65535"
_PORT_OR_0 = "a port, 0 to 65535"
_YES_NO = "true or false"
_TEXT = "a string that is not empty"
_TEXTS = "a list of strings that are not empty"
_COUNT = "a whole number, 1 or more"
_EVICTION = (
    '"WEIGHTS+PROCESS", WEIGHTS one of retain, offload, discard, PROCESS one of keep_running, cuda_suspend, '
    "checkpoint, stop; or a table of weights and process"
)

KEYS: tuple[Key, ...] = (
    Key("port", _integer(0, 65535), _PORT_OR_0, "3000", "The port of the OpenAI-compatible API; 0 takes any free one."),
    Key("listen", _string, "an address of this machine", '"127.0.0.1"', "The address to listen on; anyone who reaches it may use the models."),
    Key("metrics_port", _integer(0, 65535), _PORT_OR_0, "9090", "The port of /metrics for Prometheus; 0 for none."),
    Key("control_socket", _absolute, "an absolute path", '"/run/llmux/control.sock"', "The Unix socket that llmuxctl talks to."),
    Key("vllm_command", _command, "a string, or a list of strings (program and first arguments)", '"vllm"', "What starts vLLM; `serve MODEL ...` is added."),
    Key("warmup", _boolean, _YES_NO, "false", "Start each model, have it answer once and put it to sleep before the port opens."),
    Key("max_queue", _integer(1), _COUNT, "1024", "Requests that may wait, over all models; one more is answered with 429."),
    Key("max_body_bytes", _integer(1), "a whole number of bytes, 1 or more", "67108864", "The largest request body; a larger one is answered with 413."),
    Key("start_timeout_secs", _positive, _MORE_SECONDS, "1800", "How long an engine may take to start."),
    Key("sleep_timeout_secs", _positive, _MORE_SECONDS, "120", "How long an engine may take to fall asleep; then it is stopped."),
    Key("wake_timeout_secs", _positive, _MORE_SECONDS, "300", "How long an engine may take to wake; then it is stopped."),
    Key("stop_timeout_secs", _number, _SECONDS, "30", "How long an engine may take to end when asked; then it is killed."),
    Key("shutdown_timeout_secs", _number, _SECONDS, "30", "How long requests in flight may go on after SIGTERM."),
    Key("admin_port", _integer(0, 65535), _PORT_OR_0, "", "Accepted from llmux 0.7 and not used: control is the Unix socket."),
    Key("models.*.model_path", _string, _TEXT, "", "A Hugging Face name or a local folder, as `vllm serve` takes it.", required=True),
    Key("models.*.port", _integer(1, 65535), _PORT, "", "The engine's port on 127.0.0.1, instead of a Unix socket of its own."),
    Key("models.*.extra_args", _strings, _TEXTS, "[]", "Further arguments of `vllm serve`."),
    Key("models.*.eviction", _eviction, _EVICTION, "policy.eviction", "What becomes of weights and process when the model has to go."),
    Key("models.*.checkpoint_path", _path, "a path", "", "Images of a checkpoint to start from, instead of a cold start."),
    Key("models.*.aliases", _strings, _TEXTS, "[]", "Further names that clients may use for the model."),
    Key("models.*.env", _environment, "a table of strings", "{}", "Environment variables for the engine, on top of the daemon's."),
    Key("models.*.max_in_flight", _integer(1), _COUNT, "", "Requests sent to the engine at once; more wait."),
    Key("models.*.max_queue", _integer(1), _COUNT, "", "Requests that may wait for this model; one more is answered with 429."),
    Key("models.*.ttl_secs", _positive, _MORE_SECONDS, "", "Put the model to sleep after this long without a request."),
    Key("models.*.start_timeout_secs", _positive, _MORE_SECONDS, "start_timeout_secs", "How long this engine may take to start."),
    Key("policy.policy_type", _string, "the name of a policy", '"fifo"', "Which model is next."),
    Key("policy.request_timeout_secs", _positive, _MORE_SECONDS, "300", "How long a request waits for its model before it is answered with 504."),
    Key("policy.drain_before_switch", _boolean, _YES_NO, "true", "Wait for the requests in flight before a switch; if false they are paused, or cut off where the engine is stopped."),
    Key("policy.eviction", _eviction, _EVICTION, '"offload+keep_running"', "The eviction of models that do not name one."),
    Key("policy.min_active_secs", _number, _SECONDS, "5", "How long a model stays awake before another one may push it out."),
    Key("policy.coalesce_window_ms", _integer(0), _MILLISECONDS, "2000", "cost_aware: how long to collect requests before a switch."),
    Key("policy.amortization_factor", _number, "a number, 0 or more", "0.5", "cost_aware: how much waiting work a switch has to be worth."),
    Key("policy.max_wait_secs", _number, _SECONDS, "15", "cost_aware and time_slice: the wait that forces a switch."),
    Key("policy.tick_interval_ms", _integer(1), "a whole number of milliseconds, 1 or more", "500", "time_slice: how often the queues are looked at."),
    Key("policy.min_quantum_ms", _integer(0), _MILLISECONDS, "2000", "time_slice: the least time that a model serves."),
    Key("checkpoint.criu_path", _string, _TEXT, '"criu"', "The criu program."),
    Key("checkpoint.cuda_plugin_dir", _string, _TEXT, '"/usr/lib/criu/"', "The folder of CRIU's CUDA plugin."),
    Key("checkpoint.images_dir", _path, "a path", '"/tmp/llmux-checkpoints"', "Where images are kept, a folder per model."),
    Key("checkpoint.cuda_checkpoint_path", _string, _TEXT, '"cuda-checkpoint"', "The cuda-checkpoint program."),
    Key("checkpoint.keep_images", _boolean, _YES_NO, "true", "Keep the images after a restore."),
    Key("checkpoint.object_store.endpoint", _string, _TEXT, "", "The URL of an S3-compatible store.", required=True),
    Key("checkpoint.object_store.bucket", _string, _TEXT, "", "The bucket in it.", required=True),
    Key("checkpoint.object_store.access_key", _string, _TEXT, "", "The access key.", required=True),
    Key("checkpoint.object_store.secret_key", _string, _TEXT, "", "The secret key.", required=True),
    Key("checkpoint.object_store.region", _string, _TEXT, '"us-east-1"', "The region."),
)  # fmt: skip
"""Every key, in the order of the documentation."""

SECRET_KEYS = frozenset({"checkpoint.object_store.access_key", "checkpoint.object_store.secret_key"})

NOT_YET = frozenset({"models.*.gpus", "models.*.memory", "models.*.priority"})
"""Keys that are reserved: named by an error of their own."""

OWN_ARGUMENTS = ("--host", "--port", "--uds", "--served-model-name", "--enable-sleep-mode", "--api-key")
"""Arguments of `vllm serve` that llmuxd sets or that would cut it off from its engine."""


def tables() -> dict[str, dict[str, Key]]:
    """Table path -> key name -> key. Tables that hold only tables are in it, too."""
    found: dict[str, dict[str, Key]] = {"": {}}
    for key in KEYS:
        table, _, name = key.path.rpartition(".")
        found.setdefault(table, {})[name] = key
    return found


def nearest(word: str, known: Collection[str]) -> str | None:
    """The known word that was probably meant."""
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    return close[0] if close else None
