"""One HTTP answer, read from bytes: what RFC 9112 lets a client accept, and nothing that could be read in two ways."""

from __future__ import annotations

import gzip
import itertools
import zlib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.core.answer import MAX_ANSWER_BYTES, MAX_BODY_BYTES, MAX_HEAD_BYTES, Answer, NotHttp, TooLarge, decoded

JSON = b'{"responseCode":"2009300","responseMessage":"Successful"}'


def read(data: bytes, *, ends: bool = False) -> Answer:
    """The answer that these bytes are."""
    answer = Answer()
    answer.feed(data)
    if ends:
        answer.end()
    return answer


def head(*lines: bytes, end: bytes = b"\r\n") -> bytes:
    return end.join([b"HTTP/1.1 200 OK", *lines, b"", b""])


def raw_deflate(body: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(body) + stream.flush()


# -- what is accepted -------------------------------------------------------------------------------------------------

ACCEPTED = {
    "plain": head(b"Content-Length: 57") + JSON,
    "two equal lengths": head(b"Content-Length: 57", b"Content-Length: 57") + JSON,
    "equal lengths in one line": head(b"Content-Length: 57, 57") + JSON,
    "equal numbers, written differently": head(b"Content-Length: 057", b"content-length:\t57") + JSON,
    "a folded line": head(b"Set-Cookie: a=b;", b"\tc=d", b"Content-Length: 57") + JSON,
    "a folded line before the first field": head(b" Content-Length: 1", b"Content-Length: 57") + JSON,
    "a control character": head(b"Set-Cookie: a=\x01b\x0b", b"Content-Length: 57") + JSON,
    "NUL": head(b"X-Cdn: a\x00b", b"Content-Length: 57") + JSON,
    "a bare CR in a value": head(b"X-Cdn: a\rb", b"Content-Length: 57") + JSON,
    "Latin-1": head(b"X-Cdn: caf\xe9", b"Content-Length: 57") + JSON,
    "bare LF": head(b"Content-Length: 57", end=b"\n") + JSON,
    "bare LF here and there": b"HTTP/1.1 200 OK\r\nServer: old\nContent-Length: 57\r\n\n" + JSON,
    "bare LF, then a whole line end": b"HTTP/1.1 200 OK\nContent-Length: 57\n\r\n" + JSON,
    "a blank before the colon": head(b"Content-Length : 57") + JSON,
    "no blank after the colon": head(b"Content-Length:57") + JSON,
    "an empty field": head(b"Vary:", b"Content-Length: 57") + JSON,
    "no reason": b"HTTP/1.1 200\r\nContent-Length: 57\r\n\r\n" + JSON,
    "two blanks before the status": b"HTTP/1.1  200 \t OK\r\nContent-Length: 57\r\n\r\n" + JSON,
    "blank lines first": b"\r\n\n\r\n" + head(b"Content-Length: 57") + JSON,
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Length: 57\r\n\r\n" + JSON,
    "chunked": head(b"Transfer-Encoding: chunked") + b"39\r\n" + JSON + b"\r\n0\r\n\r\n",
    "Chunked, with an empty element": head(b"Transfer-Encoding: , Chunked") + b"39\r\n" + JSON + b"\r\n0\r\n\r\n",
    "identity, then chunked": head(b"Transfer-Encoding: identity, chunked") + b"39\r\n" + JSON + b"\r\n0\r\n\r\n",
    "blanks around a chunk's size": head(b"Transfer-Encoding: chunked") + b" 39  \r\n" + JSON + b"\r\n0 \r\n\r\n",
    "zeros before a chunk's size": head(b"Transfer-Encoding: chunked") + b"00039\r\n" + JSON + b"\r\n000\r\n\r\n",
    "a chunk's extension": head(b"Transfer-Encoding: chunked") + b'39 ; a="b"\r\n' + JSON + b"\r\n0;x\r\n\r\n",
    "chunks with bare LF": head(b"Transfer-Encoding: chunked", end=b"\n") + b"39\n" + JSON + b"\n0\n\n",
    "two chunks": head(b"Transfer-Encoding: chunked")
    + b"9\r\n"
    + JSON[:9]
    + b"\r\n30\r\n"
    + JSON[9:]
    + b"\r\n0\r\nX-Sum: 1\r\n\r\n",
    "interim answers first": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n"
    + head(b"Content-Length: 57")
    + JSON,
}


@pytest.mark.parametrize("data", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_a_whole_answer_is_read_as_one(data: bytes) -> None:
    """Complete with its last byte and not before; nothing is left over."""
    answer = read(data)

    assert (answer.complete, answer.surplus, answer.status, answer.body) == (True, False, 200, JSON)
    assert not read(data[:-1]).complete


@pytest.mark.parametrize("data", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_where_packets_end_means_nothing(data: bytes) -> None:
    """In single bytes it is the same answer."""
    answer, whole = Answer(), read(data)
    for at in range(len(data)):
        answer.feed(data[at : at + 1])

    assert answer.complete
    assert (answer.headers, answer.body) == (whole.headers, whole.body)


@given(st.sampled_from(sorted(ACCEPTED)), st.lists(st.integers(0, 300), max_size=6))
def test_any_cut_gives_the_same_answer(name: str, cuts: list[int]) -> None:
    """Wherever the bytes are divided."""
    data, answer = ACCEPTED[name], Answer()
    for start, end in itertools.pairwise([0, *sorted(cuts), len(data)]):
        answer.feed(data[start:end])

    assert (answer.complete, answer.surplus, answer.body) == (True, False, JSON)


@given(st.binary(max_size=400))
def test_no_bytes_do_harm(data: bytes) -> None:
    """Whatever comes is an answer, the beginning of one, or `NotHttp`."""
    answer = Answer()
    with suppress(NotHttp):
        answer.feed(data)
        answer.feed(b"\r\n\r\n")

    assert answer.received >= len(data)


def test_header_values_are_one_line_of_text() -> None:
    """Names in small letters, repeated ones joined, folded lines joined with a blank, control characters are blanks."""
    answer = read(head(b"X-A: 1", b"Retry-AFTER: \t7 ", b"x-a:2", b"X-B: a\x01b", b"  c ", b"Content-Length: 0"))

    assert answer.headers == {"x-a": "1, 2", "retry-after": "7", "x-b": "a b c", "content-length": "0"}


@pytest.mark.parametrize(
    ("lines", "kept"),
    [
        ((b"Content-Length: 2",), True),
        ((b"Content-Length: 2", b"Connection: keep-alive"), True),
        ((b"Content-Length: 2", b"Connection: Keep-Alive, Close"), False),
    ],
)
def test_a_connection_is_kept_unless_the_answer_says_otherwise(lines: tuple[bytes, ...], kept: bool) -> None:
    """RFC 9112, 9.3."""

    assert read(head(*lines) + b"ok").reusable is kept


def test_an_old_connection_is_closed_unless_the_answer_says_otherwise() -> None:
    """HTTP/1.0 keeps only what it says; with a transfer coding, which 1.0 does not know, not even that."""
    kept = b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n"

    assert not read(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok").reusable
    assert read(kept + b"Content-Length: 2\r\n\r\nok").reusable
    assert not read(kept + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n").reusable


# -- what is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "HTTP/2": b"HTTP/2 200\r\n\r\n",
    "small letters": b"http/1.1 200 OK\r\n\r\n",
    "no status": b"HTTP/1.1 OK\r\n\r\n",
    "a status of two digits": b"HTTP/1.1 20 OK\r\n\r\n",
    "a status of four digits": b"HTTP/1.1 2000 OK\r\n\r\n",
    "a status below 100": b"HTTP/1.1 099 Odd\r\nContent-Length: 2\r\n\r\nok",
    "101": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n",
    "a length beside chunks": head(b"Content-Length: 57", b"Transfer-Encoding: chunked"),
    "chunks beside a length": head(b"Transfer-Encoding: chunked", b"Content-Length: 57"),
    "an empty transfer coding beside a length": head(b"Transfer-Encoding:", b"Content-Length: 57"),
    "two lengths": head(b"Content-Length: 57", b"Content-Length: 58"),
    "two lengths in one line": head(b"Content-Length: 57, 58"),
    "a length with a sign": head(b"Content-Length: +57"),
    "a negative length": head(b"Content-Length: -1"),
    "a length in hexadecimal": head(b"Content-Length: 0x39"),
    "a length with an underscore": head(b"Content-Length: 5_7"),
    "a length in other digits": head("Content-Length: ²".encode("latin-1")),
    "an empty length": head(b"Content-Length:"),
    "a length and nothing": head(b"Content-Length: 57,"),
    "a length without end": head(b"Content-Length: " + b"9" * 5000),
    "a folded length": head(b"Content-Length: 5", b" 7"),
    "an unknown transfer coding": head(b"Transfer-Encoding: br, chunked"),
    "chunked twice": head(b"Transfer-Encoding: chunked, chunked"),
    "chunked in two lines": head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
    "chunked not last": head(b"Transfer-Encoding: chunked, gzip"),
    "a coding with a control character": head(b"Transfer-Encoding: chunked\x0b;"),
    "a name with a control character": head(b"Transfer-Encoding\x0b: chunked", b"Content-Length: 57"),
    "a name that begins with one": head(b"\x01Content-Length: 57"),
    "a name with a blank": head(b"Content Length: 57"),
    "no name": head(b": 57"),
    "no colon": head(b"nonsense", b"Content-Length: 57"),
    "a chunk without a size": head(b"Transfer-Encoding: chunked") + b"\r\n",
    "a chunk's size with a sign": head(b"Transfer-Encoding: chunked") + b"+2\r\nok",
    "a chunk's size with 0x": head(b"Transfer-Encoding: chunked") + b"0x2\r\nok",
    "a chunk's size with an underscore": head(b"Transfer-Encoding: chunked") + b"0_2\r\nok",
    "a chunk's size with a blank inside": head(b"Transfer-Encoding: chunked") + b"3 9\r\n",
    "a chunk that is too long": head(b"Transfer-Encoding: chunked") + b"2\r\nokk\r\n0\r\n\r\n",
    "an interim answer with a body": b"HTTP/1.1 103 Early Hints\r\nContent-Length: 4\r\n\r\nbody" + head() + JSON,
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
def test_what_can_be_read_in_two_ways_is_refused(data: bytes) -> None:
    """`NotHttp`, in one short line that repeats nothing of it."""
    with pytest.raises(NotHttp) as refused:
        read(data)

    assert 10 < len(str(refused.value)) < 80


@pytest.mark.parametrize("interim", [b"HTTP/1.1 100 Continue", b"HTTP/1.1 103 Early Hints", b"HTTP/1.1 199 Odd"])
@pytest.mark.parametrize("field", [b"Content-Length: %d", b"Transfer-Encoding: chunked\r\nX-Size: %d"])
def test_the_body_of_an_interim_answer_is_never_the_final_one(interim: bytes, field: bytes) -> None:
    """It has none by the standard; what stands there is refused, or taken for the answer, and the rest is surplus."""
    inside = head(b"Content-Length: 57") + JSON
    with_body = interim + b"\r\n" + field % len(inside) + b"\r\n\r\n"

    assert read(with_body + inside + head(b"Content-Length: 2") + b"no").surplus
    with pytest.raises(NotHttp):
        read(with_body + JSON + head(b"Content-Length: 2") + b"no")


# -- bounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "more", "limit"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"X-Filler: 123456\r\n", MAX_HEAD_BYTES),
        (b"HTTP/1.1 200 ", b"x", MAX_HEAD_BYTES),
        (b"", b"\r\n", MAX_HEAD_BYTES),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n", MAX_HEAD_BYTES),
        (head(b"Transfer-Encoding: chunked") + b"1;", b"x", MAX_ANSWER_BYTES),
        (head(b"Transfer-Encoding: chunked") + b"0\r\n", b"X-Filler: 123456\r\n", MAX_ANSWER_BYTES),
    ],
    ids=["headers", "status", "blank lines", "interim answers", "extension", "trailers"],
)
def test_an_answer_without_end_is_given_up(first: bytes, more: bytes, limit: int) -> None:
    """`TooLarge` when the limit is passed."""
    answer = Answer()
    answer.feed(first)
    piece = more * (4096 // len(more))
    while answer.received + len(piece) <= limit:
        answer.feed(piece)

    with pytest.raises(TooLarge, match="more than"):
        answer.feed(piece)


@pytest.mark.parametrize("framing", [b"Content-Length: 99999999999", b"Transfer-Encoding: chunked", b"Server: old"])
def test_a_long_body_is_cut(framing: bytes) -> None:
    """The status counts, the connection does not serve again, and what follows is not looked at."""
    answer = read(head(framing) + (b"FFFFFF\r\n" if b"chunked" in framing else b"") + b"x" * (MAX_BODY_BYTES + 9))

    assert (answer.complete, answer.cut, answer.reusable, answer.surplus) == (True, True, False, False)
    assert answer.body == b"x" * MAX_BODY_BYTES


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    """RFC 9112, 6.3; an answer with a length does not."""

    assert read(head() + JSON, ends=True).body == JSON
    assert not read(head(b"Content-Length: 58") + JSON, ends=True).complete
    assert not read(b"HTTP/1.1 200 OK\r\n", ends=True).complete


# -- content codings --------------------------------------------------------------------------------------------------

CODED = {
    "gzip": (b"gzip", gzip.compress(JSON)),
    "x-gzip": (b"x-gzip", gzip.compress(JSON)),
    "GZIP": (b"GZIP", gzip.compress(JSON)),
    "deflate": (b"deflate", zlib.compress(JSON)),
    "deflate without zlib's frame": (b"deflate", raw_deflate(JSON)),
    "gzip called deflate": (b"deflate", gzip.compress(JSON)),
    "deflate called gzip": (b"gzip", zlib.compress(JSON)),
    "twice": (b"deflate, gzip", gzip.compress(zlib.compress(JSON))),
    "identity": (b"identity", JSON),
    "in two members": (b"gzip", gzip.compress(JSON[:20]) + gzip.compress(JSON[20:])),
    "beside what is no coding": (b"gzip, utf-8", gzip.compress(JSON)),
    "named after a character set": (b"UTF-8", gzip.compress(JSON)),
    "decoded, under the name of another coding": (b"br", JSON),
    "followed by zeros": (b"gzip", gzip.compress(JSON) + b"\0" * 9),
    "decoded by someone before": (b"gzip", JSON),
    "decoded, called deflate": (b"deflate", JSON),
    "gzip that nobody names": (b"", gzip.compress(JSON)),
}


@pytest.mark.parametrize(("coding", "body"), CODED.values(), ids=CODED.keys())
def test_a_coded_body_is_decoded(coding: bytes, body: bytes) -> None:
    """Nobody asked for it, and it comes all the same."""
    fields = [b"Content-Encoding: " + coding] if coding else []

    assert read(head(b"Content-Length: %d" % len(body), *fields) + body).body == JSON


def test_a_transfer_coding_is_decoded() -> None:
    """gzip as a transfer coding, inside the chunks or up to the end of the connection."""
    body = gzip.compress(JSON)
    chunks = b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"

    assert read(head(b"Transfer-Encoding: gzip, chunked") + chunks).body == JSON
    assert read(head(b"Transfer-Encoding: gzip") + body, ends=True).body == JSON


@pytest.mark.parametrize("compress", [gzip.compress, zlib.compress, raw_deflate])
def test_a_bomb_is_cut(compress: object) -> None:
    """A small body that would be a gigabyte fills no memory."""
    assert callable(compress)
    bomb = compress(b"x" * 50_000_000)

    assert len(bomb) < MAX_BODY_BYTES
    assert decoded(bomb, ["deflate"]) == b"x" * MAX_BODY_BYTES


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "nonsense"])
def test_what_cannot_be_decoded_stays_as_it_is(coding: str) -> None:
    """Half of it, or a coding that is not known: no code will be found in it."""
    half = gzip.compress(JSON)[:-12]

    assert decoded(half, [coding]) == half
