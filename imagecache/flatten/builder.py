"""Builds one layer's file table from its tar members, in a virtual tree of that layer alone.

A member's parents are resolved through symlinks of the same layer, inside a virtual root, as a
process chrooted into the unpacked layer would; its last component is never followed. Whiteouts are
not resolved through symlinks at all: they name paths of the layers below.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from imagecache.errors import LimitExceeded, Rejected
from imagecache.flatten import kinds
from imagecache.flatten.filetable import IMPLICIT, FileTable
from imagecache.flatten.kinds import shown
from imagecache.flatten.layerpaths import WHITEOUT_PREFIX, split_path, whiteout_target
from imagecache.flatten.limits import Limits
from imagecache.flatten.tar import Header
from imagecache.flatten.xattrs import Xattrs


class _Directory:
    """A directory of the virtual tree: children are directories, or inode numbers, or ~(lower
    link number)."""

    __slots__ = ("children", "inode", "path")

    def __init__(self, path: bytes) -> None:
        self.children: dict[bytes, _Directory | int] = {}
        self.inode = -1  # implicit until a member describes it
        self.path = path

    def below(self, name: bytes) -> bytes:
        return self.path + b"/" + name if self.path else name


class FileTableBuilder:
    """Takes the headers of one layer in tar order; `finish` gives the table.

    Raises `Rejected` or `LimitExceeded` with the path and the member's position in the layer; the
    builder is of no use after that.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._root = _Directory(b"")
        self._parents: dict[bytes, _Directory] = {b"": self._root}  # raw parent path -> resolved
        self._whiteouts: set[bytes] = set()
        self._opaques: set[bytes] = set()
        self._logical = 0
        self._names = 1
        self._path_bytes = 0
        self._mode = array("H")
        self._uid = array("I")
        self._gid = array("I")
        self._mtime = array("q")
        self._mtime_ns = array("I")
        self._size = array("Q")
        self._extra = array("I")
        self._xattr_set = array("I")
        self._contents = array("q")
        self._targets: list[bytes] = []
        self._xattr_numbers: dict[Xattrs, int] = {}
        self._xattr_bytes = 0
        self._lower_links: list[bytes] = []
        self._lower_targets: set[bytes] = set()

    def add(self, header: Header, content: int) -> bool:
        """Take one member. True: the caller has to keep its data under the id `content` (>= 0).

        Call it before reading the member's pieces, so that a bad path costs nothing.
        """
        raw = header.path
        kind = header.kind
        if WHITEOUT_PREFIX in raw and self._add_whiteout(header):
            return False
        name = self._last_name(header)
        if name is None:
            return False
        parent, last = name
        if last not in parent.children:
            self._count_path(len(parent.path) + 1 + len(last), header)
        if self._lower_targets and parent.below(last) in self._lower_targets:
            raise Rejected(
                f"{_where(header)} is the target of a hard link that stands before it in the layer"
            )
        if kind == kinds.HARD_LINK:
            leaf = self._link_leaf(header, parent, last)
        elif kind == kinds.DIRECTORY:
            self._place_directory(header, parent, last)
            return False
        else:
            leaf = self._new_inode(header, content)
        self._place(parent, last, leaf)
        return kind == kinds.REGULAR and header.size > 0

    # Paths ------------------------------------------------------------------------------------

    def _last_name(self, header: Header) -> tuple[_Directory, bytes] | None:
        """(parent directory, last component); None once the root itself has been described."""
        raw = header.path
        if raw.endswith(b"/"):
            raw = raw[:-1]
        above, _, last = raw.rpartition(b"/")
        parent = self._parents.get(above)
        is_plain = last not in (b"", b".", b"..")
        if (
            parent is not None
            and is_plain
            and len(last) <= self._limits.name_bytes
            and len(raw) <= self._limits.path_bytes
        ):
            return parent, last
        where = _where(header)
        parts = split_path(raw, self._limits, where)
        if not parts:
            if header.kind != kinds.DIRECTORY:
                raise Rejected(f"{where} would replace the root directory")
            self._root.inode = self._new_inode(header, -1)
            return None
        last = parts.pop()
        key = b"/".join(parts)
        parent = self._parents.get(key)
        if parent is None:
            parent = self._make_parents(parts, header)
            if len(self._parents) > 20_000:
                self._forget_parents()
            self._parents[key] = parent
        if is_plain:
            self._parents[above] = parent  # as written: "./usr/lib" leads where "usr/lib" does
        return parent, last

    def _forget_parents(self) -> None:
        self._parents = {b"": self._root}

    def _count_path(self, size: int, header: Header) -> None:
        """Count one more name of `size` path bytes against the caps."""
        self._names += 1
        self._path_bytes += size
        if size > self._limits.path_bytes:
            raise LimitExceeded(
                f"{_where(header)}: its path through symlinks has {size} bytes, "
                f"over {self._limits.path_bytes}"
            )
        if self._names > self._limits.entries or self._path_bytes > self._limits.path_total_bytes:
            raise LimitExceeded(
                f"{_where(header)}: the layer has more than {self._limits.entries} names, "
                f"or its paths have more than {self._limits.path_total_bytes} bytes",
                remedy="raise [limits] entries and path_total_bytes if this image is trusted",
            )

    def _make_parents(self, parts: list[bytes], header: Header) -> _Directory:
        """The directory that `parts` lead to, through symlinks; what is missing is made."""
        stack = [self._root]
        hops = 0
        ahead = parts[::-1]
        while ahead:
            part = ahead.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                if len(stack) > 1:  # ".." of a root is that root, as for any process
                    stack.pop()
                continue
            here = stack[-1]
            child = here.children.get(part)
            if isinstance(child, _Directory):
                stack.append(child)
                continue
            target = self._symlink_target(child)
            if target is not None:
                hops += 1
                if hops > self._limits.symlink_hops:
                    raise Rejected(f"{_where(header)}: its path has more than {hops - 1} symlinks")
                if target.startswith(b"/"):
                    del stack[1:]
                ahead.extend(reversed(target.split(b"/")))
                continue
            if len(part) > self._limits.name_bytes:
                raise LimitExceeded(
                    f"{_where(header)}: a symlink leads to the long name {shown(part)}"
                )
            if part.startswith(WHITEOUT_PREFIX):
                raise Rejected(f"{_where(header)}: a symlink leads to the whiteout {shown(part)}")
            made = _Directory(here.below(part))
            self._count_path(len(made.path), header)
            here.children[part] = made
            stack.append(made)
        return stack[-1]

    def _symlink_target(self, child: _Directory | int | None) -> bytes | None:
        if isinstance(child, int) and child >= 0 and self._mode[child] >> 12 == kinds.SYMLINK:
            return self._targets[self._extra[child]]
        return None

    def _add_whiteout(self, header: Header) -> bool:
        """Note a whiteout, opaque mark or aufs leftover; False for an ordinary member."""
        where = _where(header)
        parts = split_path(header.path, self._limits, where)
        meaning = whiteout_target(parts, header.path, where)
        if meaning is None:
            return False
        kind, path = meaning
        self._count_path(len(path), header)
        if kind == "whiteout":
            self._whiteouts.add(path)
        elif kind == "opaque":
            self._opaques.add(path)
        return True

    # Placing ----------------------------------------------------------------------------------

    def _place(self, parent: _Directory, name: bytes, leaf: int) -> None:
        before = parent.children.get(name)
        if isinstance(before, _Directory) or self._symlink_target(before) is not None:
            self._forget_parents()
        parent.children[name] = leaf

    def _place_directory(self, header: Header, parent: _Directory, name: bytes) -> None:
        before = parent.children.get(name)
        if not isinstance(before, _Directory):
            path = parent.below(name)
            if self._symlink_target(before) is not None:
                self._forget_parents()
            before = _Directory(path)
            parent.children[name] = before
        before.inode = self._new_inode(header, -1)

    def _new_inode(self, header: Header, content: int) -> int:
        kind = header.kind
        mode = header.mode
        size = extra = 0
        if kind == kinds.REGULAR:
            size = header.size
            self._logical += size
            if self._logical > self._limits.logical_bytes:
                raise LimitExceeded(
                    f"{_where(header)}: the layer's files have more than "
                    f"{self._limits.logical_bytes} bytes, holes included",
                    remedy="raise [limits] logical_bytes if this image is trusted",
                )
        elif kind == kinds.SYMLINK:
            if not 0 < len(header.link) <= self._limits.symlink_bytes:
                raise Rejected(
                    f"{_where(header)}: symlink target of {len(header.link)} bytes is outside "
                    f"1..{self._limits.symlink_bytes}"
                )
            extra = len(self._targets)
            self._targets.append(header.link)
            mode = 0o777  # the only mode that Linux gives a symlink
        elif kind in kinds.DEVICES:
            extra = header.rdev
        self._mode.append(kind << 12 | mode)
        self._uid.append(header.uid)
        self._gid.append(header.gid)
        self._mtime.append(header.mtime)
        self._mtime_ns.append(header.mtime_ns)
        self._size.append(size)
        self._extra.append(extra)
        self._xattr_set.append(self._xattr_number(header) if header.xattrs else 0)
        self._contents.append(content if size else -1)
        return len(self._mode) - 1

    def _xattr_number(self, header: Header) -> int:
        number = self._xattr_numbers.get(header.xattrs)
        if number is None:
            self._xattr_bytes += sum(len(name) + len(value) for name, value in header.xattrs)
            if self._xattr_bytes > self._limits.distinct_xattr_bytes:
                raise LimitExceeded(
                    f"{_where(header)}: the layer's extended attributes are larger than "
                    f"{self._limits.distinct_xattr_bytes} bytes"
                )
            number = len(self._xattr_numbers) + 1
            self._xattr_numbers[header.xattrs] = number
        return number

    def _link_leaf(self, header: Header, parent: _Directory, name: bytes) -> int:
        """The leaf that a hard link shares: this layer's, or a new lower link."""
        where = _where(header)
        parts = split_path(header.link, self._limits, where)
        if not parts:
            raise Rejected(f"{where} is a hard link to the root directory")
        here: _Directory | None = self._root
        ahead = parts[::-1]
        stack = [self._root]
        rest: list[bytes] = []
        hops = 0
        while len(ahead) > 1 and here is not None:
            part = ahead.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                if len(stack) > 1:
                    stack.pop()
                here = stack[-1]
                continue
            child = here.children.get(part)
            target = self._symlink_target(child)
            if isinstance(child, _Directory):
                stack.append(child)
                here = child
            elif target is not None:
                hops += 1
                if hops > self._limits.symlink_hops:
                    raise Rejected(f"{where}: its target has more than {hops - 1} symlinks")
                if target.startswith(b"/"):
                    del stack[1:]
                    here = stack[0]
                ahead.extend(reversed(target.split(b"/")))
            elif child is None:
                rest = [part, *reversed(ahead)]
                here = None
            else:
                raise Rejected(f"{where}: a parent of its target is no directory")
        shared: _Directory | int | None = None
        if here is not None:
            rest = [ahead[0]]
            if here is parent and ahead[0] == name:
                raise Rejected(f"{where} is a hard link to itself")
            shared = here.children.get(ahead[0])
        if isinstance(shared, _Directory):
            raise Rejected(f"{where} is a hard link to a directory, {shown(header.link)}")
        if shared is not None:
            return shared
        lower: list[bytes] = []
        for part in rest:
            if part == b"..":
                if lower:
                    lower.pop()
                elif len(stack) > 1:
                    stack.pop()
            elif part not in (b"", b"."):
                lower.append(part)
        target_path = stack[-1].below(b"/".join(lower))
        self._count_path(len(target_path), header)
        if target_path == parent.below(name):
            raise Rejected(f"{where} is a hard link to itself")
        self._lower_targets.add(target_path)
        self._lower_links.append(target_path)
        return ~(len(self._lower_links) - 1)

    # Result -----------------------------------------------------------------------------------

    def _leaves(self) -> Iterator[tuple[bytes, _Directory | int]]:
        stack = [self._root]
        yield b"", self._root
        while stack:
            here = stack.pop()
            prefix = here.path + b"/" if here.path else b""
            for name, child in here.children.items():
                yield prefix + name, child
                if isinstance(child, _Directory):
                    stack.append(child)

    def finish(self) -> FileTable:
        """The layer's table: names sorted, inodes renumbered by first name, the dead dropped."""
        ordered = sorted(self._leaves(), key=_path_of)
        count = len(ordered)
        parents = array("I", bytes(4 * count))
        inodes = array("I", bytes(4 * count))
        ends = array("I", bytes(4 * count))
        names: list[bytes] = []
        end = 0
        directory_entry: dict[bytes, int] = {b"": 0}
        number = array("i", [-1]) * len(self._mode)
        order = array("I")
        lower_links: list[bytes] = []
        lower_entries: list[int] = []
        for entry, (path, leaf) in enumerate(ordered):
            above, _, name = path.rpartition(b"/")
            names.append(name)
            end += len(name)
            ends[entry] = end
            parents[entry] = directory_entry[above]
            if isinstance(leaf, _Directory):
                directory_entry[path] = entry
                inode = leaf.inode
                if inode < 0:
                    inodes[entry] = IMPLICIT
                    continue
            elif leaf < 0:
                lower_entries.append(entry)
                lower_links.append(self._lower_links[~leaf])
                continue
            else:
                inode = leaf
            if number[inode] < 0:
                number[inode] = len(order)
                order.append(inode)
            inodes[entry] = number[inode]
        for ordinal, entry in enumerate(lower_entries):
            inodes[entry] = len(order) + ordinal
        targets: list[bytes] = []
        extra = array("I", (self._extra[inode] for inode in order))
        xattr_set = array("I", (self._xattr_set[inode] for inode in order))
        used: dict[int, int] = {}
        for position, inode in enumerate(order):
            if self._mode[inode] >> 12 == kinds.SYMLINK:
                targets.append(self._targets[self._extra[inode]])
                extra[position] = len(targets) - 1
            if xattr_set[position]:
                xattr_set[position] = used.setdefault(xattr_set[position], len(used) + 1)
        sets = list(self._xattr_numbers)
        return FileTable(
            entry_parent=parents,
            entry_inode=inodes,
            names=b"".join(names),
            name_ends=ends,
            mode=array("H", (self._mode[inode] for inode in order)),
            uid=array("I", (self._uid[inode] for inode in order)),
            gid=array("I", (self._gid[inode] for inode in order)),
            mtime=array("q", (self._mtime[inode] for inode in order)),
            mtime_ns=array("I", (self._mtime_ns[inode] for inode in order)),
            size=array("Q", (self._size[inode] for inode in order)),
            extra=extra,
            xattr_set=xattr_set,
            symlink_targets=targets,
            xattr_sets=[sets[old - 1] for old in used],
            lower_links=lower_links,
            whiteouts=sorted(self._whiteouts),
            opaques=sorted(self._opaques),
            contents=array("q", (self._contents[inode] for inode in order)),
        )


def _path_of(item: tuple[bytes, _Directory | int]) -> bytes:
    return item[0]


def _where(header: Header) -> str:
    return f"member at byte {header.position} {shown(header.path)}"
