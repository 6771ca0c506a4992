"""Sealing: what opens, what does not, and bytes that may never change."""

from __future__ import annotations

import random

import pytest
from blake3 import blake3

from imagecache.blockimage.seals import (
    HEADER,
    NO_SEALS,
    NameSeals,
    PackKey,
    Seals,
    Secrets,
    sealed_with,
)
from imagecache.chunks import SEAL_BYTES
from imagecache.errors import Corrupt, Denied, UsageError
from imagecache.packs.pack import TRAILER, PackWriter, read_table, read_trailer

pytestmark = pytest.mark.quick

SECRETS = Secrets.parse(f"names:{'0a' * 32} 1:{'0b' * 32}")
SEALS = Seals(SECRETS)
DIGEST = blake3(b"a chunk").digest()


def pack_key(seals: Seals = SEALS) -> PackKey:
    assert seals.pack_key is not None
    return seals.pack_key


def test_golden_bytes() -> None:
    """The format: a realm that was sealed once opens with every later version."""
    chunk = pack_key().seal_chunk(DIGEST, b"stored")
    assert chunk.hex() == "754e6d82889199dd88562ab55a53672f9082f0fc9453e91c6e40abb228d2a3c6466c"
    body = SEALS.seal_object("v1/r/g00000001/roots/x", b"{}")
    assert body.hex() == (
        "43434352595054310100000000000000d34d7de31d7821185ba8a63b592c4a0f"
        "41fd698a89eb8b2b2b0fe1cd94fd"
    )
    name = NameSeals(SECRETS.names).seal("v1/r/aliases/", "n.debian")
    assert name == "s~z53lFxWJH9MStChfcTyuT_7uwsDW7rzj"
    assert SEALS.checks == {1: "0ddb97dd82c05d75f4e008e72c7d13f1"}


def test_the_same_bytes_seal_alike_and_other_encodings_do_not_share_a_nonce() -> None:
    """Convergent inside the realm; a nonce is never used for two ciphertexts."""
    key = pack_key()
    one, two = key.seal_chunk(DIGEST, b"one encoding"), key.seal_chunk(DIGEST, b"another one!")
    assert one == key.seal_chunk(DIGEST, b"one encoding")
    assert one[:12] != two[:12]
    other = pack_key(Seals(Secrets.parse(f"names:{'0a' * 32} 1:{'0c' * 32}")))
    assert other.seal_chunk(DIGEST, b"one encoding")[:12] != one[:12]
    assert len(one) == len(b"one encoding") + SEAL_BYTES


def test_every_changed_bit_of_a_chunk_breaks_its_seal() -> None:
    sealed = pack_key().seal_chunk(DIGEST, b"stored bytes")
    assert SEALS.open_chunk(1, DIGEST, sealed) == b"stored bytes"
    for bit in range(len(sealed) * 8):
        changed = bytearray(sealed)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Corrupt):
            SEALS.open_chunk(1, DIGEST, bytes(changed))
    for end in range(len(sealed)):
        with pytest.raises(Corrupt):
            SEALS.open_chunk(1, DIGEST, sealed[:end])


def test_a_chunk_moved_to_anothers_place_does_not_open() -> None:
    sealed = pack_key().seal_chunk(DIGEST, b"stored bytes")
    with pytest.raises(Corrupt):
        SEALS.open_chunk(1, blake3(b"another").digest(), sealed)


def test_wrong_and_missing_secrets() -> None:
    """A missing one is named and is no damage; a wrong one never opens anything."""
    sealed = pack_key().seal_chunk(DIGEST, b"stored bytes")
    with pytest.raises(Denied, match="secret 1, which is not configured"):
        NO_SEALS.open_chunk(1, DIGEST, sealed)
    wrong = Seals(Secrets.parse(f"names:{'0a' * 32} 1:{'0c' * 32}"))
    with pytest.raises(Corrupt):
        wrong.open_chunk(1, DIGEST, sealed)
    assert NO_SEALS.open_chunk(0, DIGEST, b"in the clear") == b"in the clear"
    assert wrong.checks != SEALS.checks


def test_objects_open_under_their_own_key_alone() -> None:
    body = SEALS.seal_object("v1/r/aliases/a", b"points to x")
    assert SEALS.open_object("v1/r/aliases/a", body) == b"points to x"
    assert sealed_with(body) == 1
    assert sealed_with(b"{}") == 0
    with pytest.raises(Corrupt, match="lay elsewhere"):
        SEALS.open_object("v1/r/aliases/b", body)
    for at in range(len(body)):
        changed = bytearray(body)
        changed[at] ^= 0x10
        with pytest.raises((Corrupt, Denied)):
            SEALS.open_object("v1/r/aliases/a", bytes(changed))
        with pytest.raises(Corrupt):
            SEALS.open_object("v1/r/aliases/a", body[:at])
    assert len(body) == HEADER.size + SEAL_BYTES + len(b"points to x")


def test_rotated_secrets_open_the_old_and_seal_with_the_new() -> None:
    old = pack_key().seal_chunk(DIGEST, b"stored")
    waiting = SECRETS.with_new(bytes(range(32)), active=False)
    assert (waiting.active, sorted(waiting.by_id)) == (1, [1, 2])
    rotated = Seals(waiting.using(2))
    assert pack_key(rotated).key_id == 2
    assert rotated.open_chunk(1, DIGEST, old) == b"stored"
    new = pack_key(rotated).seal_chunk(DIGEST, b"stored")
    assert new != old
    assert Seals(waiting).open_chunk(2, DIGEST, new) == b"stored"
    with pytest.raises(Denied):
        SEALS.open_chunk(2, DIGEST, new)
    assert Secrets.parse(waiting.using(2).text()).active == 2


@pytest.mark.parametrize(
    "document",
    [
        "", "names:00", f"names:{'0a' * 32}", f"1:{'0a' * 32}", f"names:{'0a' * 32} 0:{'0b' * 32}",
        f"names:{'0a' * 32} 256:{'0b' * 32}", f"names:{'0a' * 32} 1:{'0a' * 32}",
        f"names:{'0a' * 32} 1:{'0b' * 32} 1:{'0c' * 32}", f"names:{'0A' * 32} 1:{'0b' * 32}",
        f"names:{'0a' * 32} names:{'0c' * 32} 1:{'0b' * 32}", "é",
    ],
)  # fmt: skip
def test_malformed_documents_are_refused_without_being_repeated(document: str) -> None:
    with pytest.raises(UsageError) as caught:
        Secrets.parse(document)
    assert "0a0a" not in str(caught.value).lower()
    assert "0a0a" not in repr(SECRETS)


def test_remarks_and_lines() -> None:
    text = f"# made by hand\nnames:{'0a' * 32}\n\n 2:{'0b' * 32}\n# old: \n1:{'0c' * 32}\n"
    assert Secrets.parse(text).active == 2


def test_names_come_back_and_say_nothing() -> None:
    """Any name of the key grammar, long ones in several segments; equal ones differ elsewhere."""
    names, dice = NameSeals(SECRETS.names), random.Random(5)
    seen = set()
    for length in (1, 3, 64, 79, 126, 127, 128, 200, 300):
        name = "".join(dice.choice("abcXYZ019._=@~:-") for _ in range(length))
        sealed = names.seal("v1/r/aliases/", name)
        assert names.open("v1/r/aliases/", sealed) == name
        assert names.open("v1/r/pins/", sealed) is None
        assert name not in sealed or length < 4
        assert all(len(piece) <= 200 for piece in sealed.split("/"))
        assert names.seal("v1/r/aliases/", sealed.split("/")[0]) == sealed.split("/")[0]
        seen.add(sealed)
        for at in range(2, len(sealed), 7):
            changed = sealed[:at] + ("A" if sealed[at] != "A" else "B") + sealed[at + 1 :]
            assert names.open("v1/r/aliases/", changed) != name
    assert len(seen) == 9
    assert names.open("v1/r/aliases/", "n.plain") is None
    assert names.open("v1/r/aliases/", "s~!!") is None


def test_a_sealed_pack_shows_no_digest_and_reads_back() -> None:
    """Its table would tell equality of content; damage to it is found."""
    key = pack_key()
    writer = PackWriter(key)
    raw = writer.start()
    sealed = key.seal_chunk(DIGEST, b"stored")
    raw += writer.add(DIGEST, sealed, blocks=1, codec=0, key_id=1)
    tail, name = writer.finish()
    raw += tail
    assert blake3(raw).digest() == name
    assert DIGEST not in raw
    trailer = read_trailer(raw[-TRAILER.size :], len(raw))
    end = len(raw) - TRAILER.size
    table = raw[end - trailer.table_bytes : end]
    (row,) = read_table(table, len(raw), trailer.key_id, SEALS)
    assert (row.digest, row.key_id, row.stored_length) == (DIGEST, 1, len(sealed))
    with pytest.raises(Denied):
        read_table(table, len(raw), trailer.key_id)
    with pytest.raises(Corrupt):
        read_table(bytes([table[0] ^ 1]) + table[1:], len(raw), trailer.key_id, SEALS)


def test_a_worker_is_given_what_seals_packs_alone() -> None:
    fields = pack_key().as_json()
    assert PackKey.from_json(fields) == pack_key()
    told = str(fields)
    assert "0b" * 32 not in told
    assert "0a" * 32 not in told
