"""FORMAT.md and the code say the same: every byte table against its struct."""

import importlib
import re
import struct
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick
DOCUMENT = Path(__file__).parents[2] / "imagecache" / "FORMAT.md"
_TABLE = re.compile(
    r"^`([\w.]+):(\w+)`\n\n\| offset \| size \| field \|\n\|[-|]+\|\n((?:\|.*\|\n)+)", re.M
)


def tables() -> list[tuple[str, str, str]]:
    return _TABLE.findall(DOCUMENT.read_text())


def test_document_has_every_table() -> None:
    assert len(tables()) >= 7


@pytest.mark.parametrize(("module", "name", "rows"), tables())
def test_byte_table_matches_its_struct(module: str, name: str, rows: str) -> None:
    layout: struct.Struct = getattr(importlib.import_module(module), name)
    fields = re.findall(r"(\d*)([a-zA-Z?])", layout.format.lstrip("<"))
    sizes = []
    for count, code in fields:
        if code == "s":
            sizes.append(int(count or 1))
        else:
            sizes += [struct.calcsize("<" + code)] * int(count or 1)
    told = [(int(a), int(b)) for a, b in re.findall(r"^\| (\d+) \| (\d+) \|", rows, re.M)]
    assert [size for _, size in told] == sizes
    assert [offset for offset, _ in told] == [sum(sizes[:n]) for n in range(len(sizes))]
    assert sum(sizes) == layout.size


def test_document_names_the_magics_that_the_code_writes() -> None:
    from imagecache.blockimage import envelope, layerindex, locations, manifest, seals
    from imagecache.flatten import tablecodec
    from imagecache.packs import pack

    text = DOCUMENT.read_text()
    for magic in (
        envelope.MAGIC,
        seals.MAGIC,
        layerindex.MAGIC,
        tablecodec.MAGIC,
        manifest.MAGIC,
        locations.MAGIC,
        pack.MAGIC,
        pack.TRAILER_MAGIC,
    ):
        assert f"`{magic.decode()}`" in text
