"""The NBD protocol as pure machines: bytes in, plans and bytes out.

Nothing here does I/O, knows a clock or imports asyncio. A handshake machine owns the options of one
client; the transmission functions own nothing at all. Source of every number: the NBD project's
protocol document (master, and its extension-ext-header branch for extended headers).
"""
