"""Clients' keys: who a request is from, and what that client may do. The time is a number."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmuxd.config import KeyConfig
from llmuxd.gate import Refused
from llmuxd.proxy import keys as keys_module
from llmuxd.proxy.errors import Rejected
from llmuxd.proxy.keys import Key, KeyRing, presented

ALICE, BOB = b"llmux-alice", b"llmux-bob"


def config(name: str, key: bytes, **bounds) -> KeyConfig:
    return KeyConfig(name, hashlib.sha256(key).hexdigest(), **bounds)


def key(**bounds) -> Key:
    return Key(config("alice", ALICE, **bounds))


RING = KeyRing([config("alice", ALICE), config("bob", BOB)])


def rejected(call, *arguments) -> Rejected:
    with pytest.raises(Rejected) as caught:
        call(*arguments)
    return caught.value


class TestWhoItIs:
    @pytest.mark.parametrize(
        ("authorization", "x_api_key", "name"),
        [
            (b"Bearer " + ALICE, None, "alice"),
            (b"bEARER " + BOB, None, "bob"),
            (b"Bearer \t " + BOB + b" ", None, "bob"),
            (None, ALICE, "alice"),
            (None, b" " + BOB + b"\t", "bob"),
            (b"Bearer " + ALICE, ALICE, "alice"),
            (b"Bearer ", BOB, "bob"),
            (b"Bearer", BOB, "bob"),
            (b"Basic YWxpY2U6YQ==", BOB, "bob"),
            (b"Bearer " + BOB, b"", "bob"),
        ],
    )
    def test_either_field_has_it(self, authorization, x_api_key, name):
        assert RING.identify(authorization, x_api_key).name == name

    @pytest.mark.parametrize(
        ("authorization", "x_api_key"),
        [(None, None), (b"", b""), (b"Bearer", None), (b"Bearer ", b" "), (b"Basic YWxpY2U6YQ==", None), (ALICE, None)],
    )
    def test_without_one_the_message_says_how_to_send_it(self, authorization, x_api_key):
        error = rejected(RING.identify, authorization, x_api_key)
        assert (error.status, error.code, error.type) == (401, "invalid_api_key", "invalid_request_error")
        assert str(error) == "no key is given: send `Authorization: Bearer KEY` or `x-api-key: KEY`"

    @pytest.mark.parametrize("wrong", [b"llmux-alicf", b"llmux-alice2", b"llmux-alic", b"x", b"\xff\x00", b"a b"])
    def test_a_wrong_one_is_not_shown(self, wrong):
        for error in (rejected(RING.identify, b"Bearer " + wrong, None), rejected(RING.identify, None, wrong)):
            assert (error.status, error.code, error.param) == (401, "invalid_api_key", None)
            assert str(error) == "the key is not valid"

    @pytest.mark.parametrize("other", [BOB, b"nobody's"])
    def test_two_different_ones_are_none(self, other):
        error = rejected(RING.identify, b"Bearer " + ALICE, other)
        assert (error.status, error.code) == (401, "invalid_api_key")
        assert str(error) == "Authorization and x-api-key hold different keys"

    def test_what_is_presented_is_the_key_alone(self):
        assert presented(b"Bearer " + ALICE, None) == ALICE
        assert presented(None, None) is None
        assert RING.find(None) is None

    def test_the_hash_of_a_key_is_no_key(self):
        assert RING.find(hashlib.sha256(ALICE).hexdigest().encode()) is None

    def test_each_key_is_compared_with_whichever_it_is(self, monkeypatch):
        compared = []

        def compare(one: bytes, other: bytes) -> bool:
            compared.append(one)
            return hmac.compare_digest(one, other)

        class Counting:
            compare_digest = staticmethod(compare)

        monkeypatch.setattr(keys_module, "hmac", Counting)
        for shown in (ALICE, BOB, b"nobody's"):
            compared.clear()
            RING.find(shown)
            assert compared == [hashlib.sha256(each).digest() for each in (ALICE, BOB)]

    def test_without_keys_no_request_needs_one(self):
        ring = KeyRing()
        assert ring.open
        assert not RING.open
        anyone = ring.identify(b"Bearer " + ALICE, BOB)
        assert (anyone.name, anyone.may_use("qwen")) == ("", True)
        assert [anyone.admit(0.0) for _ in range(1000)] == [None] * 1000
        assert ring.find(ALICE) is None


class TestModels:
    def test_a_key_may_use_all_unless_it_names_some(self):
        assert key().may_use("qwen")
        some = key(models=("qwen", "mistral"))
        assert [some.may_use(model) for model in ("qwen", "mistral", "llama")] == [True, True, False]

    def test_the_refusal_names_those_that_it_is_for(self):
        error = key(models=("qwen", "mistral")).model_not_allowed("llama")
        assert (error.status, error.code, error.param) == (403, "model_not_allowed", "model")
        assert str(error) == "the key `alice` may not use the model `llama`. It may use: qwen, mistral"


class TestPriority:
    def test_it_is_the_keys_unless_the_request_asks_for_less(self):
        five = key(priority=5)
        assert five.priority_of(None) == 5
        given = ("5", "4", "+3", "0", "-0", "-100", " 2\t", "005")
        assert [five.priority_of(text) for text in given] == [5, 4, 3, 0, 0, -100, 2, 5]

    def test_a_key_below_0_has_that(self):
        low = key(priority=-7)
        assert (low.priority_of(None), low.priority_of("-8")) == (-7, -8)
        assert rejected(low.priority_of, "0").code == "priority_not_allowed"

    def test_more_is_not_allowed(self):
        error = rejected(key(priority=5).priority_of, "6")
        assert (error.status, error.code, error.param) == (403, "priority_not_allowed", "x-llmux-priority")
        assert str(error) == "the key `alice` may have a priority of 5 at most"

    def test_without_a_key_0_is_the_most(self):
        anyone = KeyRing().identify(None, None)
        assert (anyone.priority_of(None), anyone.priority_of("-3"), anyone.priority_of("0")) == (0, -3, 0)
        assert str(rejected(anyone.priority_of, "1")) == "a request without a key may have a priority of 0 at most"

    @pytest.mark.parametrize(
        "text", ["", " ", "high", "1.0", "1e1", "0x1", "--1", "- 1", "1 2", "1_0", "٣", "1" * 5000]
    )
    def test_what_is_no_whole_number_is_invalid(self, text):
        error = rejected(key(priority=100).priority_of, text)
        assert (error.status, error.code, error.param) == (400, "invalid_priority", "x-llmux-priority")
        assert str(error) == "x-llmux-priority has to be a whole number, -100 to 100"

    @pytest.mark.parametrize("text", ["101", "-101", "999"])
    def test_neither_is_one_out_of_range(self, text):
        assert rejected(key(priority=100).priority_of, text).code == "invalid_priority"


class TestRequestsPerMinute:
    def test_one_more_is_refused_until_the_oldest_is_a_minute_old(self):
        three = key(requests_per_minute=3)
        assert [three.admit(at) for at in (10.0, 20.0, 30.0)] == [None, None, None]
        refused = three.admit(45.0)
        assert isinstance(refused, Refused)
        assert (refused.status, refused.code, refused.type) == (429, "rate_limit_exceeded", "rate_limit_error")
        assert refused.retry_after == 25.0
        assert str(refused) == "the key `alice` has made as many requests in a minute as it may: 3"
        assert three.admit(69.9) is not None
        assert three.admit(70.0) is None
        assert three.admit(70.0) is not None

    def test_whether_they_have_ended_makes_no_difference(self):
        one = key(requests_per_minute=1)
        assert one.admit(0.0) is None
        one.release(1.0)
        assert one.admit(59.0) is not None

    def test_a_refused_one_does_not_count(self):
        both = key(requests_per_minute=2, max_parallel=1)
        assert both.admit(0.0) is None
        assert both.admit(1.0).code == "too_many_parallel_requests"
        both.release(2.0)
        assert both.admit(3.0) is None
        both.release(4.0)
        assert both.admit(5.0).code == "rate_limit_exceeded"
        assert both.in_flight == 0

    @settings(derandomize=True, deadline=None)
    @given(st.lists(st.floats(0, 40), max_size=60), st.integers(1, 6))
    def test_no_minute_has_more_and_the_time_to_wait_is_exact(self, gaps, most):
        one, now, admitted = key(requests_per_minute=most), 0.0, []
        for gap in gaps:
            now += gap
            refused = one.admit(now)
            recent = [at for at in admitted if now - at < 60]
            assert (refused is None) == (len(recent) < most)
            if refused is None:
                admitted.append(now)
            else:
                assert refused.retry_after == pytest.approx(recent[0] + 60 - now)
        for first, last in zip(admitted, admitted[most:], strict=False):
            assert last - first >= 60


class TestParallelRequests:
    def test_one_more_is_refused_until_one_ends(self):
        two = key(max_parallel=2)
        assert [two.admit(0.0), two.admit(1.0)] == [None, None]
        refused = two.admit(2.0)
        assert isinstance(refused, Refused)
        assert (refused.status, refused.code, refused.type) == (429, "too_many_parallel_requests", "rate_limit_error")
        assert str(refused) == "the key `alice` has as many requests at once as it may: 2"
        two.release(3.0)
        assert two.in_flight == 1
        assert two.admit(3.0) is None

    def test_the_time_to_wait_is_made_of_what_requests_took(self):
        two = key(max_parallel=2)
        for at in (0.0, 100.0):
            two.admit(at)
            two.admit(at)
            two.release(at + 10.0)
            two.release(at + 30.0)
        two.admit(200.0)
        two.admit(200.0)
        assert two.admit(200.0).retry_after == pytest.approx(20 / 2)

    def test_before_one_has_ended_it_is_made_of_how_long_they_have_been_there(self):
        one = key(max_parallel=1)
        one.admit(0.0)
        assert one.admit(0.1).retry_after == 1.0
        assert one.admit(8.0).retry_after == 8.0

    def test_it_goes_with_the_times(self):
        one, now = key(max_parallel=1), 0.0
        for lasts in [100.0] * 20 + [2.0] * 100:
            one.admit(now)
            now += lasts
            one.release(now)
        one.admit(now)
        assert one.admit(now).retry_after == pytest.approx(2.0, abs=0.5)


class TestReload:
    def test_keys_that_stay_go_on_counting(self):
        ring = KeyRing([config("alice", ALICE, requests_per_minute=3, max_parallel=2), config("bob", BOB)])
        old = ring.find(ALICE)
        assert [old.admit(0.0), old.admit(0.0)] == [None, None]
        ring = ring.renewed([config("bob", BOB), config("alice", ALICE, requests_per_minute=3, max_parallel=3)])
        new = ring.find(ALICE)
        assert (new.in_flight, new.admit(1.0)) == (2, None)
        assert new.admit(2.0).code == "too_many_parallel_requests"
        old.release(3.0)
        assert new.in_flight == 2
        assert new.admit(4.0).code == "rate_limit_exceeded"

    def test_a_lower_bound_counts_at_once(self):
        ring = KeyRing([config("alice", ALICE, requests_per_minute=4)])
        for at in (0.0, 10.0, 20.0, 30.0):
            assert ring.find(ALICE).admit(at) is None
        fewer = ring.renewed([config("alice", ALICE, requests_per_minute=2)]).find(ALICE)
        assert fewer.admit(40.0).retry_after == 20.0 + 60 - 40
        assert fewer.admit(79.0) is not None
        assert fewer.admit(80.0) is None

    def test_another_hash_or_name_is_another_key(self):
        ring = KeyRing([config("alice", ALICE, max_parallel=1), config("bob", BOB, max_parallel=1)])
        for shown in (ALICE, BOB):
            ring.find(shown).admit(0.0)
        ring = ring.renewed([config("alice", b"new"), config("robert", BOB)])
        assert ring.find(ALICE) is None
        assert [ring.find(shown).in_flight for shown in (b"new", BOB)] == [0, 0]

    def test_a_request_of_a_key_that_is_gone_ends_as_any(self):
        ring = KeyRing([config("alice", ALICE)])
        alice = ring.find(ALICE)
        alice.admit(0.0)
        ring = ring.renewed([])
        assert ring.open
        alice.release(1.0)
        assert alice.in_flight == 0
