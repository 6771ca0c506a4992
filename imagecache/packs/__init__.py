"""Packs: immutable objects that hold many encoded chunks. Pure, no I/O.

A pack is a location, never an identity: two builders may pack the same chunks differently. It is
named by the BLAKE3-256 of its stored bytes and ends in a table of its own contents, so that
locations can be rebuilt from packs alone. Byte table: imagecache/FORMAT.md.
"""
