"""Runs containers in microVMs whose root disks are block exports of the image cache.

It starts virtual machines, talks to the agent inside them, and reports what became of them. It must
never read, convert or cache an image itself: disks come as NBD exports from `preload.client`.
Whoever starts a machine owns its state: a private directory with its sockets, and a process that
does not outlive its owner.
"""
