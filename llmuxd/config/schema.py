"""The table of every configuration key.

`KEYS` is the only place that says which keys there are, what they may be and what they mean: validation and the
documentation are both made from it. How a value is read is in `kinds`, what concerns several keys in `checks`.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass

from llmuxd.config import kinds
from llmuxd.config.kinds import Kind


@dataclass(frozen=True, slots=True)
class Key:
    """One key. `path` has `*` for a model's name, and `[]` after the name of an array of tables.

    `default` is as one would write it in TOML, the path of another key whose value is taken, or "" if there is none.
    """

    path: str
    kind: Kind
    default: str
    meaning: str
    required: bool = False
    secret: bool = False

    @property
    def type(self) -> str:
        """As TOML calls it."""
        return self.kind.type

    @property
    def unit(self) -> str:
        """Empty if it has none."""
        return self.kind.unit

    @property
    def allowed(self) -> str:
        """What it may be, as errors say it."""
        return self.kind.allowed


KEYS: tuple[Key, ...] = (
    Key("port", kinds.PORT_OR_0, "3000", "The port of the OpenAI-compatible API; 0 takes any free one."),
    Key("listen", kinds.ADDRESS, '"127.0.0.1"', "The address to listen on; anyone who reaches it may use the models, unless there are `[[keys]]`."),
    Key("metrics_port", kinds.PORT_OR_0, "9090", "The port of /metrics for Prometheus; 0 for none."),
    Key("control_socket", kinds.ABSOLUTE_PATH, '"/run/llmux/control.sock"', "The Unix socket that llmuxctl talks to, by default in the runtime folder, which LLMUX_RUNTIME_DIR moves."),
    Key("control_read_group", kinds.GROUP, '""', "A group whose members may see the status, the logs and the config, and change nothing."),
    Key("vllm_command", kinds.COMMAND, '"vllm"', "What starts vLLM; `serve MODEL ...` is added."),
    Key("warmup", kinds.BOOLEAN, "false", "Start each model, have it answer once and put it to sleep before the port opens."),
    Key("max_queue", kinds.REQUESTS, "1024", "Requests that may wait, over all models; one more is answered with 429."),
    Key("max_body_bytes", kinds.BYTES, "67108864", "The largest request body; a larger one is answered with 413."),
    Key("max_head_bytes", kinds.BYTES, "65536", "The largest head of a request; a larger one, or one of more than 100 fields, is answered with 431."),
    Key("max_connections", kinds.CONNECTIONS, "4096", "Connections at once; one more is answered with 503, and closed."),
    Key("head_timeout_secs", kinds.SECONDS_ABOVE_0, "30", "How long the head of a request may take to come, and a second more for every 500 bytes of it; then it is answered with 408."),
    Key("body_timeout_secs", kinds.SECONDS_ABOVE_0, "30", "How long the body of a request may take to come, and a second more for every 500 bytes of it; then it is answered with 408."),
    Key("send_timeout_secs", kinds.SECONDS_ABOVE_0, "120", "A client that takes nothing of what it is sent for so long is cut off."),
    Key("cors_origins", kinds.ORIGINS, "[]", "The origins whose pages may use the API from a browser."),
    Key("access_log", kinds.BOOLEAN, "true", "Log a line for each request: who, which model, how long, how much; never what was asked."),
    Key("heartbeat_secs", kinds.SECONDS, "10", "How often a waiting or paused stream is sent a comment, so that nobody on its way gives up; 0 for never."),
    Key("start_timeout_secs", kinds.SECONDS_ABOVE_0, "1800", "How long an engine may take to start."),
    Key("sleep_timeout_secs", kinds.SECONDS_ABOVE_0, "120", "How long an engine may take to fall asleep; then it is stopped."),
    Key("wake_timeout_secs", kinds.SECONDS_ABOVE_0, "300", "How long an engine may take to wake; then it is stopped."),
    Key("stop_timeout_secs", kinds.SECONDS, "30", "How long an engine may take to end when asked; then it is killed."),
    Key("shutdown_timeout_secs", kinds.SECONDS, "30", "How long requests in flight may go on when llmuxd stops or is restarted."),
    Key("admin_port", kinds.PORT_OR_0, "", "Accepted from llmux 0.7 and not used: control is the Unix socket."),
    Key("models.*.model_path", kinds.ARGUMENT, "", "A Hugging Face name or a local folder, as `vllm serve` takes it.", required=True),
    Key("models.*.port", kinds.PORT, "", "The engine's port on 127.0.0.1, instead of a Unix socket of its own."),
    Key("models.*.extra_args", kinds.TEXTS, "[]", "Further arguments of `vllm serve`."),
    Key("models.*.eviction", kinds.EVICTION, "policy.eviction", "What becomes of weights and process when the model has to go; auto chooses what costs least."),
    Key("models.*.checkpoint_path", kinds.PATH, "", "The folder of one image to restore the engine from for its first request, as long as it fits; none of its own is needed for that."),
    Key("models.*.aliases", kinds.NAMES, "[]", "Further names that clients may use for the model; those of LoRA modules in `extra_args` are names already."),
    Key("models.*.env", kinds.ENVIRONMENT, "{}", "Environment variables for the engine, on top of the daemon's."),
    Key("models.*.max_in_flight", kinds.REQUESTS, "", "Requests sent to the engine at once; more wait."),
    Key("models.*.max_queue", kinds.REQUESTS, "", "Requests that may wait for this model; one more is answered with 429."),
    Key("models.*.ttl_secs", kinds.SECONDS_ABOVE_0, "", "Put the model to sleep after this long without a request."),
    Key("models.*.start_timeout_secs", kinds.SECONDS_ABOVE_0, "start_timeout_secs", "How long this engine may take to start."),
    Key("models.*.priority", kinds.FACTOR_ABOVE_0, "1", "tenure: how many times the waiting of this model's requests counts."),
    Key("keys[].name", kinds.KEY_NAME, "", "Who has the key; it stands in the access log.", required=True),
    Key("keys[].sha256", kinds.SHA256, "", "The hash of the key, which itself is written nowhere.", required=True, secret=True),
    Key("keys[].models", kinds.SOME_NAMES, "", "The models that it may use, instead of all."),
    Key("keys[].requests_per_minute", kinds.REQUESTS, "", "Requests that it may make in any 60 seconds; one more is answered with 429."),
    Key("keys[].max_parallel", kinds.REQUESTS, "", "Requests that it may have at once, waiting ones included; one more is answered with 429."),
    Key("keys[].priority", kinds.PRIORITY, "0", "The place of its requests in the queue of a model, higher ones first; the header x-llmux-priority may ask for less, and not for more."),
    Key("policy.policy_type", kinds.TEXT, '"tenure"', "Which model is next: tenure, fifo, cost_aware, time_slice, or an installed package's."),
    Key("policy.request_timeout_secs", kinds.SECONDS_ABOVE_0, "300", "How long a request waits for its model before it is answered with 504."),
    Key("policy.drain_before_switch", kinds.BOOLEAN, "true", "Wait for the requests in flight before a switch; if false they are paused, or cut off where the engine is stopped."),
    Key("policy.in_flight", kinds.IN_FLIGHT, '"drain"', "What a switch does with requests in flight: drain waits for them, park pauses them in the engine until its next wake."),
    Key("policy.eviction", kinds.EVICTION, '"offload+keep_running"', "The eviction of models that do not name one."),
    Key("policy.min_active_secs", kinds.SECONDS, "0", "How long a model stays awake before another one may push it out; 5 by default under fifo, cost_aware and time_slice, which give no turns of their own."),
    Key("policy.coalesce_window_ms", kinds.MILLISECONDS, "2000", "cost_aware: how long to collect requests before a switch."),
    Key("policy.amortization_factor", kinds.FACTOR, "0.5", "cost_aware: how much waiting work a switch has to be worth."),
    Key("policy.max_wait_secs", kinds.SECONDS, "15", "The wait that forces a switch: under cost_aware at once, under time_slice when the next request comes, under tenure with 19 times the cost of a switch added."),
    Key("policy.tick_interval_ms", kinds.MILLISECONDS_ABOVE_0, "500", "time_slice: how often the queues are looked at."),
    Key("policy.min_quantum_ms", kinds.MILLISECONDS, "2000", "Accepted from llmux 0.7, which does not use it either."),
    Key("checkpoint.criu_path", kinds.TEXT, '"criu"', "The criu program."),
    Key("checkpoint.cuda_plugin_dir", kinds.TEXT, '"/usr/lib/criu/"', "The folder of CRIU's CUDA plugin."),
    Key("checkpoint.images_dir", kinds.PATH, '"/tmp/llmux-checkpoints"', "Where images are kept, a folder per model."),
    Key("checkpoint.cuda_checkpoint_path", kinds.TEXT, '"cuda-checkpoint"', "The cuda-checkpoint program."),
    Key("checkpoint.keep_images", kinds.BOOLEAN, "true", "Keep the images after a restore."),
    Key("checkpoint.object_store.endpoint", kinds.TEXT, "", "The URL of an S3-compatible store.", required=True),
    Key("checkpoint.object_store.bucket", kinds.TEXT, "", "The bucket in it.", required=True),
    Key("checkpoint.object_store.access_key", kinds.TEXT, "", "The access key, if it is to stand here.", secret=True),
    Key("checkpoint.object_store.secret_key", kinds.TEXT, "", "The secret key, if it is to stand here.", secret=True),
    Key("checkpoint.object_store.access_key_file", kinds.PATH, "", "The file that has the access key, instead; a name without a folder is that of a systemd credential."),
    Key("checkpoint.object_store.secret_key_file", kinds.PATH, "", "The file that has the secret key; likewise."),
    Key("checkpoint.object_store.region", kinds.TEXT, '"us-east-1"', "The region."),
)  # fmt: skip
"""Every key, in the order of the documentation."""

NOT_YET = frozenset({"models.*.gpus", "models.*.memory"})
"""Keys that are reserved: an error of their own says so."""

TABLES: dict[str, dict[str, Key]] = {"": {}}
"""Table path -> the names of its keys -> key. The path of an array of tables ends in `[]`."""
for _key in KEYS:
    _table, _, _key_name = _key.path.rpartition(".")
    TABLES.setdefault(_table, {})[_key_name] = _key


def tables_in(table: str) -> frozenset[str]:
    """The names of the tables, and of the arrays of tables, that a table holds."""
    prefix = f"{table}." if table else ""
    return frozenset(
        other.removeprefix(prefix).partition(".")[0].removesuffix("[]")
        for other in TABLES
        if other != table and other.startswith(prefix)
    )


def homes_of(name: str) -> list[str]:
    """The tables that have a key of this name."""
    return [table for table, keys in TABLES.items() if name in keys]


def nearest(word: str, known: Collection[str]) -> str | None:
    """The known word that was probably meant, whatever its case; None if nothing is near."""
    folded = {other.casefold(): other for other in sorted(known)}
    close = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=0.6)
    return folded[close[0]] if close else None
