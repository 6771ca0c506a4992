"""Which extended attributes of a layer are kept: one table, and checks against kernel limits.

| name | what happens |
|---|---|
| `trusted.overlay.*` | dropped: it would steer an overlayfs above or below, not describe a file |
| `system.posix_acl_access`, `_default` | kept if well-formed, else refused; dropped on symlinks, and `_default` on all but directories, as setxattr refuses them there |
| `user.*` | kept on regular files and directories, dropped elsewhere (no Linux can hold it) |
| `security.*`, other `trusted.*` | kept |
| anything else | dropped: no file system of ours can hold it |
"""  # noqa: E501 - a table row is one line

from __future__ import annotations

from imagecache.errors import LimitExceeded, Rejected
from imagecache.flatten.kinds import DIRECTORY, REGULAR, SYMLINK, shown
from imagecache.flatten.limits import Limits

ACL_ACCESS = b"system.posix_acl_access"
ACL_DEFAULT = b"system.posix_acl_default"

Xattrs = tuple[tuple[bytes, bytes], ...]


def is_kept(name: bytes, kind: int) -> bool:
    """Whether an attribute of this name stays on a file of this kind (table above)."""
    if name.startswith(b"user."):
        return len(name) > 5 and kind in (REGULAR, DIRECTORY)
    if name.startswith(b"security."):
        return len(name) > 9
    if name.startswith(b"trusted."):
        return len(name) > 8 and not name.startswith(b"trusted.overlay.")
    if name == ACL_ACCESS:
        return kind != SYMLINK
    return name == ACL_DEFAULT and kind == DIRECTORY


def acl_is_valid(value: bytes) -> bool:
    """Whether a POSIX ACL has the form that the kernel takes: version 2, ordered entries.

    Format: linux/posix_acl_xattr.h (le32 version, then le16 tag, le16 permissions, le32 id).
    """
    if len(value) < 4 or (len(value) - 4) % 8 or value[:4] != b"\2\0\0\0":
        return False
    order = {0x01: 0, 0x02: 1, 0x04: 2, 0x08: 3, 0x10: 4, 0x20: 5}
    tags: list[int] = []
    last = (-1, -1)
    for at in range(4, len(value), 8):
        tag = int.from_bytes(value[at : at + 2], "little")
        permissions = int.from_bytes(value[at + 2 : at + 4], "little")
        identity = int.from_bytes(value[at + 4 : at + 8], "little")
        if tag not in order or permissions > 7:
            return False
        named = tag in (0x02, 0x08)
        if named and identity == 0xFFFFFFFF:
            return False
        place = (order[tag], identity if named else 0)
        # Named entries may stand in any order of their ids; the classes may not.
        if place[0] < last[0] or (place[0] == last[0] and not named):
            return False
        last = place
        tags.append(tag)
    needed = {0x01, 0x04, 0x20} | ({0x10} if 0x02 in tags or 0x08 in tags else set())
    return needed <= set(tags)


def checked(found: dict[bytes, bytes], kind: int, limits: Limits, where: str) -> Xattrs:
    """The attributes that stay, sorted by name.

    Raises `LimitExceeded` for too many or too large ones, `Rejected` for a malformed ACL; the
    message starts with `where`.
    """
    # An ACL without entries is how setxattr is told to remove it.
    kept = sorted(
        item
        for item in found.items()
        if is_kept(item[0], kind) and not (item[0].startswith(b"system.") and len(item[1]) == 4)
    )
    if len(kept) > limits.xattrs:
        raise LimitExceeded(f"{where} has {len(kept)} extended attributes, over {limits.xattrs}")
    total = 0
    for name, value in kept:
        total += len(name) + len(value)
        if len(name) > limits.xattr_name_bytes or b"\0" in name:
            raise LimitExceeded(f"{where} has an extended attribute with a bad name {shown(name)}")
        if len(value) > limits.xattr_value_bytes:
            raise LimitExceeded(
                f"{where}: extended attribute {shown(name)} has {len(value)} bytes, "
                f"over {limits.xattr_value_bytes}",
                remedy="no file system of ours holds it: drop it from the image",
            )
        if name.startswith(b"system.") and not acl_is_valid(value):
            raise Rejected(f"{where}: extended attribute {shown(name)} is no POSIX ACL")
    if total > limits.xattr_total_bytes:
        raise LimitExceeded(
            f"{where}: extended attributes of {total} bytes, over {limits.xattr_total_bytes}"
        )
    return tuple(kept)
