"""What a request says about itself: who it is from, which model it wants, how long it waits, how urgent it is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from llmuxd.config import KeyConfig
from tests.wire.cases import BODY, Case, check, declined, refused, rejected, said, served, table
from tests.wire.client import Answer, Client, get, post, request
from tests.wire.engine import OK, ok
from tests.wire.stack import MAX_BODY, Wire, play, until


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


KEYS = (
    KeyConfig("all", hashed("sk-all"), priority=10),
    KeyConfig("some", hashed("sk-some"), models=("b",)),
    KeyConfig("few", hashed("sk-few"), requests_per_minute=2),
    KeyConfig("one", hashed("sk-one"), max_parallel=1, priority=-5),
    KeyConfig("odd", hashed("sk-gr\u00fcn \u2713")),
)


def bearer(key: str) -> str:
    return f"Authorization: Bearer {key}"


async def whole(client: Client, method: str = "POST") -> Answer:
    answer = await client.answer(method)
    assert answer is not None
    return answer


# How long and how urgent


WAITS = [
    "",
    "-1",
    "-0",
    "+1",
    "1.",
    ".5",
    "1e3",
    "inf",
    "nan",
    "soon",
    "0x10",
    "1,5",
    "1 2",
    "1s",
    "\xb2",
    "1_0",
    "9" * 30,
]
PRIORITIES = [
    "",
    "101",
    "-101",
    "1000",
    "1.5",
    "1e1",
    "high",
    "0x1",
    "- 5",
    "--5",
    "5 5",
    "\xb9",
    "1_0",
    "9" * 30,
    "+",
    "-",
]

HINTS = [
    *(rejected(f"a wait of {wait[:9]!a}", post(BODY, f"x-llmux-wait: {wait}"), "400 invalid_wait") for wait in WAITS),
    *(rejected(f"a priority of {wanted[:9]!a}", post(BODY, f"x-llmux-priority: {wanted}"), "400 invalid_priority") for wanted in PRIORITIES),
    *(rejected(f"a priority of {wanted}, without a key", post(BODY, f"x-llmux-priority: {wanted}"), "403 priority_not_allowed") for wanted in (1, 100)),
    refused("two waits", post(BODY, "x-llmux-wait: 1", "x-llmux-wait: 2"), ("400 bad_request", "400 invalid_wait")),
    refused("two priorities", post(BODY, "x-llmux-priority: 0", "x-llmux-priority: 0"), ("400 bad_request", "400 invalid_priority")),
    *(served(f"a good wait of {wait!a}", post(BODY, f"X-LLMUX-WAIT: {wait}")) for wait in ("1", " 10 ", "300", "0.5")),
    *(served(f"a good priority of {wanted}", post(BODY, f"X-Llmux-Priority: {wanted}")) for wanted in ("0", "-1", "-100", " -7 ", "-0")),
]  # fmt: skip


@table(HINTS)
def test_hints(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


def test_a_client_that_does_not_wait(tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(post(BODY, "x-llmux-wait: 0"))
        answer = await whole(client)
        assert answer.status in (429, 503, 504)
        assert int(answer.get("retry-after") or "") >= 1
        await client.send(post(BODY, "x-llmux-wait: 5"))
        await until(lambda: wire.switcher.state.queued == 1, "it is queued")
        wire.pass_time(6.0)
        assert said(await whole(client)) == "504 queue_timeout"
        assert wire.engine.received == 0

    play(tmp_path, scenario, holds=("a",))


def test_hints_are_not_passed_on(tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(post(BODY, "x-llmux-wait: 5", "x-llmux-priority: -1", "model-override: a"))
        await whole(client)
        names = {name for name, _ in wire.engine.asked[0].headers}
        assert not {name for name in names if "llmux" in name or name == "model-override"}

    play(tmp_path, scenario, ok)


# Which model


FORM = "Content-Type: multipart/form-data; boundary=xyz"


def form(body: bytes, kind: str = FORM) -> bytes:
    return request("POST /v1/audio/transcriptions HTTP/1.1", "Host: h", kind, f"Content-Length: {len(body)}", body=body)


def part(name: bytes, value: bytes, end: bytes = b"") -> bytes:
    return b'--xyz\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n%b' % (name, value, end)


WHOLE_FORM = part(b"x", b"y") + part(b"model", b"a", b"--xyz--\r\n")
MODELS = [
    *(declined(f"JSON: {body!a}", post(body), "400 invalid_json") for body in (b"{", b"nonsense", b'{"model": "a"', b'{"model": "a"}}', b"\xff\xfe", b"\x00", b"{'model': 'a'}", b'{"model": "a",}', b'{"model": "a"} {"model": "b"}')),
    *(declined(f"no model: {body!a}", post(body), "400 model_required") for body in (b"", b"{}", b'{"Model": "a"}', b'{"model": null}', b'{"model": ""}', b"[]", b'"a"', b"1", b'{"x": {"model": "a"}}')),
    *(declined(f"a model that is no name: {body!a}", post(body), "400 invalid_model") for body in (b'{"model": 1}', b'{"model": ["a"]}', b'{"model": {"a": 1}}', b'{"model": true}')),
    *(declined(f"a model that is none: {body!a}", post(body), "404 model_not_found") for body in (b'{"model": "z"}', b'{"model": "A"}', b'{"model": " a"}', b'{"model": "a\\u0000"}', b'{"model": "../a"}', '{"model": "\u00e4"}'.encode(), b'{"model": "\\ud800"}', b'{"model": "a", "model": "z"}')),
    declined("a number of great length", post(b'{"x": ' + b"9" * 10_000 + b"}"), ("400 invalid_json", "400 model_required")),
    declined("a model of great length", post(b'{"model": "' + b"x" * 500_000 + b'"}'), ("404 model_not_found", "400 invalid_model", "400 invalid_json")),
    declined("a compressed body", post(b"\x1f\x8b", "Content-Encoding: gzip"), "400 unreadable_body"),
    declined("a form without a boundary", form(WHOLE_FORM, "Content-Type: multipart/form-data"), "400 invalid_form"),
    declined("a form with another boundary", form(WHOLE_FORM, FORM + "z"), ("400 invalid_form", "400 model_required")),
    declined("a form that ends too soon", form(WHOLE_FORM[:-12]), "400 invalid_form"),
    declined("a form whose part has no head", form(b"--xyz\r\nbody\r\n--xyz--\r\n"), "400 invalid_form"),
    declined("a form without a model", form(part(b"x", b"y", b"--xyz--\r\n")), "400 model_required"),
    declined("a form whose model is no text", form(part(b"model", b"\xff", b"--xyz--\r\n")), "400 invalid_model"),
    declined("a form whose model is unknown", form(part(b"model", b"z", b"--xyz--\r\n")), "404 model_not_found"),
    served("a form", form(WHOLE_FORM), WHOLE_FORM),
    declined("an override that is unknown", post(BODY, "model-override: z"), "404 model_not_found"),
    declined("an override with a strange letter", post(BODY, "model-override: \xe4"), "404 model_not_found"),
    declined("a query that is unknown", post(BODY, target="/v1/completions?model=z"), "404 model_not_found"),
    served("a query of which the last counts", post(BODY, target="/v1/completions?model=z&model=a")),
    served("a model of which the last counts", post(b'{"model": "z", "model": "a"}'), b'{"model": "z", "model": "a"}'),
    served("a model in escapes", post(b'{"\\u006dodel": "\\u0061"}'), b'{"\\u006dodel": "\\u0061"}'),
    served("JSON with a byte order mark, the model beside it", post(b"\xef\xbb\xbf{}", "model-override: a"), b"\xef\xbb\xbf{}"),
]  # fmt: skip


@table(MODELS)
def test_models(case: Case, tmp_path: Path) -> None:
    """Whatever is wrong with a body that was read, the connection stays."""
    check(case, tmp_path)


@pytest.mark.parametrize("depth", [10_000, 200_000])
def test_json_of_great_depth_breaks_nothing(depth: int, tmp_path: Path) -> None:
    """Whether it is JSON is its engine's to say, if it is not said here."""

    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        for opening, closing in ((b"[", b"]"), (b'{"x":', b"}")):
            await client.send(post(b'{"model": "a", "x": ' + opening * depth + b"1" + closing * depth + b"}"))
            assert said(await whole(client)) in ("200", "400 invalid_json", "413 body_too_large")
            client = await wire.connect()

    play(tmp_path, scenario, ok)


def test_a_stored_response_that_nobody_has_made(tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        for method, target in (
            ("GET", "/v1/responses/resp_1"),
            ("DELETE", "/v1/responses/resp_1"),
            ("POST", "/v1/responses/resp_1/cancel"),
        ):
            await client.send(get(target, method=method))
            assert said(await whole(client)) == "404 response_not_found"
        assert wire.engine.received == 0

    play(tmp_path, scenario, ok)


# Who


UNKNOWN = {
    "none": [],
    "an empty bearer": ["Authorization: Bearer "],
    "an empty field": ["x-api-key:"],
    "another key": [bearer("sk-other")],
    "a key with a letter more": [bearer("sk-alls")],
    "a key with a letter less": [bearer("sk-al")],
    "a key in capitals": [bearer("SK-ALL")],
    "a key in quotes": [bearer('"sk-all"')],
    "two keys in one field": [bearer("sk-all, sk-some")],
    "the key as basic": ["Authorization: Basic sk-all"],
    "the key alone": ["Authorization: sk-all"],
    "the key without a space": ["Authorization: Bearersk-all"],
    "the key of another field": ["api-key: sk-all"],
    "the key in a cookie": ["Cookie: Authorization=sk-all"],
    "the hash": [bearer(hashed("sk-all"))],
    "the name": [bearer("all")],
    "no text": [bearer("\xff\xfe")],
    "a key of great length": [bearer("x" * 30_000)],
    "two different ones": [bearer("sk-all"), "x-api-key: sk-some"],
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_without_a_good_key_nothing_is_served(kind: str, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        for sent in (
            post(BODY, *UNKNOWN[kind]),
            get("/v1/models", *UNKNOWN[kind]),
            get("/v1/models/a", *UNKNOWN[kind]),
            get("/upstream/a/version", *UNKNOWN[kind]),
            post(BODY, "Expect: 100-continue", *UNKNOWN[kind]).removesuffix(BODY),
            post(b"\xff", *UNKNOWN[kind], target="/v1/messages"),
            post(b'{"model": "z"}', *UNKNOWN[kind]),
        ):
            client = await wire.connect()
            await client.send(sent)
            answer = await whole(client)
            assert answer.status == 401
            assert answer.informed == []
            assert answer.get("www-authenticate") == "Bearer"
            assert json.loads(answer.body)["error"]["type"] in ("invalid_request_error", "authentication_error")
        await client.send(get("/health"))
        assert wire.engine.received == 0
        for sent, status in ((get("/health"), 200), (get("/v1/models", method="OPTIONS"), 204)):
            client = await wire.connect()
            await client.send(sent)
            assert (await whole(client)).status == status

    play(tmp_path, scenario, ok, keys=KEYS)


def test_a_query_may_not_carry_a_key(tmp_path: Path) -> None:
    check(
        rejected("x", post(BODY, target="/v1/completions?api_key=sk-all&key=sk-all"), "401 invalid_api_key"),
        tmp_path,
        keys=KEYS,
    )


@pytest.mark.parametrize(
    "lines",
    [
        [bearer("sk-all")],
        ["authorization: bearer sk-all"],
        ["AUTHORIZATION: BEARER   sk-all  "],
        ["x-api-key: sk-all"],
        ["X-Api-Key:sk-all"],
        [bearer("sk-all"), "x-api-key: sk-all"],
        [bearer("sk-gr\u00fcn \u2713".encode().decode("latin-1"))],
    ],
    ids=range(7),
)
def test_a_good_key_is_served_and_goes_no_further(lines: list[str], tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(post(BODY, *lines) + get("/v1/models", *lines))
        assert (await whole(client)).status == 200
        listed = json.loads((await whole(client)).body)["data"]
        assert [one["id"] for one in listed] == ["a", "b", "org/alias"]
        for _, value in wire.engine.asked[0].headers:
            assert "sk-" not in value

    play(tmp_path, scenario, ok, keys=KEYS, models=("a", "b"))


def test_a_key_for_some_models(tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        line = bearer("sk-some")
        await client.send(
            post(BODY, line)
            + post(BODY, line, target="/upstream/a/v1/completions")
            + post(b'{"model": "org/alias"}', line)
            + post(b'{"model": "z"}', line)
            + get("/v1/models/a", line)
            + post(b'{"model": "b"}', line)
            + get("/v1/models", line)
        )
        expected = ["403 model_not_allowed"] * 3 + ["404 model_not_found"] * 2 + ["200"] * 2
        answers = [await whole(client) for _ in expected]
        assert [said(answer) for answer in answers] == expected
        assert [one["id"] for one in json.loads(answers[-1].body)["data"]] == ["b"]
        assert "org/alias" not in answers[3].error["message"]
        assert wire.engine.received == 0

    play(tmp_path, scenario, ok, keys=KEYS, models=("a", "b"))


def test_a_key_for_so_many_requests_in_a_minute(tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        line = bearer("sk-few")
        for expected in ("200", "200", "429 rate_limit_exceeded", "429 rate_limit_exceeded"):
            await client.send(post(BODY, line))
            answer = await whole(client)
            assert said(answer) == expected
            if answer.status == 429:
                assert 1 <= int(answer.get("retry-after") or "") <= 60
        await wire.after(61.0)
        await client.send(post(BODY, line) + get("/v1/models", line))
        assert (await whole(client)).status == 200
        assert (await whole(client)).status == 200

    play(tmp_path, scenario, ok, keys=KEYS)


@pytest.mark.parametrize("ends", ["answered", "left", "refused"])
def test_a_key_for_so_many_requests_at_once(ends: str, tmp_path: Path) -> None:
    """However one of them ends, another one may follow it."""

    async def scenario(wire: Wire) -> None:
        line = bearer("sk-one")
        for _ in range(3 if ends != "refused" else 1):
            first, second = await wire.connect(), await wire.connect()
            await first.send(post(BODY, line))
            asked = await wire.engine.next()
            await second.send(post(BODY, line))
            answer = await whole(second)
            assert said(answer) == "429 too_many_parallel_requests"
            assert int(answer.get("retry-after") or "") >= 1
            if ends == "answered":
                await asked.answer(OK)
                assert (await whole(first)).status == 200
            elif ends == "left":
                first.close()
                await asked.gone()
                asked.answered.set()
            else:
                asked.die()
                await wire.revive_when_bounced()
                (await wire.engine.next()).die()
                assert said(await whole(first)) == "502 engine_died"
            await until(lambda: not wire.tickets(), "it has ended")

    play(tmp_path, scenario, keys=KEYS)


@pytest.mark.parametrize(
    ("key", "wanted", "expected"),
    [
        ("sk-all", 10, "200"),
        ("sk-all", 11, "403 priority_not_allowed"),
        ("sk-all", -100, "200"),
        ("sk-some", 1, "403 priority_not_allowed"),
        ("sk-one", -5, "200"),
        ("sk-one", 0, "403 priority_not_allowed"),
        ("sk-one", 101, "400 invalid_priority"),
    ],
)
def test_a_key_for_so_much_priority(key: str, wanted: int, expected: str, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(post(b'{"model": "b"}', bearer(key), f"x-llmux-priority: {wanted}"))
        assert said(await whole(client)) == expected

    play(tmp_path, scenario, ok, keys=KEYS, models=("a", "b"))


@pytest.mark.parametrize("target", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize(
    ("sent", "code", "kind"),
    [
        (post(b"{"), "invalid_json", "invalid_request_error"),
        (post(b"{}", "Authorization: Bearer sk-all"), "model_required", "invalid_request_error"),
        (post(BODY, bearer("sk-other")), "invalid_api_key", "authentication_error"),
        (post(BODY, bearer("sk-some")), "model_not_allowed", "permission_error"),
        (post(b'{"model": "z"}', bearer("sk-all")), "model_not_found", "not_found_error"),
        (post(BODY + b" " * MAX_BODY, bearer("sk-all")), "body_too_large", "request_too_large"),
        (post(BODY, bearer("sk-all"), "x-llmux-wait: x"), "invalid_wait", "invalid_request_error"),
    ],
    ids=range(7),
)
def test_anthropics_clients_are_told_in_their_form(
    sent: bytes, code: str, kind: str, target: str, tmp_path: Path
) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        lines = bearer("sk-all")
        whole_sent = sent if b"Authorization" in sent else sent.replace(b"Host: h", f"Host: h\r\n{lines}".encode())
        await client.send(whole_sent.replace(b"/v1/completions", target.encode(), 1))
        answer = await whole(client)
        assert json.loads(answer.body)["type"] == "error"
        assert (answer.error["type"], answer.error["code"]) == (kind, code)

    play(tmp_path, scenario, ok, keys=KEYS, models=("a", "b"))


def test_the_access_log_has_a_line_for_each_request_and_no_secret(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever was sent: nobody writes lines of another's, or colours on a terminal, through it."""
    caplog.set_level("INFO", "llmuxd.access")
    key = bearer("sk-all")
    several = [
        post(BODY, key),
        post(BODY, key, 'x-request-id: a" status=200\x1b[31m'),
        post(BODY, key, "x-request-id: one two"),
        post(b'{"model": "\\n\\u001b[31m x=y sk-prompt"}', key),
        get("/v1/completions?api_key=sk-query", key),
        get("/v1/\x1b[31m", key),
        get("/v1/a b", key),
        get("/sk-path\xff", key),
        post(BODY, "x-api-key: sk-some, sk-all"),
        b"sk-garbage\r\n\r\n",
        get("/health", method="SK-METHOD"),
    ]

    async def scenario(wire: Wire) -> None:
        for sent in several:
            client = await wire.connect()
            await client.send(sent)
            await whole(client)
        await wire.after(1.0)

    play(tmp_path, scenario, ok, keys=KEYS)
    lines = [record.getMessage() for record in caplog.records if record.name == "llmuxd.access"]
    assert len(lines) == len(several)
    for line in lines:
        assert line.isascii()
        assert line.isprintable()
        assert line.startswith("id=")
        assert line.count(" status=") == 1
        assert not any(secret in line for secret in ("sk-all", "sk-some", "sk-query", "sk-prompt"))


def test_an_unread_body_of_somebody_without_a_key_is_no_request(tmp_path: Path) -> None:
    inner = post(BODY, bearer("sk-all"))
    check(rejected("x", post(inner, bearer("sk-other")), "401 invalid_api_key"), tmp_path, keys=KEYS)
