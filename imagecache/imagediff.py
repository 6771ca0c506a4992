"""What changed between two images: files by attributes and content, chunks, stored bytes. Pure."""

from __future__ import annotations

from typing import Any

from imagecache.blockimage.locations import LocationTable
from imagecache.flatten import kinds
from imagecache.flatten.tree import Node
from imagecache.imageview import ImageView


def _attributes(view: ImageView, node: Node) -> tuple[Any, ...]:
    if node.inode < 0:
        return (node.kind,)
    table, inode = view.tables[node.layer], node.inode
    return (
        table.mode[inode],
        table.uid[inode],
        table.gid[inode],
        table.mtime[inode],
        table.mtime_ns[inode],
        table.size[inode],
        table.target(inode) if node.kind == kinds.SYMLINK else b"",
        table.extra[inode] if node.kind in kinds.DEVICES else 0,
        table.xattrs(inode),
    )


def _content(view: ImageView, path: bytes, node: Node) -> tuple[Any, ...]:
    """What tells contents apart without reading them: chunk pieces over the file's blocks.

    Equal contents that were grouped with other neighbours look different; the caller says so.
    """
    if node.kind != kinds.REGULAR:
        return ()
    span = view.span(path, node)
    if not span.size:
        return ()
    extents = view.manifest.extents
    first, end = span.blocks.start, span.blocks.stop
    pieces = []
    for n in extents.overlapping(first, end):
        start = max(first, extents.starts[n])
        stop = min(end, extents.starts[n] + extents.lengths[n])
        inside = extents.offsets[n] + start - extents.starts[n]
        digest = view.manifest.chunks.digest(extents.ordinals[n])
        pieces.append((start - first, stop - start, digest, inside))
    return tuple(pieces)


def difference(before: ImageView, after: ImageView, locations: LocationTable) -> dict[str, Any]:
    """Names added, removed and changed; chunks and stored bytes that only the second has.

    A file counts as changed when an attribute differs, or a chunk behind it does: a file whose
    neighbour in a group of small files changed is named in `regrouped`, where its own attributes,
    modification time and size are the same.
    """
    old = {path: node for path, node in before.tree.walk() if path}
    new = {path: node for path, node in after.tree.walk() if path}
    changed, regrouped = [], []
    for path in sorted(old.keys() & new.keys()):
        if _attributes(before, old[path]) != _attributes(after, new[path]):
            changed.append(path)
        elif _content(before, path, old[path]) != _content(after, path, new[path]):
            regrouped.append(path)
    known = {digest for digest, _ in before.manifest.chunks}
    fresh = [n for n, (digest, _) in enumerate(after.manifest.chunks) if digest not in known]
    return {
        "added": [_text(path) for path in sorted(new.keys() - old.keys())],
        "removed": [_text(path) for path in sorted(old.keys() - new.keys())],
        "changed": [_text(path) for path in changed],
        "regrouped": len(regrouped),
        "chunks": len(after.manifest.chunks),
        "new_chunks": len(fresh),
        "stored_bytes": sum(locations.stored_lengths),
        "new_bytes": sum(locations.stored_lengths[n] for n in fresh),
    }


def _text(path: bytes) -> str:
    return path.decode(errors="backslashreplace")
