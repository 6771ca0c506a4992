"""The files of an image in disk order, for read-ahead. Pure."""

from __future__ import annotations

from array import array

from imagecache.cache.aheadplan import FileRuns
from imagecache.chunks import BLOCK
from imagecache.flatten.filetable import region_layout
from imagecache.imageview import ImageView


def file_runs(view: ImageView) -> FileRuns:
    """Every file with content; those of one directory that are neighbours share a number."""
    starts, ends, folders = array("Q"), array("Q"), array("I")
    base = 0
    for placed, table in zip(view.manifest.layers, view.tables, strict=True):
        layout = region_layout(table)
        for inode, start, blocks in zip(
            layout.inodes, layout.start_blocks, layout.blocks, strict=True
        ):
            at = (placed.start_block + start) * BLOCK
            starts.append(at)
            ends.append(at + blocks * BLOCK)
            folders.append(base + table.entry_parent[table.first_entry[inode]])
        base += len(table.entry_parent)
    return FileRuns(starts, ends, folders)
