"""The soak's account: what a proxy must not do is noticed, and what it may do is not held against it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmuxd.logs import access_writer
from llmuxd.proxy.access import Call
from tests.soak.account import Account
from tests.soak.causes import Causes
from tests.soak.judge import Asked, How, Outcome, fault, judge, left
from tests.soak.keys import Key, Uses
from tests.soak.menu import Order
from tests.soak.stand import Usage
from tests.soak.watch import Log, Usages
from tests.soak.wire import Answer, End

COMPLETE = Outcome(How.COMPLETE, "", 200, frozenset({200}))


def order(id: str = "r-1", **more: Any) -> Order:
    return Order(id, "POST", "/v1/completions", "amber", **more)


def asked(one: Order | None = None, wait: float = 20.0) -> Asked:
    return Asked(one or order(), "post", wait, began=100.0)


# The account


def entered(*outcomes: Outcome) -> Account:
    """An account with requests r-1, r-2 and so on, that ended like this."""
    account = Account()
    for number, outcome in enumerate(outcomes, 1):
        one = asked(order(f"r-{number}"))
        account.asked(one)
        account.ended(one, outcome)
    return account


def test_what_is_told_the_same_on_both_sides_is_right():
    account = entered(COMPLETE, left(order(), unseen=False), Outcome(How.REFUSED, "x", 429, frozenset({429})))
    for id, status in (("r-1", 200), ("r-2", 499), ("r-3", 429)):
        account.logged(id, status)
    assert account.problems({200: 1, 499: 1, 429: 1}) == {}


def test_a_request_that_never_ends_is_noticed():
    account = Account()
    account.asked(asked())
    assert list(account.problems({})) == ["requests that never ended"]


def test_a_second_answer_to_a_request_is_noticed():
    account = entered(COMPLETE)
    account.ended(asked(), COMPLETE)
    account.logged("r-1", 200)
    assert list(account.problems({200: 1})) == ["two answers to one request"]


def test_an_answer_that_no_client_may_get_is_noticed():
    account = entered(fault("why", 200))
    account.logged("r-1", 200)
    assert account.problems({200: 1}) == {"answers that no client may get": ["r-1 (post): why"]}


def test_a_request_that_the_daemon_does_not_tell_of_is_noticed():
    assert list(entered(COMPLETE).problems({})) == ["requests that are not in the access log"]


def test_a_request_that_may_never_have_arrived_need_not_be_told_of():
    assert entered(left(order(), unseen=True)).problems({}) == {}


def test_two_lines_for_one_request_are_noticed():
    account = entered(COMPLETE)
    account.logged("r-1", 200)
    account.logged("r-1", 499)
    assert list(account.problems({200: 1})) == ["two lines in the access log for one request"]


@pytest.mark.parametrize("logged_first", [True, False])
def test_another_status_than_the_client_saw_is_noticed(logged_first):
    account, one = Account(), asked()
    account.asked(one)
    if logged_first:
        account.logged("r-1", 499)
    account.ended(one, COMPLETE)
    if not logged_first:
        account.logged("r-1", 499)
    assert list(account.problems({499: 1})) == ["the access log and the client disagree"]


def test_a_line_for_nobody_is_noticed_unless_a_head_never_came():
    account = entered()
    account.headless()
    account.logged("made-here", 408)
    assert account.problems({408: 1}) == {}
    account.logged("made-here-too", 408)
    assert list(account.problems({408: 2})) == ["lines in the access log for nobody's requests"]


@pytest.mark.parametrize("counted", [{}, {200: 2}, {200: 1, 502: 1}])
def test_counters_that_tell_something_else_are_noticed(counted):
    account = entered(COMPLETE)
    account.logged("r-1", 200)
    assert list(account.problems(counted)) == ["the access log and the counters disagree"]


# The judge


def answer(body: bytes, end: End = End.CLEAN, status: int = 200, ended: float = 101.0, **headers: str) -> Answer:
    kind = "text/event-stream; charset=utf-8" if body.startswith((b"data:", b":")) else "application/json"
    found = {"x-request-id": "r-1", "server-timing": "queue;dur=0.1", "content-type": kind}
    return Answer(status, {**found, **headers}, body, end, 100.5, ended)


def error(code: str, status: int, **more: Any) -> Answer:
    value = {"error": {"message": "m", "type": "t", "param": None, "code": code}}
    return answer(json.dumps(value).encode(), status=status, **more)


def events(*values: Any) -> bytes:
    return b"".join(b"data: %b\n\n" % (v if isinstance(v, bytes) else json.dumps(v).encode()) for v in values)


def chunk(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"id": "cmpl-r-1", "choices": [{"index": 0, "text": text, "finish_reason": finish}]}


WAITS = b": llmux waiting for amber\n\n"
STREAM = (chunk("amber"), chunk(" pine"), chunk("", "length"), b"[DONE]")
DIED = {"error": {"message": "m", "type": "server_error", "param": None, "code": "engine_died"}}


def streamed(body: bytes, end: End, causes: Causes | None = None, **more: Any) -> Outcome:
    return judge(asked(order(stream=True, **more)), answer(body, end), causes or Causes())


def killed(*times: float) -> Causes:
    causes = Causes()
    for time in times:
        causes.death("amber", time)
    return causes


def test_a_stream_that_has_all_is_complete():
    assert streamed(WAITS + events(*STREAM), End.CLEAN).how is How.COMPLETE


@pytest.mark.parametrize("end", [End.CLEAN, End.CLOSED])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_silent_cut_is_noticed_wherever_it_is(count, end):
    # Even if its engine died: then it is to be seen.
    assert streamed(WAITS + events(*STREAM[:count]), end, killed(100.2)).how is How.FAULT


@pytest.mark.parametrize("end", [End.CUT, End.RESET])
def test_a_stream_may_be_cut_visibly_if_its_engine_died(end):
    outcome = streamed(events(*STREAM[:2]), end, killed(100.2))
    assert (outcome.how, outcome.counts) == (How.CUT, {502})
    assert streamed(events(*STREAM[:2]), end).how is How.FAULT
    assert streamed(events(*STREAM[:2]), end, killed(50.0)).how is How.FAULT, "that was another one's death"


def test_an_error_event_in_mid_stream_is_followed_by_no_clean_end():
    body = events(*STREAM[:2], DIED)
    assert streamed(body, End.CUT, killed(100.2)).how is How.ERROR_EVENT
    assert streamed(body, End.CLEAN, killed(100.2)).how is How.FAULT
    assert streamed(body, End.CUT).how is How.FAULT, "nobody was killed"


def test_an_error_event_after_comments_alone_may_end_cleanly():
    assert streamed(WAITS + events(DIED), End.CLEAN, killed(100.2, 100.4)).how is How.ERROR_EVENT


def test_an_event_may_be_cut_off_in_its_middle_if_that_is_said():
    broken = events(chunk("amber")) + b'data: {"id": "cm\n\n'
    assert streamed(broken + events(DIED), End.CUT, killed(100.2)).how is How.ERROR_EVENT
    assert streamed(broken + events(chunk(" pine")), End.CUT, killed(100.2)).how is How.FAULT


def test_what_follows_the_last_event_is_noticed():
    assert streamed(events(*STREAM, chunk(" more")), End.CLEAN).how is How.FAULT
    assert streamed(events(*STREAM) + b"data: x", End.CLEAN).how is How.FAULT


def test_the_answer_to_another_request_is_noticed():
    other = answer(b"{}", **{"x-request-id": "r-2"})
    assert judge(asked(), other, Causes()).how is How.FAULT


def test_an_answer_with_another_content_is_noticed():
    one = asked(order(check=lambda body: "" if body == b"mine" else "not mine"))
    assert judge(one, answer(b"mine"), Causes()).how is How.COMPLETE
    assert judge(one, answer(b"yours"), Causes()).how is How.FAULT


def test_an_answer_that_cannot_be_read_is_noticed():
    one = asked(order(check=lambda body: str(json.loads(body)["there"])))
    assert judge(one, answer(b'{"here": 1}'), Causes()).how is How.FAULT
    assert judge(one, answer(b"{"), Causes()).how is How.FAULT


def test_the_first_death_before_an_answer_is_not_for_clients_to_see():
    died = error("engine_died", 502)
    assert judge(asked(), died, killed(100.5)).how is How.FAULT
    assert judge(asked(), died, killed(100.5, 100.8)).how is How.REFUSED


@pytest.mark.parametrize(
    ("code", "status"),
    [("queue_timeout", 504), ("model_unavailable", 503), ("model_not_pinned", 503), ("rate_limit_exceeded", 429)],
)
def test_a_refusal_without_a_cause_is_noticed(code, status):
    assert judge(asked(), error(code, status, **{"retry-after": "1"}), Causes()).how is How.FAULT


def test_a_refusal_with_a_cause_is_right():
    causes = killed(90.0)
    causes.pin(99.0)
    limited = asked(order(key=Key("k", max_parallel=1)))
    for one, refusal in (
        (asked(wait=20.0), error("queue_timeout", 504, ended=120.1)),
        (asked(), error("model_unavailable", 503)),
        (asked(), error("model_not_pinned", 503)),
        (asked(), error("queue_full", 429, **{"retry-after": "1"})),
        (limited, error("too_many_parallel_requests", 429, **{"retry-after": "1"})),
    ):
        assert judge(one, refusal, causes).how is How.REFUSED


def test_what_was_pinned_is_so_no_longer_when_it_is_unpinned():
    causes = Causes()
    causes.pin(80.0)
    causes.unpin(90.0)
    assert judge(asked(), error("model_not_pinned", 503), causes).how is How.FAULT


def test_an_error_has_the_status_of_its_code():
    assert judge(asked(), error("queue_full", 503), Causes()).how is How.FAULT
    assert judge(asked(), error("internal_error", 500), Causes()).how is How.FAULT


def test_an_error_has_the_form_of_its_api():
    one = asked(Order("r-1", "POST", "/v1/messages", "amber", code="invalid_json"))
    openai = error("invalid_json", 400)
    assert judge(one, openai, Causes()).how is How.FAULT
    anthropic = answer(json.dumps({"type": "error", **json.loads(openai.body)}).encode(), status=400)
    assert judge(one, anthropic, Causes()).how is How.REFUSED


def test_nobody_is_answered_where_an_error_is_right():
    one = asked(order(code="invalid_api_key"))
    assert judge(one, answer(b"{}"), Causes()).how is How.FAULT
    assert judge(one, error("invalid_api_key", 401), Causes()).how is How.REFUSED
    assert judge(one, error("model_not_found", 404), Causes()).how is How.FAULT


# Who looks on


def test_a_limit_that_was_not_kept_is_noticed():
    key = Key("k", requests_per_minute=2)
    uses = Uses()
    for began in (0.0, 30.0, 61.0):
        uses.add("k", began, began + 1)
    assert uses.problems((key,)) == []
    uses.add("k", 31.0, 32.0)
    assert uses.problems((key,)) == ["k had 3 requests answered in a minute, not 2"]


def test_an_error_in_the_log_is_a_problem_unless_the_saboteur_is_its_cause(tmp_path):
    file = tmp_path / "llmuxd.log"
    log = Log(file, Account())
    at = "2026-01-02 03:04:05,678"
    lines = [
        f"{at} INFO serving",
        f"{at} ERROR switch 3 failed after 0.1 s: its last words:",
        "Traceback (most recent call last):",
        f"{at} ERROR r-1: a request broke",
        "Traceback (most recent call last):",
        f"{at} WARNING slow",
    ]
    file.write_text("\n".join(lines) + "\nnot yet a li")
    log.read()
    assert log.problems == ["ERROR r-1: a request broke\n    Traceback (most recent call last):"]
    assert log.warnings == 1


def test_the_access_log_goes_to_the_account(tmp_path):
    file = tmp_path / "llmuxd.log"
    account = entered(COMPLETE)
    log = Log(file, account)
    call = Call("r-1", "POST", "/v1/completions")
    call.status = 200
    with file.open("ab") as opened:
        access_writer({}, opened.fileno())([call])
    log.read()
    assert log.access_lines == 1
    assert account.problems({200: 1}) == {}


@pytest.mark.parametrize("what", ["fds", "threads", "rss_mib"])
def test_what_grows_is_noticed(what):
    flat, growing = Usages(), Usages()
    for number in range(12):
        figures = {"fds": 20, "threads": 3, "rss_mib": 60.0}
        flat.add(number, Usage(**figures))
        growing.add(number, Usage(**{**figures, what: figures[what] + 10 * number}))
    assert flat.problems() == []
    assert len(growing.problems()) == 1
