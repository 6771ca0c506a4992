"""The host daemon: the one place that wires arena, fetcher, exports, NBD server and control API.

It serves block images and runs preload jobs. It must never serve a byte that was not verified,
nor lose an export over a restart. The export table owns what is exported; the arena owns the
cache; the job queue owns builds.
"""
