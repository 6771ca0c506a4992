"""Merging recordings, and carrying a profile over to another version."""

import pytest

from imagecache.errors import UsageError
from imagecache.profile.merge import carry_over, merge_profiles
from imagecache.profile.profile import MetadataRange, Profile, Touch

pytestmark = pytest.mark.quick
IMAGE, OTHER = "sha256:" + "aa" * 32, "sha256:" + "bb" * 32
BLOCK_IMAGE = b"b" * 32


def recording(*touches: Touch, sources: int = 1, metadata=()) -> Profile:
    return Profile(IMAGE, BLOCK_IMAGE, sources, touches, tuple(metadata))


def blocks(profile: Profile) -> list[tuple[bytes, int]]:
    return [
        (t.path, block)
        for t in profile.touches
        for block in range(t.start_block, t.start_block + t.blocks)
    ]


def test_two_recordings_have_every_block_of_both_once() -> None:
    first = recording(Touch(b"a", 0, 4), Touch(b"b", 0, 2))
    second = recording(Touch(b"a", 2, 4), Touch(b"c", 1, 1))
    merged = merge_profiles([first, second])
    found = blocks(merged)
    assert sorted(found) == sorted(set(blocks(first)) | set(blocks(second)))
    assert len(set(found)) == len(found)
    assert merged.sources == 2
    assert {t.seen for t in merged.touches if t.path == b"a" and t.start_block == 2} == {2}


def test_what_comes_early_in_both_comes_early_in_the_merge() -> None:
    first = recording(Touch(b"ld.so", 0, 1), Touch(b"libc", 0, 1), Touch(b"app", 0, 1))
    second = recording(*(Touch(b"ld.so", 0, 1), Touch(b"libc", 0, 1)), Touch(b"late", 0, 60))
    paths = [path for path, _ in blocks(merge_profiles([first, second]))]
    assert paths[0] == b"ld.so"
    assert paths.index(b"libc") < paths.index(b"app")


def test_merging_does_not_depend_on_the_order_of_recordings() -> None:
    first = recording(Touch(b"a", 0, 3), Touch(b"b", 5, 1))
    second = recording(Touch(b"b", 5, 1), Touch(b"c", 0, 2))
    assert merge_profiles([first, second]) == merge_profiles([second, first])


def test_what_one_of_many_recordings_read_is_left_out() -> None:
    """A fluke of one start must not cost all later ones."""
    common = Touch(b"a", 0, 1)
    usual = [recording(common) for _ in range(7)]
    merged = merge_profiles([*usual, recording(common, Touch(b"fluke", 0, 9))])
    assert blocks(merged) == [(b"a", 0)]


def test_metadata_ranges_are_joined() -> None:
    first = recording(metadata=[MetadataRange(0, 4), MetadataRange(10, 2)])
    second = recording(metadata=[MetadataRange(3, 3)])
    assert merge_profiles([first, second]).metadata == (MetadataRange(0, 6), MetadataRange(10, 2))


def test_profiles_of_two_images_do_not_merge() -> None:
    other = Profile(OTHER, b"c" * 32, 1, (), ())
    with pytest.raises(UsageError):
        merge_profiles([recording(), other])


def test_carrying_over_drops_dead_files_and_cuts_shorter_ones() -> None:
    """The next version of an image has other files; order and what still exists stay."""
    old = recording(
        Touch(b"gone", 0, 5),
        Touch(b"shrunk", 0, 8),
        Touch(b"shrunk", 9, 2),
        Touch(b"same", 3, 2),
        metadata=[MetadataRange(0, 9)],
    )
    sizes = {b"shrunk": 6, b"same": 10}
    new = carry_over(old, OTHER, b"n" * 32, sizes.get)
    assert new.touches == (Touch(b"shrunk", 0, 6), Touch(b"same", 3, 2))
    assert new.metadata == ()  # another image's metadata region is another one
    assert (new.image, new.block_image, new.sources) == (OTHER, b"n" * 32, 1)
