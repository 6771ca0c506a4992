"""Zero-drop upgrades of a real daemon, and the ways in which a new version can fail."""

import os
import random
import socket
import statistics
import sys
import time
from pathlib import Path

import nbd
import pytest
from imagemaker.entries import Entry
from kits.image import write_image
from kits.upgrading import Reader, Readers, ServedHost, alive


@pytest.fixture
def image(tmp_path: Path) -> str:
    """An image that is larger than what is read at once."""
    content = random.Random(1).randbytes(8 << 20)
    return write_image(
        tmp_path / "image",
        [[Entry(f"f{n}", content=content[n << 20 : (n + 1) << 20])] for n in range(8)],
    )


def whole(uri: str) -> bytearray:
    client = nbd.NBD()
    client.connect_uri(uri)
    size = client.get_size()
    found = b"".join(client.pread(min(1 << 20, size - at), at) for at in range(0, size, 1 << 20))
    client.shutdown()
    return bytearray(found)


@pytest.mark.parametrize("rounds", [3, pytest.param(100, marks=pytest.mark.soak)])
def test_upgrades_under_clients_that_read_and_write(
    tmp_path: Path, image: str, rounds: int
) -> None:
    """Upgrades at random moments: no request fails, no acknowledged write is lost."""
    seed = int(os.environ.get("CUBECACHE_TEST_SEED", random.randrange(1 << 32)))
    print(f"seed {seed}")
    rng = random.Random(seed)
    with ServedHost(tmp_path / "state") as host:
        first = host.serve()
        host.cubecache("preload", image)
        own = tmp_path / "own.sock"
        shared = host.export(image, fill="none")
        alone = host.export(image, fill="none", socket=str(own))
        written = host.export(image, fill="none", writable=True)
        model, changed = whole(shared), whole(written)
        assert model == changed
        readers = [Reader(uri, model, n, writes=False) for n, uri in enumerate((shared, alone))]
        readers += [Reader(written, changed, n, writes=True) for n in range(4)]
        pauses = []
        with Readers(readers) as load:
            for _ in range(rounds):
                time.sleep(rng.random() * 0.3)
                load.pause()
                host.upgrade()
                pauses.append(load.pause())
            time.sleep(0.1)
        assert first.wait(60) == 0
        assert whole(written) == changed
        assert whole(shared) == model
        assert len(host.call("GET", "/v1/exports")["exports"]) == 3
        host.stop()
        print(
            f"{rounds} upgrades, {sum(x.done for x in readers)} requests, longest request ms: "
            f"median {statistics.median(pauses) * 1e3:.0f} worst {max(pauses) * 1e3:.0f}"
        )


PROGRAM = """#!{python}
import sys
from imagecache.cli import main
if "--take-over" in sys.argv and {broken!r} == "ends":
    sys.exit("this version does not start")
if "--take-over" in sys.argv and {broken!r} == "dies":
    from imagecache.cache import arena
    async def look(*_):
        import os
        os.abort()
    arena.Arena.look = look
if "--take-over" in sys.argv and {broken!r} == "refuses":
    from imagecache.cache import arena
    from imagecache.errors import Unsupported
    async def look(*_):
        raise Unsupported("no arena like this")
    arena.Arena.look = look
sys.exit(main())
"""


def test_a_new_version_that_fails_leaves_the_old_one_serving(tmp_path: Path, image: str) -> None:
    """It ends at once, with a bad configuration, on another store, or half-way; then a good one."""
    program, config = tmp_path / "cubecache", tmp_path / "config.toml"

    def install(broken: str) -> None:
        program.write_text(PROGRAM.format(python=sys.executable, broken=broken))
        program.chmod(0o755)

    def configure(text: str) -> None:
        config.write_text(text)
        config.chmod(0o600)

    install("")
    configure("")
    address = f"@cubecache-test-{os.getpid()}"
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        ServedHost(tmp_path / "state", program) as host,
    ):
        manager.bind("\0" + address[1:])
        manager.setblocking(False)
        host.environment |= {"CUBECACHE_CONFIG": str(config), "NOTIFY_SOCKET": address}
        host.serve()
        host.cubecache("preload", image)
        written = host.export(image, fill="none", writable=True)
        model = whole(written)
        readers = [Reader(written, model, n, writes=True) for n in range(4)]
        with Readers(readers):
            for broken, text, words in (
                ("ends", "", "ended with status 1"),
                ("", "unknown = 1", "ended with status 2"),
                ("", 'store = "file:///nowhere"', "new version's store"),
                ("dies", "", "the clients stay here"),
                ("refuses", "", "the clients stay here"),
            ):
                install(broken)
                configure(text)
                problem = host.call("POST", "/v1/upgrade", refused=503)
                assert words in problem["message"]
                assert alive(host.pid)
            before = [reader.done for reader in readers]
            install("")
            configure("[cache]\nbudget_bytes = 1073741824")
            drain(manager)
            old, pid = host.pid, host.upgrade()
            assert pid != old
            told = drain(manager)
            assert told.index(f"MAINPID={pid}") < next(
                n for n, line in enumerate(told) if line.startswith("READY=1")
            )
            assert "STOPPING=1" not in told
            time.sleep(0.2)
        assert all(reader.done > n for reader, n in zip(readers, before, strict=True))
        assert whole(written) == model
        assert "budget_bytes is taken at the next restart" in host.log.read_text()
        host.stop()


def drain(manager: socket.socket) -> list[str]:
    """What the service manager was told since the last call."""
    told = []
    while True:
        try:
            told.append(manager.recv(4096).decode())
        except BlockingIOError:
            return told
