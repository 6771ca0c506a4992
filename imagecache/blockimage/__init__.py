"""Block images and what describes them: layer indexes, manifests, locations, root records. Pure.

Identity (layer index, block manifest) is kept apart from location (location table): the first are
named by the digest of what they mean, the second only says where one store keeps the chunks. Each
decoder checks magic, version, counts and order once; afterwards the frozen result is trusted.
Byte tables: imagecache/FORMAT.md.
"""
