"""Faces: file system metadata that names the layers' data regions, as EROFS or ext4.

What it is: pure functions from a merged tree to the bytes of a metadata region.
What it must never do: I/O of any kind, a clock, randomness, or anything that depends on the host;
equal trees give equal bytes everywhere.
State: none. The disk's plan (metadata window, region addresses) is in `plan`, shared by all faces.
"""
