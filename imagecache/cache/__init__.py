"""The host cache: one arena of verified chunks, its fetcher, and the device that reads it.

Everything here lives on one event loop; disk and CPU work goes to small executors and comes back
with a result that the loop judges. Must never: show a byte that was not verified, touch a mapped
page in Python, evict what is pinned or leased, or turn a failure of one request into another's.
State: `Arena` owns slots, index and lock; `Fetcher` owns flights; an `ImageMap` belongs to all
exports of its image; the origin owns the truth, so all of it can be lost.
"""
