"""A sealed store: the contract, what the bucket sees, and secrets that are not the realm's."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from kits.store_contract import StoreContract, Subject

from imagecache.blockimage.keys import RealmKeys
from imagecache.blockimage.seals import Seals, Secrets
from imagecache.catalog import AliasName, Catalog
from imagecache.errors import Corrupt, Denied, NotFound, Unavailable, UsageError
from imagecache.realmsecrets import load_secrets
from imagecache.store.memory import MemoryReader, MemoryStore
from imagecache.store.sealed import SealedStore

KEYS = RealmKeys("default")
SECRETS = Secrets.parse(f"names:{'0a' * 32} 1:{'0b' * 32}")
DOCUMENT = SECRETS.text()
SHA = "sha256:" + "d" * 64


def sealed(store: MemoryStore, secrets: Secrets = SECRETS, realm: str = "default") -> SealedStore:
    return SealedStore(store, RealmKeys(realm), Seals(secrets))


class TestSealedStore(StoreContract):
    """G: keys outside the realm pass as they are, so the whole contract holds."""

    @pytest.fixture
    async def subject(self) -> AsyncIterator[Subject]:
        inner = MemoryStore()

        async def seed(key: str, body: bytes) -> None:
            await inner.put(key, body)

        async def peek(key: str) -> bytes | None:
            return inner.objects.get(key)

        yield Subject(sealed(inner), MemoryReader(inner), seed, peek)


ROOT = KEYS.within(1) + "roots/"
SEALED_KEYS = [
    f"{ROOT}{'1' * 64}.json",
    KEYS.layer(SHA, 1),
    KEYS.sealed("indexes", b"i" * 32, 1),
    KEYS.blob(SHA, 1),
    KEYS.start("docker.io/library/nginx", SHA, 1),
    KEYS.alias("docker.io/library/nginx", "1.27"),
    KEYS.alias("localhost/" + "long/" * 60, "x" * 128),
    KEYS.pin(SHA),
    f"{KEYS.build_leases}{'2' * 64}.json",
    KEYS.reader_lease("host-1"),
    KEYS.collector_lease,
    KEYS.scrub_position,
    f"{KEYS.collections}0001.json",
]


async def test_every_kind_of_object_comes_back_under_its_key() -> None:
    inner = MemoryStore()
    store = sealed(inner)
    for number, key in enumerate(SEALED_KEYS):
        assert await store.put(key, b"secret body %d" % number)
    for number, key in enumerate(SEALED_KEYS):
        assert await store.get(key, limit=20) == b"secret body %d" % number
        assert (await store.stat(key)).key == key
    assert {x.key async for x in store.list(KEYS.prefix)} == set(SEALED_KEYS)
    for key in SEALED_KEYS:
        folder = key.rsplit("/", 1)[0] + "/"
        assert key in {x.key async for x in store.list(folder)}
    again = sealed(inner)
    for key in SEALED_KEYS:
        assert not await again.put(key, b"x", only_if_absent=True)
        await again.delete(key)
    assert list(inner.objects) == [KEYS.sealed_realm]


async def test_the_bucket_shows_neither_bodies_nor_names() -> None:
    """What somebody who holds the bucket may see is in SECURITY.md; these are not in it."""
    inner = MemoryStore()
    store = sealed(inner)
    for key in SEALED_KEYS:
        await store.put(key, b"secret body")
    for key, body in inner.objects.items():
        assert b"secret" not in body
        for word in ("nginx", "1.27", "d" * 64, "1" * 64, "2" * 64, b"i" * 32):
            text = word.hex() if isinstance(word, bytes) else word
            assert text not in key
    folders = {key.rsplit("/", 1)[0] for key in inner.objects}
    assert not any("library" in folder for folder in folders)


async def test_packs_and_markers_pass_as_they_are(tmp_path: Path) -> None:
    inner = MemoryStore()
    store = sealed(inner)
    path = tmp_path / "pack"
    path.write_bytes(b"sealed chunk by chunk")
    pack = KEYS.pack(b"\1\0\0\0" + b"p" * 32)
    boot = KEYS.boot_pack(b"b" * 32, 1)
    for key in (pack, boot, KEYS.clock):
        await store.put(key, path)
        assert inner.objects[key] == b"sealed chunk by chunk"
        assert await store.get(key, limit=100) == b"sealed chunk by chunk"
    catalog = Catalog(store, "default")
    assert await catalog.active_generation() == 1


async def test_swapped_objects_are_found() -> None:
    """One image's record under another's name is no record."""
    inner = MemoryStore()
    store = sealed(inner)
    one, two = KEYS.alias("repo", "one"), KEYS.alias("repo", "two")
    await store.put(one, b"1")
    await store.put(two, b"2")
    a, b = (key for key in inner.objects if "/aliases/" in key)
    inner.objects[a], inner.objects[b] = inner.objects[b], inner.objects[a]
    for key in (one, two):
        with pytest.raises(Corrupt, match="lay elsewhere"):
            await store.get(key, limit=10)


async def test_any_flipped_bit_is_damage_and_never_a_missing_secret() -> None:
    """Else one bit of a key id would stop every scrub and every collection."""
    inner = MemoryStore()
    store = sealed(inner)
    key = KEYS.alias("repo", "one")
    await store.put(key, b"points somewhere")
    (where,) = (name for name in inner.objects if "/aliases/" in name)
    whole = inner.objects[where]
    for bit in range(len(whole) * 8):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        inner.objects[where] = bytes(changed)
        with pytest.raises(Corrupt):
            await store.get(key, limit=100)


async def test_names_that_are_not_ours_are_listed_and_can_be_deleted() -> None:
    """Litter must not hide, nor stay for ever."""
    inner = MemoryStore()
    store = sealed(inner)
    await store.put(f"{ROOT}x.json", b"1")
    for litter in (f"{ROOT}s~AAAA", f"{ROOT}plain.json"):
        inner.objects[litter] = b"litter"
    found = {x.key async for x in store.list(ROOT)}
    assert found == {f"{ROOT}x.json", f"{ROOT}s~AAAA", f"{ROOT}plain.json"}
    with pytest.raises(Corrupt):
        await store.get(f"{ROOT}s~AAAA", limit=10)
    await store.delete(f"{ROOT}s~AAAA")
    assert f"{ROOT}s~AAAA" not in inner.objects


async def test_wrong_secrets_are_said_in_words_before_anything_is_read_or_written() -> None:
    inner = MemoryStore()
    await sealed(inner).put(KEYS.alias("repo", "one"), b"1")
    before = dict(inner.objects)
    for document, what in (
        (f"names:{'0a' * 32} 1:{'0c' * 32}", "secret 1 is not what"),
        (f"names:{'0d' * 32} 1:{'0b' * 32}", "the secret of names is not what"),
    ):
        store = sealed(inner, Secrets.parse(document))
        with pytest.raises(Denied, match=what):
            await store.get(KEYS.alias("repo", "one"), limit=10)
        with pytest.raises(Denied, match=what):
            await store.put(KEYS.alias("repo", "two"), b"2")
        with pytest.raises(Denied, match=what):
            [x async for x in store.list(KEYS.prefix)]
        with pytest.raises(Denied, match=what):
            await store.delete(KEYS.alias("repo", "one"))
    assert inner.objects == before


async def test_without_secrets_a_sealed_realm_is_refused_not_taken_for_empty() -> None:
    """A host whose setting is missing would else write in the clear beside what is sealed."""
    inner = MemoryStore()
    await Catalog(sealed(inner), "default").active_generation()
    plain = Catalog(inner, "default")
    with pytest.raises(Denied, match="sealed and no secrets"):
        await plain.active_generation()
    with pytest.raises(Denied):
        [root async for root in plain.roots()]


async def test_a_realm_begun_in_the_clear_is_not_sealed_half_way() -> None:
    inner = MemoryStore()
    await Catalog(inner, "default").active_generation()
    with pytest.raises(Denied, match="begun in the clear"):
        await Catalog(sealed(inner), "default").active_generation()
    assert await Catalog(sealed(inner, realm="other"), "other").active_generation() == 1


async def test_a_new_secret_goes_in_while_the_old_ones_objects_stay_readable() -> None:
    """Rotation: known everywhere first, then used, then the old one goes where nothing needs it."""
    inner = MemoryStore()
    waiting = SECRETS.with_new(b"n" * 32, active=False)
    name = AliasName("repo", "one", "repo:one")
    await Catalog(sealed(inner), "default").put_alias(name, SHA)
    second = Catalog(sealed(inner, waiting.using(2)), "default")
    assert (await second.alias(name)).image == SHA
    await second.put_alias(name, "sha256:" + "e" * 64)
    assert (await Catalog(sealed(inner, waiting), "default").alias(name)).image[7] == "e"
    with pytest.raises(Denied, match="secret 2, which is not configured"):
        await Catalog(sealed(inner), "default").alias(name)
    only = Secrets(SECRETS.names, {2: b"n" * 32}, 2)
    assert [x.tag for x in await Catalog(sealed(inner, only), "default").aliases()] == ["one"]


async def test_an_empty_realm_can_be_looked_at_without_permission_to_write() -> None:
    inner = MemoryStore()
    with pytest.raises(NotFound):
        await sealed(inner).get(KEYS.alias("repo", "one"), limit=10)
    assert not inner.objects


# --- where secrets come from


def test_secrets_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "secrets"
    path.write_text(DOCUMENT)
    path.chmod(0o600)
    assert load_secrets(f"file:{path}", {}).active == 1
    path.chmod(0o640)
    with pytest.raises(Denied, match="open to others"):
        load_secrets(f"file:{path}", {})
    with pytest.raises(Denied, match="cannot be read"):
        load_secrets(f"file:{tmp_path}/absent", {})
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_secrets_from_the_environment_and_a_command(tmp_path: Path) -> None:
    assert load_secrets("env:REALM", {"REALM": DOCUMENT.replace("\n", " ")}).active == 1
    with pytest.raises(Denied, match="no REALM"):
        load_secrets("env:REALM", {})
    script = tmp_path / "kms"
    script.write_text(f"#!/bin/sh\necho '{DOCUMENT}'\n")
    script.chmod(0o755)
    assert load_secrets(f"command:{script} decrypt 'a b'", {}).by_id == SECRETS.by_id
    for line, kind in (
        ("false", Denied), ("/absent/kms", Denied), ("'", UsageError), (" ", UsageError),
        ("head -c 100000 /dev/zero", UsageError), ("echo", UsageError),
    ):  # fmt: skip
        with pytest.raises(kind):
            load_secrets(f"command:{line}", {})
    for source in ("", "file:", "vault:x", "0a0b"):
        with pytest.raises(UsageError):
            load_secrets(source, {})


def test_a_command_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagecache.realmsecrets.COMMAND_SECONDS", 0.2)
    with pytest.raises(Unavailable, match="no secrets within"):
        load_secrets("command:sleep 60", {})
