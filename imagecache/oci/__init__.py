"""Images in: references, manifests, and the sources that hand over verified blobs.

What it is: the only part that talks to registries and reads image layouts and archives. It
turns a reference into a `ResolvedImage` and its blobs into files.
What it must never do: hand out a byte whose size and digest were not checked, send a
credential to an origin it does not belong to, follow a name out of its directory, or let a
foreign exception (aiohttp, json, tarfile, OSError) cross its border.
State: tokens, connections and open files belong to the source object that made them and end
with its `close()`; nothing here is global.
"""
