"""The proxy in a real daemon: keys and limits that a reload changes, and the access log."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from tests.integration.stack import Daemon, until

SECRET = "llmux-a-key-that-nobody-may-see"
PROMPT = "a-prompt-that-nobody-may-see"


def reload(stack: Daemon) -> list[str]:
    stack.write_config()
    done = stack.ctl("--json", "reload")
    assert done.returncode == 0, done.stderr
    return [change["path"] for change in json.loads(done.stdout.splitlines()[-1])["changes"]]


def key(name: str, secret: str = SECRET, **bounds: Any) -> dict[str, Any]:
    return {"name": name, "sha256": hashlib.sha256(secret.encode()).hexdigest(), **bounds}


def ask(stack: Daemon, secret: str = "", model: str = "a", **headers: str) -> Any:
    if secret:
        headers["authorization"] = f"Bearer {secret}"
    body = {"model": model, "prompt": PROMPT, "max_tokens": 3}
    return stack.request("POST", "/v1/completions", body, headers)


def log_lines(stack: Daemon) -> list[dict[str, str]]:
    """What the access log says of requests that a test gave an id, a dictionary for each line."""
    text = stack.log.read_text()
    return [dict(re.findall(r"(\S+?)=(\S+)", line)) for line in text.splitlines() if " id=mine" in line]


def test_keys_and_limits_count_from_the_reload_on(daemon):
    stack = daemon("a", "b").start()
    assert ask(stack).status == 200
    stack.top["keys"] = [key("alice", models=["a"], max_parallel=2)]
    stack.top["max_body_bytes"] = 300
    assert sorted(reload(stack)) == ["keys.alice", "max_body_bytes"]
    nobody = ask(stack)
    assert (nobody.status, nobody.json["error"]["code"]) == (401, "invalid_api_key")
    assert nobody.headers["www-authenticate"] == "Bearer"
    assert ask(stack, "wrong").status == 401
    assert ask(stack, SECRET).status == 200
    assert ask(stack, SECRET, "b").json["error"]["code"] == "model_not_allowed"
    assert stack.get("/health").status == 200
    large = stack.request("POST", "/v1/completions", {"model": "a", "prompt": "x" * 400}, {"x-api-key": SECRET})
    assert large.json["error"]["code"] == "body_too_large"
    del stack.top["keys"]
    assert reload(stack) == ["keys.alice"]
    assert ask(stack).status == 200


def test_the_access_log_tells_who_asked_for_what_and_not_what_was_said(daemon):
    stack = daemon("a", "b", top={"keys": [key("alice")]}).start()
    answer = ask(stack, SECRET, **{"x-request-id": "mine-1"})
    assert answer.status == 200
    assert ask(stack, SECRET, "nothing", **{"x-request-id": "mine-2"}).status == 404
    assert ask(stack, "llmux-a-wrong-key", **{"x-request-id": "mine-3"}).status == 401
    until(lambda: len(log_lines(stack)) == 3, "three lines")
    served, unknown, refused = log_lines(stack)
    usage = answer.json["usage"]
    assert {name: served[name] for name in ("id", "key", "model", "method", "path", "status")} == {
        "id": "mine-1",
        "key": "alice",
        "model": "a",
        "method": "POST",
        "path": "/v1/completions",
        "status": "200",
    }
    assert int(served["out"]) == len(answer.body)
    assert (served["prompt_tokens"], served["completion_tokens"]) == (
        str(usage["prompt_tokens"]),
        str(usage["completion_tokens"]),
    )
    assert (
        0 < float(served["switch"]) <= float(served["queue"]) <= float(served["first_byte"]) <= float(served["total"])
    )
    assert (unknown["id"], unknown["key"], unknown["model"], unknown["status"]) == ("mine-2", "alice", "-", "404")
    assert (refused["id"], refused["key"], refused["status"]) == ("mine-3", "-", "401")
    text = stack.log.read_text()
    assert PROMPT not in text
    assert SECRET not in text
    assert "llmux-a-wrong-key" not in text


def test_without_an_access_log_there_is_none(daemon):
    stack = daemon("a", top={"access_log": False}).start()
    assert ask(stack, **{"x-request-id": "mine"}).status == 200
    stack.stop()
    assert log_lines(stack) == []
    assert "a: starting -> awake" in stack.log.read_text()
