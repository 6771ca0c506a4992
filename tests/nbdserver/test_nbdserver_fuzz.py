"""Hypothesis drives the fuzz targets: any bytes, and sequences of almost right messages."""

import struct
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kits.nbd_client import IHAVEOPT, go_body, meta_body
from kits.nbd_fuzz import fuzz_handshake, fuzz_transmission

CORPUS = Path(__file__).parent / "fuzz" / "corpus"


def option(number, body):
    return struct.pack(">QII", IHAVEOPT, number, len(body)) + body


names = st.sampled_from([b"disk", b"", b"other", b"a" * 4096, b"\xff", b"d\0"])
bodies = st.one_of(
    st.just(b""),
    st.binary(max_size=40),
    st.builds(go_body, names),
    st.builds(lambda name: go_body(name, 0, 1, 2, 3), names),
    st.builds(lambda name: meta_body(name, b"base:allocation", b"x-fuzz:"), names),
    st.builds(lambda name: meta_body(name), names),
)
options = st.builds(option, st.one_of(st.integers(0, 12), st.integers(0, 2**32 - 1)), bodies)
handshakes = st.builds(
    lambda first, flags, parts: bytes([first]) + struct.pack(">I", flags) + b"".join(parts),
    st.integers(0, 255),
    st.sampled_from([0, 1, 2, 3, 3, 3, 3, 4, 0xFFFFFFFF]),
    st.lists(st.one_of(options, options, options, st.binary(max_size=20)), max_size=12),
)


@pytest.mark.quick
@settings(max_examples=400, deadline=None)
@given(st.one_of(handshakes, st.binary(max_size=200)))
@example(b"")
def test_handshake(data):
    """Any client bytes: answers in step, or a violation; splitting them changes nothing."""
    end, output = fuzz_handshake(data)
    for split in range(4):
        if data:
            other = bytes([data[0] % 3 + 3 * split]) + data[1:]
            if (end, output) != fuzz_handshake(other):
                # Only bytes behind STARTTLS matter by when they came, as they must.
                assert struct.pack(">QI", IHAVEOPT, 5) in data


offsets = st.one_of(
    st.integers(0, 70_000), st.sampled_from([2**16 - 1, 2**16, 2**32, 2**63, 2**64 - 1])
)
lengths = st.one_of(st.integers(0, 5000), st.sampled_from([2**16, 2**16 + 1, 2**31, 2**32 - 1]))


@st.composite
def transmissions(draw):
    first = draw(st.integers(0, 255))
    extended = first % 3 == 2
    parts = [bytes([first])]
    for _ in range(draw(st.integers(0, 14))):
        command = draw(st.one_of(st.integers(0, 8), st.just(0)))
        flags = draw(st.sampled_from([0, 0, 0, 1, 2, 4, 8, 16, 32, 33, 64, 0xFFFF]))
        cookie = draw(st.binary(min_size=8, max_size=8))
        offset, length = draw(offsets), draw(lengths)
        payload = b""
        if extended:
            if command == 1 and draw(st.booleans()):
                flags |= 32
            head = struct.pack(">IHH8sQQ", 0x21E41C71, flags, command, cookie, offset, length)
            if flags & 32:
                payload = bytes(min(length, 6000))
        else:
            head = struct.pack(">IHH8sQI", 0x25609513, flags, command, cookie, offset, length)
            if command == 1:
                payload = bytes(min(length, 6000))
        parts.append(head + payload)
        if draw(st.integers(0, 40)) == 0:
            parts.append(draw(st.binary(max_size=30)))
    return b"".join(parts)


@settings(max_examples=300, deadline=None)
@given(st.one_of(transmissions(), st.binary(max_size=120)))
def test_transmission(data):
    """Any client bytes: right answers in step or an end; no pin, task or request is left over."""
    fuzz_transmission(data)


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (target, path)
        for target in (fuzz_handshake, fuzz_transmission)
        for path in sorted((CORPUS / target.__name__[5:]).iterdir())
    ],
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_corpus(target, path):
    """Every input of the corpus, whole and cut anywhere."""
    data = path.read_bytes()
    target(data)
    for cut in range(0, len(data), max(1, len(data) // 50)):
        target(data[:cut])


def test_understood_requests_are_answered():
    """The targets are no empty shells: plain requests get exactly one reply each."""
    for first in range(0, 36):
        extended = first % 3 == 2
        shape, magic = (">IHH8sQQ", 0x21E41C71) if extended else (">IHH8sQI", 0x25609513)
        data = b"".join(
            struct.pack(
                shape,
                magic,
                0,
                index % 9 if index % 9 != 2 and index % 9 != 1 else 0,
                index.to_bytes(8, "big"),
                index * 50,
                4000,
            )
            for index in range(40)
        )
        assert fuzz_transmission(bytes([first]) + data) == (40, 40)
