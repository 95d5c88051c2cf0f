"""`llmuxd --demo`: three simulated models on one simulated 24 GiB device, everything in a temporary folder."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path

import click

from llmuxd.app import App
from llmuxd.config import parse_config
from llmuxd.daemon import Ending, serve
from llmuxd.protocol import RUNTIME_DIR_ENV, STATE_DIR_ENV
from llmuxd.sim.ledger import GIB, Ledger

DEVICE_GIB = 24
PREFERRED_PORT = 3000

MODELS = {"qwen": 14.0, "mistral": 13.5, "phi": 7.5}
"""Name -> size of its weights in GiB."""

SCALE = 0.1
"""The simulated engines load, sleep and wake ten times faster than real ones of these sizes would."""


async def run_demo(port: int | None) -> Ending:
    """Serve the demonstration until SIGTERM or Ctrl-C. `port` None takes 3000, or a free one if that is taken."""
    with tempfile.TemporaryDirectory(prefix="llmux-demo-") as folder:
        home = Path(folder)
        device = home / "device"
        Ledger.create(device, DEVICE_GIB * GIB)
        models = {
            name: {
                "model_path": f"simulated/{name}",
                "env": {
                    "LLMUX_SIM_WEIGHTS_GIB": str(size),
                    "LLMUX_SIM_LEDGER": str(device),
                    "LLMUX_SIM_SCALE": str(SCALE),
                },
            }
            for name, size in MODELS.items()
        }
        environ = {**os.environ, RUNTIME_DIR_ENV: str(home / "run"), STATE_DIR_ENV: str(home / "state")}
        config = parse_config(
            {
                "port": _free_port() if port is None else port,
                "metrics_port": 0,
                "vllm_command": [sys.executable, "-m", "llmuxd.sim.vllm"],
                "policy": {"min_active_secs": 1},
                "models": models,
            },
            "the demo's config",
            environ,
        )
        return await serve(config, on_ready=_tell)


def _free_port() -> int:
    """The preferred port if nobody has it, else 0: any."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", PREFERRED_PORT))
        except OSError:
            return 0
    return PREFERRED_PORT


def _tell(app: App, port: int) -> None:
    """Print what there is to try."""
    ctl = Path(sys.argv[0]).with_name("llmuxctl")
    command = f"{ctl if ctl.exists() else 'llmuxctl'} --socket {app.runtime.config.control_socket}"
    question = '{"model": "%s", "messages": [{"role": "user", "content": "Hello"}]%s}'
    post = f"curl http://127.0.0.1:{port}/v1/chat/completions -H 'Content-Type: application/json' -d"
    streamed = ', "stream": true'
    names = list(MODELS)
    lines = [
        f"Three simulated models share one simulated {DEVICE_GIB} GiB device: {', '.join(names)}.",
        "Ask one, then another, and see how they take turns:",
        "",
        f"  {post} '{question % (names[0], '')}'",
        f"  {post} '{question % (names[1], streamed)}'",
        f"  curl http://127.0.0.1:{port}/v1/models",
        "",
        f"  {command} status",
        f"  {command} switch {names[2]}",
        f"  {command} logs {names[0]}",
        "",
        "Ctrl-C ends it and removes its files.",
    ]
    click.echo("\n".join(lines))
    sys.stdout.flush()
