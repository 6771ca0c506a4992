"""A sealed realm is served as any other, and nobody without its secrets sees anything of it."""

from collections.abc import Callable
from pathlib import Path

from imagemaker.entries import Entry, directory
from kits.image import write_image
from kits.journey import Cubecache, tool
from kits.realm import layer

SECRET = b"the words of this file are nobody's business"


def test_a_sealed_realm_is_served_as_any_other(
    new_cubecache: Callable[..., Cubecache], tmp_path: Path
) -> None:
    """One setting seals; boot pack, demand and fill bring the same bytes as in the clear."""
    words = Entry("d/nobodys-business", content=SECRET * 400)
    one = write_image(tmp_path / "one", [layer(1), [directory("d"), words]])
    secrets = tmp_path / "secrets"
    new_cubecache().run("secrets", "new", str(secrets))
    sealed = new_cubecache(CUBECACHE_ENCRYPTION_SECRETS=f"file:{secrets}")
    plain = new_cubecache()
    first = sealed.preload(one)
    assert plain.preload(one)["block_image"] == first["block_image"]  # identity is plaintext's
    store = sealed.state / "store"
    for path in store.rglob("*"):
        body = path.read_bytes() if path.is_file() else b""
        assert SECRET[:16] not in body
        assert b"nobodys" not in body
        assert first["image"].partition(":")[2] not in str(path)
        assert first["block_image"] not in str(path)
    daemon, other = sealed.serve(), plain.serve()
    tool("nbdcopy", daemon.export(one), str(tmp_path / "sealed.img"))
    tool("nbdcopy", other.export(one), str(tmp_path / "plain.img"))
    tool("cmp", str(tmp_path / "sealed.img"), str(tmp_path / "plain.img"))
    assert daemon.stop() == 0
    assert other.stop() == 0

    # rotation, by the commands: the new secret is in use, nothing needs the old one's chunks
    for work in (("add", str(secrets)), ("use", str(secrets), "2"), ("reseal",)):
        sealed.run("secrets", *work)
    counted = sealed.run("secrets", "status", "--json").json()
    assert (counted["active"], counted["secrets"]["1"]["chunk_bytes"]) == (2, 0)
    sealed.run("verify", one)

    # a host whose setting is missing neither reads nor writes beside what is sealed
    missing = new_cubecache(store.as_uri())
    for command in (("preload", one), ("verify", one), ("gc",)):
        assert "sealed" in missing.run(*command, expect=77).err
