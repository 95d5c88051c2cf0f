"""The checks of what engines need besides a GPU: models, host memory, locked memory, disks, shared memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmuxctl.doctor.finding import GIB, Finding, fail, listed, ok, size, skipped, warn
from llmuxctl.doctor.situation import Situation
from llmuxctl.doctor.vllm import installed
from llmuxctl.output import count

if TYPE_CHECKING:
    from llmuxd.config import ModelConfig

UNLIMITED = 1 << 62
_LITTLE_STATE = 1 * GIB
_LITTLE_CACHE = 20 * GIB
_LITTLE_IMAGES = 20 * GIB
_NEARLY_NONE = GIB // 10
_LITTLE_SHM = 1 * GIB
_PINNED_ROUNDING = 2
"""PyTorch rounds pinned memory up, to nearly twice."""


def _hub(there: Situation, model: ModelConfig | None = None) -> str:
    """The folder of the Hugging Face cache that an engine uses."""
    environ = {**there.environ, **(model.env if model is not None else {})}
    if environ.get("HF_HUB_CACHE"):
        return environ["HF_HUB_CACHE"]
    cache = environ.get("XDG_CACHE_HOME") or f"{environ.get('HOME') or '/root'}/.cache"
    return f"{environ.get('HF_HOME') or f'{cache}/huggingface'}/hub"


def _folders(there: Situation, model: ModelConfig) -> list[str]:
    """Where a model's files are; empty if they are nowhere yet."""
    path = model.model_path
    if path.startswith("/"):
        return [path] if there.box.exists(path) else []
    return there.box.list(_hub(there, model), f"models--{path.replace('/', '--')}/snapshots/*")[-1:]


def _weights(there: Situation, model: ModelConfig) -> int | None:
    """The bytes of a model's weights; None if they are not here."""
    for folder in _folders(there, model):
        for pattern in ("*.safetensors", "*.bin", "*.gguf"):
            files = there.box.list(folder, pattern)
            if files:
                return sum(there.box.path(file).stat().st_size for file in files if there.box.exists(file))
    return None


def models(there: Situation) -> Finding:
    """That local models are there, and readable; that the others are, or will be fetched."""
    if there.config is None:
        return skipped("the config does not say which")
    configured = there.config.models
    if not configured:
        return warn("none are configured", f"Add one to {there.config_path}: a table [models.NAME] with a model_path.")
    local = {name: model for name, model in configured.items() if model.model_path.startswith("/")}
    missing = [f"{name}: {model.model_path}" for name, model in local.items() if not there.box.exists(model.model_path)]
    if missing:
        return fail(f"not there: {listed(missing)}", "Correct model_path, or put the model there.")
    closed = [
        f"{name}: {model.model_path}"
        for name, model in local.items()
        if there.box.may(there.user, model.model_path.rstrip("/"), 5) is False
    ]
    if closed:
        return fail(f"{there.user.name} may not read {listed(closed)}", "chmod -R go+rX the folder, and its parents.")
    remote = [name for name in configured if name not in local and not _folders(there, configured[name])]
    if remote and there.environ.get("HF_HUB_OFFLINE") == "1":
        return fail(f"not in {_hub(there)}: {listed(remote)}", "HF_HUB_OFFLINE=1 forbids fetching them: unset it.")
    if remote:
        return ok(
            f"{count(len(configured), 'model')}; not in {_hub(there)} yet, fetched at the first start: {listed(remote)}"
        )
    return ok(f"{count(len(configured), 'model')}, with all files here")


def memlock(there: Situation) -> Finding:
    """The limit of locked memory, which the pinned memory of sleeping models may count against."""
    limit, whose = _memlock_limit(there)
    if limit is None:
        return skipped("the limit cannot be read")
    said = "unlimited" if limit >= UNLIMITED else size(limit)
    found = installed(there)
    if limit >= UNLIMITED or not _offloaded(there) or (found is not None and found.is_cpu):
        return ok(f"{said} ({whose})")
    if there.by_unit:
        advice = "systemctl edit llmuxd: [Service] LimitMEMLOCK=infinity; then systemctl restart llmuxd"
    else:
        advice = "Start llmuxd under `ulimit -l unlimited` (root, or memlock in /etc/security/limits.conf)."
    return warn(f"{said} ({whose}): sleeping models lie in pinned memory, and theirs may be refused", advice)


def _memlock_limit(there: Situation) -> tuple[int | None, str]:
    """Of the running daemon; else what the unit gives it; else this shell's."""
    if there.pid is not None:
        limit = _limit_in(there.box.read(f"/proc/{there.pid}/limits"))
        if limit is not None:
            return limit, "the running daemon"
    if there.by_unit and there.unit.get("LimitMEMLOCK"):
        text = there.unit["LimitMEMLOCK"]
        return (int(text) if text.isdecimal() else UNLIMITED), "by its unit"
    return _limit_in(there.box.read("/proc/self/limits")), "of this shell"


def _limit_in(limits: str | None) -> int | None:
    for line in (limits or "").splitlines():
        if line.startswith("Max locked memory"):
            soft = line.split()[3]
            return UNLIMITED if soft == "unlimited" else int(soft)
    return None


def _offloaded(there: Situation) -> list[ModelConfig]:
    """The models whose weights go to host memory when they sleep."""
    configured = there.config.models.values() if there.config is not None else ()
    return [
        model
        for model in configured
        if str(model.eviction) == "auto"
        or (str(model.eviction).startswith("offload+") and not str(model.eviction).endswith("+stop"))
    ]


def ram(there: Situation) -> Finding:
    """Host memory, against the weights that sleep in it."""
    total = _meminfo(there, "MemTotal")
    if total is None:
        return skipped("/proc/meminfo cannot be read")
    if there.config is None:
        return skipped(f"{size(total)}; the config does not say what sleeps in it")
    sizes = [_weights(there, model) for model in _offloaded(there)]
    known = [each for each in sizes if each is not None]
    found = f"{size(total)}"
    if not sizes:
        return ok(f"{found}; no model sleeps in it")
    unknown = f", and {len(sizes) - len(known)} of unknown size" if len(known) < len(sizes) else ""
    if not known:
        return ok(f"{found}; {count(len(sizes), 'model')} of unknown size asleep in it")
    needed = sum(known)
    found += f"; {count(len(known), 'model')} with {size(needed)} of weights asleep in it{unknown}"
    advice = 'Give the largest, or those least used, eviction = "discard+keep_running": no host memory, a slower wake.'
    if needed > total:
        return fail(found, advice)
    if needed * _PINNED_ROUNDING > total:
        return warn(f"{found}; pinned memory is rounded up, to nearly twice", advice)
    return ok(found)


def _meminfo(there: Situation, name: str) -> int | None:
    for line in (there.box.read("/proc/meminfo") or "").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return None


def state_disk(there: Situation) -> Finding:
    """Room for logs and the state file."""
    folder = str(there.config.state_dir) if there.config is not None else "/var/lib/llmux"
    folder = there.environ.get("LLMUX_STATE_DIR") or folder
    return _disk(there, folder, _LITTLE_STATE, "Logs of engines and the state file are in it: make room.")


def cache_disk(there: Situation) -> Finding:
    """Room for models that are fetched."""
    advice = "Models are fetched into it: make room, or set HF_HOME to a larger disk (/etc/default/llmuxd)."
    return _disk(there, _hub(there), _LITTLE_CACHE, advice)


def images_disk(there: Situation) -> Finding:
    """Room for the images of checkpoints."""
    from llmuxctl.doctor.checkpoints import wanted

    if there.config is None or not wanted(there):
        return skipped("no model is checkpointed")
    folder = str(there.config.checkpoint.images_dir)
    advice = "An image is as large as its engine, weights included: set checkpoint.images_dir to a larger disk."
    return _disk(there, folder, _LITTLE_IMAGES, advice)


def _disk(there: Situation, folder: str, little: int, advice: str) -> Finding:
    found = there.box.free(folder)
    if found is None:
        return skipped(f"{folder} cannot be looked at")
    free, total = found
    text = f"{size(free)} of {size(total)} free for {folder}"
    if free < _NEARLY_NONE:
        return fail(text, advice)
    return warn(text, advice) if free < little else ok(text)


def shared_memory(there: Situation) -> Finding:
    """/dev/shm, over which the processes of an engine talk."""
    found = there.box.free("/dev/shm") if there.box.exists("/dev/shm") else None
    if found is None:
        return fail("there is no /dev/shm", "mount -t tmpfs tmpfs /dev/shm")
    free, total = found
    if total < _LITTLE_SHM:
        return warn(
            f"{size(total)}", "In a container: --shm-size=8g, or --ipc=host. Else: mount -o remount,size=50% /dev/shm"
        )
    if free < _LITTLE_SHM // 4:
        return warn(f"{size(free)} of {size(total)} free", "Look for files of processes that are gone: ls -l /dev/shm")
    return ok(f"{size(free)} of {size(total)} free")
