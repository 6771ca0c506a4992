"""`cubecache run`: a microVM whose root is an export."""

from collections.abc import Callable

from kits.journey import Cubecache
from testbed.processes import Stage
from testbed.servers import ObjectStore, start_proxy

SHELL = "/bin/busybox"


def test_the_image_s_command_runs_and_its_status_comes_back(
    cubecache: Cubecache, busybox: str
) -> None:
    answer = cubecache.run("run", busybox)
    assert "hello from busybox" in answer.out
    failed = cubecache.run(
        "run", busybox, "--", SHELL, "sh", "-c", "echo err >&2; exit 7", expect=7
    )
    assert "err" in failed.err + failed.out


def test_the_guest_has_what_a_container_expects(cubecache: Cubecache, busybox: str) -> None:
    script = (
        "set -e; test -d /proc/1; test -d /sys/class; test -c /dev/null; echo x >/tmp/x;"
        " echo y >/odd/new; cat /odd/new; grep -q overlay /proc/mounts; stat -c %a /odd/setuid;"
        " cat /emptied/above; test ! -e /removed; test ! -e /doomed; echo $PATH"
    )
    answer = cubecache.run("run", busybox, "--", SHELL, "sh", "-c", script)
    lines = answer.out.split()
    assert lines[:3] == ["y", "4755", "above"]
    assert "/usr/bin" in lines[3]


def test_numpy_starts_from_a_small_part_of_its_image(
    stage: Stage,
    new_cubecache: Callable[..., Cubecache],
    object_store: ObjectStore,
    python_numpy: str,
) -> None:
    new_cubecache(object_store.url()).preload(python_numpy)
    stored = object_store.stored_bytes()
    proxy = start_proxy(stage, object_store.endpoint)
    host = new_cubecache(object_store.url(proxy.endpoint))
    daemon = host.serve("--fill", "none")
    answer = host.run("run", python_numpy)
    assert "hello from numpy" in answer.out
    fetched = proxy.fetched_bytes()
    print(f"fetched {fetched} of {stored} stored bytes ({fetched / stored:.1%})")
    assert fetched < stored / 2
    assert daemon.stop() == 0
