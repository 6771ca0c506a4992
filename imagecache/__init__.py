"""imagecache: OCI images in, content-addressed block images out, served lazily.

It pulls and verifies images, turns each layer once into a file table and a data region, stores
chunks in packs, and gives a block image back as a device. It must never mount an image, trust a
byte that was not verified, or let anything but content reach an identity. The bucket owns the
truth; everything under the state directory can be lost and is rebuilt.
"""
