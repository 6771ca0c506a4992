"""Leases and pins: who relies on what in a realm, told by objects and aged by the store's clock.

They save work and keep generations open; that nothing readable loses an object does not rest on
them alone (`imagecache.collect`). They must never compare a host's clock with the store's. Each
lease object is written by its holder only; the store is the owner of all state.
"""
