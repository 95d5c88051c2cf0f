"""Which pages may use the port from a browser, in the words that browsers understand."""

from __future__ import annotations

import pytest

from llmuxd.proxy.cors import allowed, preflight
from llmuxd.proxy.http1 import Head, parse_request, parse_response

PAGE, OTHER = "https://page.example", "https://other.example:8443"


def asked(*lines: str, method: str = "OPTIONS") -> Head:
    return parse_request("\r\n".join([f"{method} /v1/x HTTP/1.1", "Host: h", *lines]).encode())


def told(lines: bytes) -> dict[str, str]:
    """The fields that are added, as a client reads them."""
    assert not lines or lines.endswith(b"\r\n")
    head = parse_response(b"HTTP/1.1 204 No Content\r\n" + lines[:-2] if lines else b"HTTP/1.1 204 No Content")
    assert len(head.lines) == len(head.values)
    return {name.decode(): value.decode("latin-1") for name, value in head.values.items()}


EXPOSED = "x-request-id, Server-Timing, Retry-After"


@pytest.mark.parametrize(
    ("origin", "origins", "fields"),
    [
        (PAGE, [], {}),
        (None, [PAGE], {}),
        (None, ["*"], {}),
        (
            PAGE,
            [PAGE],
            {"access-control-allow-origin": PAGE, "access-control-expose-headers": EXPOSED, "vary": "Origin"},
        ),
        (
            OTHER,
            [PAGE, OTHER],
            {"access-control-allow-origin": OTHER, "access-control-expose-headers": EXPOSED, "vary": "Origin"},
        ),
        (OTHER, [PAGE], {"vary": "Origin"}),
        (PAGE.upper(), [PAGE], {"vary": "Origin"}),
        (PAGE + ".evil.example", [PAGE], {"vary": "Origin"}),
        (PAGE + ":443", [PAGE], {"vary": "Origin"}),
        (f"{PAGE}, {OTHER}", [PAGE, OTHER], {"vary": "Origin"}),
        ("null", [PAGE], {"vary": "Origin"}),
        ("\u00e9", [PAGE], {"vary": "Origin"}),
        ("", [PAGE], {"vary": "Origin"}),
        (OTHER, ["*"], {"access-control-allow-origin": "*", "access-control-expose-headers": EXPOSED}),
        (OTHER, [PAGE, "*"], {"access-control-allow-origin": "*", "access-control-expose-headers": EXPOSED}),
    ],
)
def test_who_may_read_an_answer(origin: str | None, origins: list[str], fields: dict[str, str]) -> None:
    lines = [] if origin is None else [f"Origin: {origin}"]
    assert told(allowed(asked(*lines, method="POST"), origins)) == fields


def test_of_two_origins_none_counts() -> None:
    head = asked(f"Origin: {PAGE}", f"Origin: {PAGE}", method="POST")
    assert told(allowed(head, [PAGE])) == {"vary": "Origin"}


def test_a_preflight_is_told_what_it_may_do() -> None:
    head = asked(
        f"Origin: {PAGE}",
        "Access-Control-Request-Method: POST",
        "Access-Control-Request-Headers: authorization,content-type",
    )
    for origins in ([PAGE], ["*"]):
        fields = told(preflight(head, origins))
        assert fields["access-control-allow-headers"] == "authorization,content-type"
        assert {"POST", "GET", "DELETE"} <= set(fields["access-control-allow-methods"].split(", "))
        assert int(fields["access-control-max-age"]) > 0
        assert fields["allow"] == fields["access-control-allow-methods"]
        assert not set(fields) & set(told(allowed(head, origins))), "each line is said once"


@pytest.mark.parametrize("origins", [[], [OTHER]])
def test_who_may_not_is_told_what_everybody_is(origins: list[str]) -> None:
    assert set(told(preflight(asked(f"Origin: {PAGE}"), origins))) == {"allow"}


def test_options_need_not_come_from_a_page() -> None:
    assert set(told(preflight(asked(), ["*"]))) == {"allow"}
    assert "OPTIONS" in told(preflight(asked(), []))["allow"]


def test_credentials_are_never_allowed() -> None:
    # Keys are no cookies: pages send them themselves.
    for origins in ([PAGE], ["*"]):
        head = asked(f"Origin: {PAGE}", "Cookie: a=b")
        assert b"credentials" not in (allowed(head, origins) + preflight(head, origins)).lower()
