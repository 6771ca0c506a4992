"""Stores: where packs, indexes and records live, behind one small control and one read protocol.

`Store` is the control plane (small objects, listings, uploads); `RangeReader` the data plane (exact
byte ranges of immutable objects). Local directory, memory and S3 implement them; retry, limits,
hedging, metering, the shared tier and scripted faults are wrappers of the same shape, composed in
`imagecache.store.open` only.

Must never: know what the bytes mean, return a short body, answer "not found" when it could not ask,
or trust an ETag. State: each store object owns its own connections and threads; `OpenedStore.close`
ends them.
"""
