"""Learned start-ups: what a start reads, kept as files, and the boot packs made from it.

A recording of disk reads becomes a profile of (path, offset) touches, which holds for the next
version of an image too; a plan says which chunks of one image a profile means, in which order; a
boot pack is one object with those chunks in that order. Where nobody has recorded, `predict` reads
the image's own files for what its entrypoint will load.
Must never: be needed for right bytes (all of it may be lost or wrong, and only time is), grow
without bound on an export that reads for ever, or mount or run anything of an image.
State: a `StartLog` belongs to its export; `Starts` owns nothing, the store does.
"""
