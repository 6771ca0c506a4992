"""Makes real container images from the distribution's packages, for demo, tests and benchmarks.

Not part of the product: nothing in `imagecache`, `nbdserver`, `preload` or `cube` imports it, and
it imports none of them, so that what it writes judges them. State: the folder `.cache/images`,
safe to delete at any time.
"""
