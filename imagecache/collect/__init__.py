"""Collection of what nothing relies on any more: a pure planner and a thin runner.

Generations move forward: active, retired (with closing as its last part), expired, deleted. What is
live is copied out of a retired generation into the newest active one, and only what no readable
generation names is deleted. It must never guess: a doubtful listing or an unreadable record ends a
collection. Its state is in the store alone, so that any run can be killed or frozen anywhere, and
several may run; the lease of the collector saves work, the order of things keeps the promise.

Whoever writes what names a pack (builder, collector, repair) chooses the generation to write into
*before* reading where the pack is named. So all that may still be written late lands in generations
that were there when the last readable mention of the pack went; the tombstone remembers the newest
of them, and the pack is deleted when all of those have expired.
"""
