"""PROTOCOL.md and the code say the same."""

import dataclasses
import re
from pathlib import Path

import pytest

import nbdserver
from nbdserver.device import BlockSizes
from nbdserver.handover import ConnectionState
from nbdserver.limits import Limits
from nbdserver.protocol.constants import ReplyMode
from nbdserver.protocol.errors import wire_error
from nbdserver.protocol.options import MAX_QUERIES
from nbdserver.protocol.replies import Extent, clip_extents
from nbdserver.protocol.session import Session

TEXT = (Path(nbdserver.__file__).parent / "PROTOCOL.md").read_text()


def table(heading):
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


@pytest.mark.quick
def test_limits():
    """Every limit stands in the table with its value."""
    told = {row[0].strip("`"): float(row[1]) for row in table("Limits")}
    assert told == {name: float(value) for name, value in dataclasses.asdict(Limits()).items()}


@pytest.mark.quick
def test_state():
    """Every field of a connection's record stands in the table, and nothing else."""
    session = Session("x", 1, 1, ReplyMode.SIMPLE, 1, 1)
    fields = set(ConnectionState("l", "n", session, 0, b"").encode()) - {"kind"}
    assert {row[0].strip("`") for row in table("The state of a connection")} == fields


@pytest.mark.quick
def test_every_should_has_a_verdict():
    """Each row of the SHOULD table says supported, refused, not needed or whose it is."""
    rows = table("SHOULD")
    assert len(rows) > 50
    for row in rows:
        assert len(row) == 3, row
        assert re.match(r"supported|refused|not needed|the (device|operator)'s", row[1]), row


@pytest.mark.quick
def test_numbers_in_the_text():
    """Numbers told in passing."""
    assert f"at most {MAX_QUERIES} queries" in TEXT
    assert BlockSizes() == BlockSizes(1, 4096, 1 << 25)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("sizes"),
    [
        (0, 4096, 1 << 25),
        (3, 4096, 1 << 25),
        (1 << 17, 1 << 17, 1 << 25),
        (1, 256, 1 << 25),
        (4096, 512, 1 << 25),
        (1, 4096, 512),
        (1, 4096, 1 << 32),
    ],
)
def test_block_sizes(sizes):
    """Sizes that the document forbids are refused."""
    with pytest.raises(ValueError):
        BlockSizes(*sizes)


@pytest.mark.quick
def test_wire_errors():
    """errno values become the document's eight error values, and nothing else."""
    values = {wire_error(number, fast_zero=fast) for number in range(200) for fast in (True, False)}
    assert values <= {1, 5, 12, 22, 28, 95, 108}
    assert wire_error(95) == 22 and wire_error(95, fast_zero=True) == 95


@pytest.mark.quick
def test_clipped_extents():
    """Whatever a device answers, the wire gets legal extents, in order."""
    clip = lambda *pairs, **more: [  # noqa: E731
        (extent.length, extent.flags)
        for extent in clip_extents(
            [Extent(*pair) for pair in pairs],
            **{"length": 100, "one": False, "limit": 9, "mode": 1, **more},
        )
    ]
    assert clip((60, 0), (60, 3)) == [(60, 0), (40, 3)]
    assert clip((0, 1), (50, 0), (20, 0), (500, 0)) == [(100, 0)]
    assert clip((10, 0), (10, 3), one=True) == [(10, 0)]
    assert clip((10, 0), (10, 3), (10, 0), limit=2) == [(10, 0), (10, 3)]
    assert clip((1 << 40, 0), (5, 3), length=1 << 41) == [(0xFFFF0000, 0)]
    assert clip((1 << 40, 0), (5, 3), length=1 << 41, mode=2) == [(1 << 40, 0), (5, 3)]
    with pytest.raises(ValueError):
        clip()
