"""Fixtures of the nbdserver tests: a server over a memory device, and raw clients of it."""

import faulthandler
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from kits.nbd_client import RawClient
from kits.nbd_server import MemoryDevice, ServerThread

# Beyond what any test takes on a machine ten times slower.
DEADLINE, SOAK_DEADLINE = 1300, 4000


@pytest.fixture(autouse=True)
def no_test_for_ever(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ends the whole process, with its stacks, where even a library's call in C does not return."""
    soak = request.node.get_closest_marker("soak") is not None
    faulthandler.dump_traceback_later(SOAK_DEADLINE if soak else DEADLINE, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def device() -> MemoryDevice:
    return MemoryDevice()


@pytest.fixture
def server(tmp_path: Path, device: MemoryDevice) -> Iterator[ServerThread]:
    with ServerThread(tmp_path / "nbd.sock", device) as running:
        yield running


@pytest.fixture
def connect(server: ServerThread) -> Iterator[Callable[..., RawClient]]:
    """connect() greets; connect(**go arguments) enters transmission too."""
    with ExitStack() as stack:

        def make(flags: int = 3, *, go: bool = False, **arguments: object) -> RawClient:
            client = stack.enter_context(RawClient(server.path)).greet(flags)
            if go or arguments:
                client.go(**arguments)  # type: ignore[arg-type]  # passed through
            return client

        yield make
