"""curl: what shells and scripts send, and the corners of HTTP that it reaches."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.clients.stack import TIMEOUT_SECS, Stack

JSON = ("-H", "Content-Type: application/json")

TRANSFER_CLOSED = 18
"""What curl ends with when an answer is cut."""


@dataclass
class Answer:
    """What curl has printed, with `-i`: the last head, and the body."""

    version: str
    status: int
    headers: dict[str, str]
    body: str

    @property
    def text(self) -> str:
        return str(json.loads(self.body)["choices"][0]["text"])


def curl(stack: Stack, path: str, *arguments: str) -> Answer:
    command = ["curl", "-sS", "-i", "--max-time", f"{TIMEOUT_SECS:g}", *arguments, f"{stack.address}{path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECS * 2)
    assert done.returncode == 0, done.stderr
    head, _, body = done.stdout.replace("\r\n", "\n").partition("\n\n")
    while head.split(" ")[1].startswith("1"):
        head, _, body = body.partition("\n\n")
    first, *lines = head.split("\n")
    pairs = [line.partition(": ") for line in lines]
    return Answer(first.split(" ")[0], int(first.split(" ")[1]), {k.lower(): v for k, _, v in pairs}, body)


def prompt(model: str, **more: object) -> str:
    return json.dumps({"model": model, "prompt": "x", "max_tokens": 3, **more})


def test_a_request_as_in_the_readme(stack: Stack, model):
    assert curl(stack, "/v1/completions", *JSON, "-d", prompt(model)).text.split()[0] == model


def test_a_stream(stack: Stack, model):
    answer = curl(stack, "/v1/completions", "-N", *JSON, "-d", prompt(model, stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.body.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("fault", ["dead_in_stream=3*1", "die_after_tokens=3*1", "cut_body=3*1"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_stream_that_breaks_does_not_look_finished(broken: Stack, path, fault):
    broken.ask("cedar")
    broken.fault("cedar", "stall_stream=3")
    message = [{"role": "user", "content": "hello"}]
    body = json.dumps({"model": "cedar", "messages": message, "input": "hello", "max_tokens": 50, "stream": True})
    command = ["curl", "-sS", "-N", "--max-time", f"{TIMEOUT_SECS:g}", *JSON, "-d", body, f"{broken.address}{path}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reading:
        assert reading.stdout is not None
        assert reading.stdout.readline()
        broken.fault("cedar", fault)
        said = reading.stdout.read()
    assert "error" in said.rsplit("data: ", 1)[1], "the last event tells it"
    # There vLLM ends its stream with an event of Anthropic's own for it, which no client takes for an end.
    told_by_vllm = path == "/v1/messages" and fault.startswith("dead_in_stream")
    assert reading.returncode == TRANSFER_CLOSED or told_by_vllm, said


def test_a_form(stack: Stack, model, tmp_path: Path):
    sound = tmp_path / "speech.wav"
    sound.write_bytes(bytes(3_000_000))
    answer = curl(stack, "/v1/audio/transcriptions", "-F", f"file=@{sound}", "-F", f"model={model}")
    assert (answer.status, json.loads(answer.body)["bytes"]) == (200, 3_000_000)


def test_a_large_body_is_sent_when_it_is_asked_for(stack: Stack, tmp_path: Path):
    body = tmp_path / "body.json"
    body.write_text(prompt("cedar", prompt="word " * 1_000_000))
    answer = curl(
        stack, "/v1/completions", *JSON, "-H", "Expect: 100-continue", "--expect100-timeout", "20", "-d", f"@{body}"
    )
    assert answer.text.split()[0] == "cedar"


def test_a_body_in_chunks(stack: Stack, model):
    answer = curl(stack, "/v1/completions", *JSON, "-H", "Transfer-Encoding: chunked", "-d", prompt(model))
    assert answer.text.split()[0] == model


@pytest.mark.parametrize("streamed", [False, True])
def test_http_1_0(stack: Stack, streamed):
    answer = curl(stack, "/v1/completions", "--http1.0", *JSON, "-d", prompt("cedar", stream=streamed))
    assert answer.status == 200
    assert "transfer-encoding" not in answer.headers
    assert "cedar" in answer.body


def test_an_upgrade_to_http_2_is_not_taken(stack: Stack):
    answer = curl(stack, "/v1/completions", "--http2", *JSON, "-d", prompt("cedar"))
    assert (answer.version, answer.text.split()[0]) == ("HTTP/1.1", "cedar")


def test_a_connection_is_used_again(stack: Stack):
    url = f"{stack.address}/v1/completions"
    written = ["-w", "%{num_connects} ", "-o", "/dev/null"]
    command = ["curl", "-sS", *JSON, "-d", prompt("cedar"), *written, url, *written, url, *written, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECS)
    assert done.stdout.split() == ["1", "0", "0"]


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/v1/models/cedar"])
def test_a_head_without_a_body(stack: Stack, path):
    answer = curl(stack, path, "-I")
    assert (answer.status, answer.body) == (200, "")
    assert answer.headers["content-length"] == curl(stack, path).headers["content-length"]


def test_options(stack: Stack):
    answer = curl(stack, "/v1/chat/completions", "-X", "OPTIONS")
    assert (answer.status, answer.body) == (204, "")
    assert "POST" in answer.headers["allow"]
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_no_page_may_ask_unless_it_is_allowed_to(stack: Stack):
    page = ("-H", "Origin: http://page.test")
    answer = curl(stack, "/v1/completions", *page, *JSON, "-d", prompt("cedar"))
    assert answer.status == 200
    assert not [name for name in answer.headers if name.startswith("access-control-")], "the engine's are dropped"


@pytest.mark.parametrize(
    "path",
    [
        "/sleep?model=cedar",
        "/%73leep?model=cedar",
        "/v1/../sleep?model=cedar",
        "//sleep?model=cedar",
        "/upstream/cedar/sleep",
    ],
)
def test_no_development_endpoint(stack: Stack, path):
    answer = curl(stack, path, "--path-as-is", *JSON, "-d", "{}")
    assert answer.status in (400, 404)


def test_upstream(stack: Stack, model):
    assert json.loads(curl(stack, f"/upstream/{model}/version").body) == {"version": "0.32.0"}
    answer = curl(stack, f"/upstream/{model}/v1/completions", *JSON, "-d", prompt(model))
    assert answer.text.split()[0] == model


@pytest.mark.parametrize(
    "path", ["/tokenize", "/v1/rerank", "/v2/rerank", "/score", "/classify", "/pooling", "/v2/embed"]
)
def test_what_no_package_is_for(stack: Stack, path):
    body = {"query": "q", "documents": ["a"], "input": "a", "text_1": "a", "text_2": "b", "texts": ["a"], "prompt": "a"}
    assert curl(stack, path, *JSON, "-d", json.dumps({"model": "birch", **body})).status == 200
