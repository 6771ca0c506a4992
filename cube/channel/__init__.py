"""What is said on a machine's channel: requests and answers as bytes, processes and their streams.

`messages` is pure; `process` holds what the host keeps of one process in the guest, bounded by the
windows it grants. Frames are `cube.frames`; the connection that carries them is `cube.link`. The
guest is never trusted: nothing it sends may make the host keep more than it asked for.
"""
