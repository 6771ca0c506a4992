"""What breaks under a running export: the store, the daemon, the network. Never wrong bytes."""

import errno
from collections.abc import Callable

import nbd
import pytest
from kits.journey import Cubecache, tool
from testbed.processes import Stage
from testbed.servers import ObjectStore, start_proxy

STEP = 1 << 20


def read_all(connection: nbd.NBD) -> tuple[dict[int, bytes], list[int]]:
    """What every piece of the disk reads as, and the errno of each piece that does not."""
    size, good, bad = connection.get_size(), {}, []
    for offset in range(0, size, STEP):
        try:
            good[offset] = bytes(connection.pread(min(STEP, size - offset), offset))
        except nbd.Error as error:
            bad.append(error.errno)
    return good, bad


def connect(uri: str) -> nbd.NBD:
    connection = nbd.NBD()
    connection.connect_uri(uri)
    return connection


def test_a_dead_store_is_eio_for_cold_reads_and_nothing_for_warm_ones(
    stage: Stage,
    new_cubecache: Callable[..., Cubecache],
    object_store: ObjectStore,
    busybox: str,
    tmp_path,
) -> None:
    """F30: a read while the origin is dead is EIO after the deadline; the next read tries again."""
    builder = new_cubecache(object_store.url())
    builder.preload(busybox)
    truth = tmp_path / "truth.img"
    proxy = start_proxy(stage, object_store.endpoint)
    # Another host: its own state dir, so nothing of the image is local.
    host = new_cubecache(object_store.url(proxy.endpoint), "[cache]\nstall_seconds = 2.0\n")
    daemon = host.serve("--fill", "none")
    connection = connect(daemon.export(busybox))
    warm = bytes(connection.pread(4096, 0))
    assert proxy.counters()["ranges"]["bytes"] < object_store.stored_bytes() / 2
    proxy.process.kill()
    assert bytes(connection.pread(4096, 0)) == warm
    good, bad = read_all(connection)
    assert bad, "with the store dead, some of the disk must be out of reach"
    assert set(bad) == {"EIO"} or set(bad) == {errno.EIO}
    # The same connection lives on, and reads right bytes once the store is back at its address.
    port = proxy.endpoint.rpartition(":")[2]
    revived = stage.start([*_proxy_command(), "--upstream", object_store.endpoint, "--port", port])
    revived.wait_until(lambda: revived.log.read_bytes().endswith(b"}\n"))
    whole, none = read_all(connection)
    assert not none
    assert all(whole[offset] == piece for offset, piece in good.items())
    tool("nbdcopy", builder.serve().export(busybox), str(truth))
    assert b"".join(whole[offset] for offset in sorted(whole)) == truth.read_bytes()
    assert daemon.stop() == 0


def _proxy_command() -> list[str]:
    from testbed.servers import ROOT

    return [str(ROOT / ".venv/bin/python"), str(ROOT / "tools/counting_proxy.py")]


def exported(cubecache: Cubecache) -> set[tuple[str, str]]:
    answer = cubecache.run("exports", "--json").json()
    return {(export["name"], export["uri"]) for export in answer}


def test_exports_outlive_a_crash_of_the_daemon(
    cubecache: Cubecache, busybox: str, stage: Stage
) -> None:
    """H2, H5: after kill -9 the next daemon serves the same exports before anybody asks."""
    daemon = cubecache.serve()
    uri = daemon.export(busybox)
    own = daemon.export(busybox, "--socket", str(stage.folder / "own.sock"))
    before = bytes(connect(uri).pread(1 << 20, 0))
    listed = exported(cubecache)
    daemon.crash()
    again = cubecache.serve()
    assert bytes(connect(uri).pread(1 << 20, 0)) == before
    assert bytes(connect(own).pread(4096, 0)) == before[:4096]
    assert len(listed) == 2
    assert exported(cubecache) == listed
    assert again.stop() == 0


def test_a_second_daemon_on_a_state_dir_is_refused_with_the_pid(cubecache: Cubecache) -> None:
    """H5: two daemons on one directory: the second refuses and names the first's pid."""
    daemon = cubecache.serve()
    answer = cubecache.run("serve", expect=75)
    assert str(daemon.process.child.pid) in answer.err
    assert daemon.stop() == 0


def test_preload_beside_a_daemon_is_handed_to_it(cubecache: Cubecache, busybox: str) -> None:
    daemon = cubecache.serve()
    found = cubecache.preload(busybox)
    assert found["new_chunks"] > 0
    assert cubecache.preload(busybox)["new_chunks"] == 0
    tool("nbdcopy", daemon.export(busybox), "null:")
    assert daemon.stop() == 0


def test_sigterm_stops_cleanly_with_a_client_attached(cubecache: Cubecache, busybox: str) -> None:
    daemon = cubecache.serve()
    connection = connect(daemon.export(busybox))
    connection.pread(4096, 0)
    assert daemon.stop() == 0
    assert not (cubecache.state / "control.sock").exists()
    with pytest.raises(nbd.Error):
        connection.pread(4096, 0)
    assert "Traceback" not in daemon.process.log.read_text()
