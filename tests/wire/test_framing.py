"""Where a body ends is said in one way, or the request is refused: nothing can be hidden behind it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.wire.cases import BAD_BODY, BODY, SMUGGLED, Case, check, declined, refused, said, served, table
from tests.wire.client import request
from tests.wire.engine import ok
from tests.wire.stack import MAX_BODY, Wire, play

UNSUPPORTED = ("400 bad_request", "501 unsupported_transfer_encoding")
CHUNKED_BODY = b"e\r\n" + BODY + b"\r\n0\r\n\r\n"
TOO_LARGE = ("413 body_too_large", "400 bad_request")


def framed(*lines: str, body: bytes = BODY, version: str = "1.1") -> bytes:
    """A POST whose body is framed by these lines and nothing else."""
    return request(f"POST /v1/completions HTTP/{version}", "Host: h", *lines, body=body)


def chunks(body: bytes) -> bytes:
    """A chunked POST; the model is named beside the body, so that this may be anything."""
    return request("POST /v1/completions?model=a HTTP/1.1", "Host: h", "Transfer-Encoding: chunked", body=body)


LENGTHS = {
    "given twice": ["Content-Length: 14", "Content-Length: 14"],
    "given twice, contradicting": ["Content-Length: 14", "Content-Length: 15"],
    "given twice, none first": ["Content-Length: 0", "Content-Length: 14"],
    "given twice, spelled differently": ["content-length: 14", "CONTENT-LENGTH: 14"],
    "given twice, far apart": ["Content-Length: 14", *(f"X-{n}: {n}" for n in range(50)), "Content-Length: 14"],
    "a list": ["Content-Length: 14, 14"],
    "a list, contradicting": ["Content-Length: 14, 15"],
    "negative": ["Content-Length: -14"],
    "minus zero": ["Content-Length: -0"],
    "with a plus": ["Content-Length: +14"],
    "hexadecimal": ["Content-Length: 0xe"],
    "hexadecimal without a prefix": ["Content-Length: e"],
    "octal": ["Content-Length: 0o16"],
    "with an exponent": ["Content-Length: 14e0"],
    "a fraction": ["Content-Length: 14.0"],
    "with an underscore": ["Content-Length: 1_4"],
    "two numbers": ["Content-Length: 1 4"],
    "with a tab inside": ["Content-Length: 1\t4"],
    "with a parameter": ["Content-Length: 14;x"],
    "quoted": ['Content-Length: "14"'],
    "empty": ["Content-Length:"],
    "a word": ["Content-Length: all"],
    "a superscript": ["Content-Length: 1\xb2"],
    "a no-break space": ["Content-Length: \xa014"],
    "a vertical tab before": ["Content-Length: \x0b14"],
    "a form feed behind": ["Content-Length: 14\x0c"],
    "a NUL behind": ["Content-Length: 14\x00"],
    "a space before the colon": ["Content-Length : 14"],
    "a tab before the colon": ["Content-Length\t: 14"],
    "folded": ["Content-Length:", " 14"],
    "continued": ["Content-Length: 1", "\t4"],
    "behind a bare LF": ["X: y\nContent-Length: 14"],
    "behind a bare CR": ["X: y\rContent-Length: 14"],
}

CODINGS = {
    "a list that ends in chunked": "gzip, chunked",
    "a list that begins with chunked": "chunked, gzip",
    "chunked twice": "chunked, chunked",
    "identity": "identity",
    "chunked and identity": "chunked, identity",
    "gzip": "gzip",
    "deflate": "deflate",
    "empty": "",
    "a comma behind": "chunked,",
    "a comma before": ",chunked",
    "with a parameter": "chunked;q=1",
    "with an equals sign": "chunked=1",
    "quoted": '"chunked"',
    "in single quotes": "'chunked'",
    "with a letter before": "xchunked",
    "with a letter behind": "chunkedx",
    "two words": "chunked chunked",
    "split": "chun ked",
    "a vertical tab before": "\x0bchunked",
    "a vertical tab behind": "chunked\x0b",
    "a form feed behind": "chunked\x0c",
    "a NUL behind": "chunked\x00",
    "a NUL inside": "chun\x00ked",
    "a no-break space before": "\xa0chunked",
    "a Kelvin sign": "chun\u212aed".encode().decode("latin-1"),
    "a bare CR before": "\rchunked",
    "a bare LF before": "\nchunked",
    "folded": "\r\n chunked",
}

BOTH = {
    "CL.TE": ["Content-Length: 26", "Transfer-Encoding: chunked"],
    "TE.CL": ["Transfer-Encoding: chunked", "Content-Length: 26"],
    "CL.TE with no length": ["Content-Length: 0", "Transfer-Encoding: chunked"],
    "CL.TE with an unknown coding": ["Content-Length: 14", "Transfer-Encoding: xchunked"],
    "CL.TE with identity": ["Content-Length: 14", "Transfer-Encoding: identity"],
    "TE.TE": ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"],
    "TE.TE, one of them unknown": ["Transfer-Encoding: chunked", "Transfer-Encoding: cow"],
    "TE.TE, the first unknown": ["Transfer-Encoding: x", "transfer-encoding: chunked"],
    "TE.TE, one of them empty": ["Transfer-Encoding:", "Transfer-Encoding: chunked"],
    "TE.TE, one of them identity": ["Transfer-Encoding: identity", "Transfer-Encoding: chunked"],
    "TE with a space before the colon": ["Transfer-Encoding : chunked"],
    "TE with a space before it": ["X: y", " Transfer-Encoding: chunked"],
    "TE behind a bare LF": ["X: y\nTransfer-Encoding: chunked"],
    "TE behind a bare CR": ["X: y\rTransfer-Encoding: chunked"],
    "TE with a NUL in its name": ["Transfer-\x00Encoding: chunked"],
    "TE with a control character before it": ["\x0bTransfer-Encoding: chunked"],
    "TE with a strange letter in its name": ["Transf\xe9r-Encoding: chunked"],
}

FRAMES = [
    *(refused(f"a length {name}", framed(*lines)) for name, lines in LENGTHS.items()),
    refused("a length of 20 digits", framed("Content-Length: 99999999999999999999"), TOO_LARGE),
    refused("a length that wraps to 14 in 32 bits", framed("Content-Length: 4294967310"), TOO_LARGE),
    refused("a length that wraps to 14 in 64 bits", framed("Content-Length: 18446744073709551630"), TOO_LARGE),
    refused("a length of 5000 digits", framed("Content-Length: " + "9" * 5000), TOO_LARGE),
    *(
        refused(f"a coding, {name}", framed(f"Transfer-Encoding: {coding}", body=CHUNKED_BODY), UNSUPPORTED)
        for name, coding in CODINGS.items()
    ),
    *(refused(name, framed(*lines, body=CHUNKED_BODY), UNSUPPORTED) for name, lines in BOTH.items()),
    refused("chunks in HTTP/1.0", framed("Transfer-Encoding: chunked", body=CHUNKED_BODY, version="1.0"), UNSUPPORTED),
    served("a length with blanks around it", framed("Content-Length: \t 14 \t")),
    served("a length without a blank", framed("CONTENT-LENGTH:14")),
    served("chunks without a blank", framed("TRANSFER-ENCODING:chunked", body=CHUNKED_BODY)),
    served("chunks with blanks around the word", framed("Transfer-Encoding: \tchunked \t", body=CHUNKED_BODY)),
    served("a length in HTTP/1.0", framed("Content-Length: 14", "Connection: keep-alive", version="1.0")),
    declined("no length", framed(body=b""), "400 model_required"),
    Case("a body without a length", framed() + SMUGGLED, ("400 model_required", "400 bad_request")),
    Case(
        "a length with an underscore in its name",
        framed("Content_Length: 14") + SMUGGLED,
        ("400 model_required", "400 bad_request"),
    ),
    Case(
        "a coding with an underscore in its name",
        framed("Transfer_Encoding: chunked", body=CHUNKED_BODY) + SMUGGLED,
        ("400 model_required", "400 bad_request"),
    ),
    Case("a length shorter than the body", framed("Content-Length: 13") + SMUGGLED, ("400 invalid_json", "400 bad_request")),
    Case("a request in the body", framed(f"Content-Length: {14 + len(SMUGGLED)}", "model-override: a") + SMUGGLED, ("200",), (BODY + SMUGGLED,), open=True),
    Case("a request behind the body", framed("Content-Length: 14") + SMUGGLED, ("200", "200"), (BODY, b"smuggled"), open=True),
]  # fmt: skip


@table(FRAMES)
def test_a_length_or_chunks_and_nothing_else(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


SIZES = {
    "with a prefix": b"0xe",
    "with a plus": b"+e",
    "with a minus": b"-e",
    "minus zero": b"-0",
    "a space before": b" e",
    "a tab before": b"\te",
    "a space inside": b"0 e",
    "with an underscore": b"0_e",
    "empty": b"",
    "no digit": b"g",
    "a digit and no digit": b"eg",
    "a dot": b"e.0",
    "a comma": b"e,e",
    "a vertical tab behind": b"e\x0b",
    "a NUL behind": b"e\x00",
    "a bare CR behind": b"e\r",
    "a superscript": b"\xb2",
    "a full-width digit": "\uff11".encode(),
    "a quote": b'"e"',
    "an extension with a bare CR": b"e;a\rb",
    "an extension with a NUL": b"e;a\x00b",
    "only an extension": b";e",
    "that wraps to 14 in 64 bits": b"1000000000000000e",
    "of all ones": b"ffffffffffffffff",
    "of 100 digits": b"f" * 100,
    "with 64 KiB of extension": b"e;" + b"x" * 65536,
}

CHUNKS = [
    *(
        refused(f"a size {name}", chunks(size + b"\r\n" + BODY + b"\r\n0\r\n\r\n"), (*BAD_BODY, "413 body_too_large"))
        for name, size in SIZES.items()
    ),
    refused("a size behind LF", chunks(b"e\n" + BODY + b"\r\n0\r\n\r\n"), BAD_BODY),
    refused("an extension behind LF", chunks(b"e;x\n" + BODY + b"\r\n0\r\n\r\n"), BAD_BODY),
    refused("an extension with LF inside", chunks(b"e;\ne\r\n" + BODY + b"\r\n0\r\n\r\n"), BAD_BODY),
    refused("no line break after the data", chunks(b"e\r\n" + BODY + b"0\r\n\r\n"), BAD_BODY),
    refused("LF after the data", chunks(b"e\r\n" + BODY + b"\n0\r\n\r\n"), BAD_BODY),
    refused("CR after the data", chunks(b"e\r\n" + BODY + b"\r0\r\n\r\n"), BAD_BODY),
    refused("LF CR after the data", chunks(b"e\r\n" + BODY + b"\n\r0\r\n\r\n"), BAD_BODY),
    refused("two line breaks after the data", chunks(b"e\r\n" + BODY + b"\r\n\r\n0\r\n\r\n"), BAD_BODY),
    refused("a byte more than the size", chunks(b"e\r\n" + BODY + b"x\r\n0\r\n\r\n"), BAD_BODY),
    refused("a byte less than the size", chunks(b"f\r\n" + BODY + b"\r\n0\r\n\r\n"), BAD_BODY),
    refused("two characters instead of the line break", chunks(b"e\r\n" + BODY + b"xx0\r\n\r\n"), BAD_BODY),
    refused("a last chunk behind LF", chunks(b"e\r\n" + BODY + b"\r\n0\n\r\n"), BAD_BODY),
    refused("an end with LF", chunks(b"e\r\n" + BODY + b"\r\n0\r\n\n"), BAD_BODY),
    refused("an end with CR", chunks(b"e\r\n" + BODY + b"\r\n0\r\n\rX"), BAD_BODY),
    refused("a trailer with LF", chunks(b"e\r\n" + BODY + b"\r\n0\r\nX: y\n\r\n"), BAD_BODY),
    refused("a trailer with LF in its value", chunks(b"e\r\n" + BODY + b"\r\n0\r\nX: y\nZ: z\r\n\r\n"), BAD_BODY),
    refused("a trailer that is no field", chunks(b"e\r\n" + BODY + b"\r\n0\r\nno field\r\n\r\n"), BAD_BODY),
    refused("a trailer with a space before its colon", chunks(b"e\r\n" + BODY + b"\r\n0\r\nX : y\r\n\r\n"), BAD_BODY),
    refused("a trailer that is folded", chunks(b"e\r\n" + BODY + b"\r\n0\r\nX: y\r\n z\r\n\r\n"), BAD_BODY),
    refused("a trailer with a NUL", chunks(b"e\r\n" + BODY + b"\r\n0\r\nX: \x00\r\n\r\n"), BAD_BODY),
    refused(
        "a trailer of 64 KiB",
        chunks(b"e\r\n" + BODY + b"\r\n0\r\nX: " + b"y" * 65536 + b"\r\n\r\n"),
        (*BAD_BODY, "431 head_too_large"),
    ),
    refused(
        "a trailer of 10000 fields",
        chunks(b"e\r\n" + BODY + b"\r\n0\r\n" + b"X: y\r\n" * 10000 + b"\r\n"),
        (*BAD_BODY, "431 head_too_large"),
    ),
    served("one chunk", chunks(CHUNKED_BODY)),
    served("an upper-case size", chunks(CHUNKED_BODY.replace(b"e\r\n", b"E\r\n", 1))),
    served("a size with zeros before it", chunks(b"00000e\r\n" + CHUNKED_BODY[3:])),
    served("many chunks", chunks(b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n")),
    served("an extension", chunks(b"e;name=value\r\n" + CHUNKED_BODY[3:])),
    served("an extension that is quoted", chunks(b'e;name="a;b, 0"\r\n' + CHUNKED_BODY[3:])),
    served("an extension of the last chunk", chunks(CHUNKED_BODY.replace(b"0\r\n", b"0;x=1\r\n"))),
    served("no chunk but the last", chunks(b"0\r\n\r\n"), b""),
    served("a last chunk of several zeros", chunks(CHUNKED_BODY.replace(b"0\r\n", b"000\r\n"))),
    served("a trailer", chunks(CHUNKED_BODY[:-2] + b"X-Checksum: 1\r\nX-More: 2\r\n\r\n")),
    served("a trailer that would frame", chunks(CHUNKED_BODY[:-2] + b"Content-Length: 5\r\nHost: x\r\n\r\n")),
    served("a trailer that would name a model", chunks(CHUNKED_BODY[:-2] + b"model-override: z\r\n\r\n")),
    Case("another request behind the end", chunks(CHUNKED_BODY) + SMUGGLED, ("200", "200"), (BODY, b"smuggled"), open=True),
    Case("garbage behind the end", chunks(CHUNKED_BODY) + b"garbage\r\n\r\n" + SMUGGLED, ("200", "400 bad_request"), (BODY,)),
    Case("a chunk behind the end", chunks(CHUNKED_BODY + CHUNKED_BODY) + SMUGGLED, ("200", "400 bad_request"), (BODY,)),
    Case("line breaks behind the end", chunks(CHUNKED_BODY + b"\r\n\r\n") + SMUGGLED, ("200", "200"), (BODY, b"smuggled"), open=True),
]  # fmt: skip


@table(CHUNKS)
def test_chunks(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.parametrize("size", [b"10000000e", b"7fffffff", b"80000000", b"ffffffff", b"7fffffffffffff"])
def test_a_chunk_that_is_larger_than_any_body_may_be(size: bytes, tmp_path: Path) -> None:
    """It is refused at once, or when the limit is passed; it is not taken for what is left of its size in 32 bits."""

    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(chunks(size + b"\r\n" + BODY + b"\r\n0\r\n\r\n" + SMUGGLED))
        await client.send(bytes(MAX_BODY))
        answer = await client.answer()
        assert answer is not None
        assert said(answer) in ("413 body_too_large", *BAD_BODY)
        assert await client.rest() == b""
        assert wire.engine.received == 0

    play(tmp_path, scenario, ok)
