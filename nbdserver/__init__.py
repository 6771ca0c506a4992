"""A stand-alone NBD server library: protocol machines, batched connections, server, devices.

It must never import anything of the other packages, never import anything but the standard library,
and never touch the bytes of a mapped device page in Python (a bad page is a signal there, and an
error code in the kernel). `Server` owns listening sockets and connections, a `Connection` owns its
requests, buffers and pins, and `Exports` owns devices.
"""
