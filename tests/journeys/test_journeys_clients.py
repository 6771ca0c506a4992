"""NBD clients that are not ours, against an export of `cubecache serve`."""

import json
from collections.abc import Callable
from pathlib import Path

import nbd
from imagemaker.entries import Entry
from kits.image import write_image
from kits.journey import Cubecache, tool

DATA_BYTES = 8 << 20


def test_the_judges_agree_on_the_bytes(cubecache: Cubecache, busybox: str, tmp_path: Path) -> None:
    found = cubecache.preload(busybox)
    daemon = cubecache.serve()
    uri = daemon.export(busybox)
    described = json.loads(tool("nbdinfo", "--json", uri).out)["exports"][0]
    assert described["export-size"] == found["size_bytes"]
    assert described["is_read_only"] is True
    by_nbdcopy, by_qemu = tmp_path / "nbdcopy.img", tmp_path / "qemu.img"
    tool("nbdcopy", uri, str(by_nbdcopy))
    tool("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, str(by_qemu))
    tool("cmp", str(by_nbdcopy), str(by_qemu))
    tool("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, str(by_nbdcopy))
    tool("fsck.erofs", str(by_nbdcopy))
    mapped = tool("nbdinfo", "--map", "--totals", uri).out
    assert "hole" in mapped or "zero" in mapped
    assert daemon.stop() == 0


def test_an_export_on_a_socket_of_its_own_is_alone_there(
    cubecache: Cubecache, busybox: str, stage
) -> None:
    daemon = cubecache.serve()
    shared = daemon.export(busybox)
    socket = stage.folder / "own.sock"
    alone = daemon.export(busybox, "--socket", str(socket))
    assert f"socket={socket}" in alone.replace("%2F", "/")
    tool("nbdinfo", alone)
    stranger = shared.partition("?")[0] + f"-other?socket={socket}"
    assert tool("nbdinfo", stranger, expect=None).code != 0
    name = shared.removeprefix("nbd+unix:///").partition("?")[0]
    listed = json.loads(tool("nbdinfo", "--list", "--json", alone).out)["exports"]
    assert len(listed) <= 1
    cubecache.run("unexport", name)
    assert tool("nbdinfo", shared, expect=None).code != 0


def fio_job(uri: str, offset: int, block: str, depth: int, *more: str) -> list[str]:
    return [
        "fio",
        "--name=verify",
        "--ioengine=nbd",
        f"--uri={uri}",
        f"--offset={offset}",
        f"--size={DATA_BYTES}",
        f"--bs={block}",
        f"--iodepth={depth}",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--output-format=json",
        *more,
    ]


def written_by_fio(path: Path, offset: int) -> bytes:
    """Blocks that carry fio's own headers and checksums, made for this disk offset."""
    tool(
        "fio",
        "--name=fill",
        "--verify_state_save=0",
        "--ioengine=psync",
        f"--filename={path}",
        f"--offset={offset}",
        f"--size={DATA_BYTES}",
        "--bs=4k",
        "--rw=write",
        "--verify=crc32c",
        "--do_verify=0",
    )
    with path.open("rb") as source:
        source.seek(offset)
        return source.read(DATA_BYTES)


def test_fio_verifies_its_own_checksums(
    new_cubecache: Callable[..., Cubecache], tmp_path: Path
) -> None:
    # A first image of the same shape tells at which disk offset the file's content lies.
    marker = b"\xa5where is it\x5a" * 400
    probe = write_image(
        tmp_path / "probe", [[Entry("data", content=marker.ljust(DATA_BYTES, b"\x01"))]]
    )
    cubecache = new_cubecache()
    daemon = cubecache.serve()
    connection = nbd.NBD()
    connection.connect_uri(daemon.export(probe))
    offset = find(connection, marker[:4096])
    connection.shutdown()
    content = written_by_fio(tmp_path / "fio.img", offset)
    image = write_image(tmp_path / "image", [[Entry("data", content=content)]])
    uri = daemon.export(image)
    for depth, mode in ((1, "read"), (32, "randread")):
        outcome = tool(*fio_job(uri, offset, "4k", depth, f"--rw={mode}"))
        (job,) = json.loads(outcome.out[outcome.out.index("{") :])["jobs"]
        assert job["error"] == 0
        assert job["read"]["io_bytes"] == DATA_BYTES
    # The judge can say no: the same image with one byte changed.
    spoiled = bytearray(content)
    spoiled[3_000_000] ^= 1
    bad = write_image(tmp_path / "bad", [[Entry("data", content=bytes(spoiled))]])
    outcome = tool(*fio_job(daemon.export(bad), offset, "4k", 1, "--rw=read"), expect=None)
    assert outcome.code != 0
    assert "verify failed" in outcome.out + outcome.err


def find(connection: nbd.NBD, needle: bytes) -> int:
    """The disk offset of a block-aligned needle, looking at the start of each 4 KiB block."""
    size, step = connection.get_size(), 1 << 20
    for base in range(0, size, step):
        piece = connection.pread(min(step, size - base), base)
        for offset in range(0, len(piece), 4096):
            if piece[offset : offset + len(needle)] == needle:
                return base + offset
    raise AssertionError("the content is not on the disk")
