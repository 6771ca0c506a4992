"""Cutting: what versions of an image share, and that the rule gives the same chunks for ever."""

import asyncio
import random
import shutil
from pathlib import Path

from blake3 import blake3
from imagemaker.entries import Entry, directory
from kits.image import recipe_layout, reference, write_image

from imagecache.blockimage.layerindex import LayerIndex
from imagecache.build.progress import BuildResult
from imagecache.build.reuse import GAP_BYTES, most_runs
from imagecache.cache.plan import plan_gets
from imagecache.chunks import BLOCK
from imagecache.chunks.cut import FORMAT_CUT_RULE, blocks_of
from imagecache.composition import ImageRequest, build_image, opened_catalog
from imagecache.flatten.filetable import FileTable
from imagecache.flatten.limits import Limits
from imagecache.settings import Settings

GOLDEN = "ba846b9ed48a8053a8931a184ac31fa5614431f367650cffc24b2bd1aa464243"


def settings(root: Path) -> Settings:
    return Settings(state_dir=root / "state", store_url=(root / "store").as_uri())


def build(where: Settings, *references: str) -> list[BuildResult]:
    async def run() -> list[BuildResult]:
        async with opened_catalog(where) as (_, catalog):
            requests = [ImageRequest.parse(text, None, "erofs") for text in references]
            return [await build_image(where, catalog, x, lambda _: None) for x in requests]

    return asyncio.run(run())


def indexes(where: Settings) -> list[LayerIndex]:
    """The layer indexes of a store's one image, bottom first."""

    async def run() -> list[LayerIndex]:
        async with opened_catalog(where) as (_, catalog):
            root = await anext(aiter(catalog.roots()))
            manifest = await catalog.block_manifest(root)
            layers = manifest.layers
            return [await catalog.layer_index(x.index, root.generation) for x in layers]

    return asyncio.run(run())


def chunks_by_file(layers: list[LayerIndex]) -> int:
    """How many chunks one chunk per file, cut at the same size, would make."""
    total = 0
    for index in layers:
        table = FileTable.decode(index.file_table, Limits())
        window = FORMAT_CUT_RULE.window_blocks
        total += sum(-(-blocks_of(size) // window) for size in table.size if size)
    return total


def files(seed: int) -> list[Entry]:
    dice = random.Random(seed)
    sizes = [dice.choice([300, 3000, 9000, 40_000, 90_000, 700_000]) for _ in range(120)]
    return [
        directory("lib"),
        *(Entry(f"lib/m{n:03}.py", content=dice.randbytes(size)) for n, size in enumerate(sizes)),
    ]


def test_package_layer_rebuilt_with_one_more_costs_little(tmp_path: Path) -> None:
    """Goal 4b: at most 3 % stored again, by a quarter of the chunks of a chunk per file."""
    where = settings(tmp_path)
    versions = []
    for name in ("python-numpy", "python-numpy-v2"):
        # One repository: references are the earlier images of the same one.
        shutil.copytree(recipe_layout(name), tmp_path / "image")
        versions += build(where, reference(tmp_path / "image"))
        shutil.rmtree(tmp_path / "image")
    assert versions[1].stored_bytes <= 0.03 * versions[0].stored_bytes
    alone = settings(tmp_path / "alone")
    build(alone, reference(recipe_layout("python-numpy")))
    assert versions[0].chunks <= chunks_by_file(indexes(alone)) / 4


def test_order_of_members_does_not_matter(tmp_path: Path) -> None:
    """Goal 4c: the same files in another order are the same chunks."""
    entries = files(1)
    shuffled = entries[:1] + random.Random(2).sample(entries[1:], len(entries) - 1)
    where = settings(tmp_path)
    one = build(where, write_image(tmp_path / "image", [entries]))[0]
    two = build(where, write_image(tmp_path / "image", [shuffled]))[0]
    assert one.chunks > 40
    assert two.new_layers == 1
    assert two.new_chunks == 0


def test_inserted_file_changes_its_neighbourhood_alone(tmp_path: Path) -> None:
    entries = files(3)
    more = [*entries, Entry("lib/m060a.py", content=b"new" * 900)]
    where = settings(tmp_path)
    one = build(where, write_image(tmp_path / "image", [entries]))[0]
    two = build(where, write_image(tmp_path / "image", [more]))[0]
    assert two.new_chunks <= 4  # its group, perhaps the next one, and metadata
    assert one.chunks > 40


def test_cutting_rule_is_the_format_s(tmp_path: Path) -> None:
    """The chunks of a layer are part of the format: another digest needs a format version."""
    entries = [*files(5), Entry("zeros", content=bytes(1 << 20)), Entry("tail", content=b"t")]
    where = settings(tmp_path)
    build(where, write_image(tmp_path / "image", [entries]))
    index = indexes(where)[0]
    assert blake3(index.chunks.digests).hexdigest() == GOLDEN


def test_tenth_version_is_not_in_pieces(tmp_path: Path) -> None:
    """However its versions changed, the GETs of a sequential read are bounded by its size."""
    dice = random.Random(6)
    contents = {f"lib/{n:03}.py": dice.randbytes(dice.randrange(60_000)) for n in range(400)}
    where = settings(tmp_path)
    gets = []
    for _ in range(10):
        for name in dice.sample(sorted(contents), 12):
            contents[name] = dice.randbytes(len(contents[name]) + 1)
        entries = [directory("lib"), *(Entry(n, content=body) for n, body in contents.items())]
        result = build(where, write_image(tmp_path / "image", [entries]))[0]
        gets.append(sequential_gets(where, result.image))
    size = sum(map(len, contents.values()))
    windows = 1 + size // (48 * FORMAT_CUT_RULE.least_group_blocks * BLOCK)
    assert gets[-1] <= 2 * most_runs(size, size) + 1 + windows
    assert gets[-1] > gets[0]  # else nothing was reused, and nothing was tested


def sequential_gets(where: Settings, image: str) -> int:
    """GETs of a reader that asks for windows of 64 extents ahead, as the cache does."""

    async def run() -> int:
        async with opened_catalog(where) as (_, catalog):
            found = [root async for root in catalog.roots() if root.image == image]
            manifest = await catalog.block_manifest(found[0])
            table = await catalog.location_table(found[0])
            present: set[int] = set()
            gets = 0
            for start in range(0, len(manifest.extents), 64):
                ordinals = manifest.extents.ordinals[start : start + 64]
                missing = [n for n in dict.fromkeys(ordinals) if n not in present]
                present.update(missing)
                places = [table.locate(n) for n in missing]
                gets += len(plan_gets(places, max_bytes=4 << 20, max_gap=GAP_BYTES))
            return gets

    return asyncio.run(run())
