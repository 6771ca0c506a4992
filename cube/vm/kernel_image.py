"""An x86 kernel as an ELF file, out of a bzImage: what every Firecracker boots. Blocking.

Format, from Linux' Documentation/arch/x86/boot.rst: 0x1F1 the real-mode code's sectors less one,
0x202 "HdrS", 0x206 the protocol's version, 0x248 and 0x24C offset and length of the packed kernel
behind the real-mode code, where the version is 2.08 or later.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import struct
import zlib
from pathlib import Path
from typing import Final

import zstandard

from cube.vm.lz4 import MAGIC, unpack_legacy
from imagecache.errors import NoSpace, Rejected, Unsupported

_ELF: Final = b"\x7fELF"
_LIMIT: Final = 512 * 1024 * 1024
_PACKED_LIMIT: Final = 128 * 1024 * 1024


def elf_kernel(kernel: Path, cache: Path) -> Path:
    """The kernel itself where it is an ELF file already, else its unpacked twin in `cache`.

    Raises Unsupported for other kernels, NoSpace.
    """
    with kernel.open("rb") as file:
        if file.read(4) == _ELF:
            return kernel
        status = os.fstat(file.fileno())
        file.seek(0)
        packed = file.read(_PACKED_LIMIT)
    told = f"{kernel.absolute()}\0{status.st_size}\0{status.st_mtime_ns}".encode()
    unpacked = cache / f"vmlinux-{hashlib.sha256(told).hexdigest()[:16]}"
    if not unpacked.is_file():
        content = unpack_kernel(packed)
        fresh = unpacked.with_name(f"{unpacked.name}.{os.getpid()}")
        try:
            cache.mkdir(parents=True, exist_ok=True)
            fresh.write_bytes(content)
            fresh.chmod(0o644)
            fresh.replace(unpacked)
        except OSError as error:
            raise NoSpace(f"the unpacked kernel cannot be kept: {error}") from error
        finally:
            fresh.unlink(missing_ok=True)
    return unpacked


def unpack_kernel(image: bytes) -> bytes:
    """The ELF file inside a bzImage; raises Unsupported."""
    if image[0x202:0x206] != b"HdrS" or len(image) < 0x250:
        raise _strange("it is neither an ELF file nor a bzImage")
    (version,) = struct.unpack_from("<H", image, 0x206)
    if version < 0x0208:
        raise _strange("its boot protocol is older than 2.08")
    offset, length = struct.unpack_from("<II", image, 0x248)
    begin = ((image[0x1F1] or 4) + 1) * 512 + offset
    packed = image[begin : begin + length]
    try:
        if packed.startswith(b"\xfd7zXZ\0"):
            content = lzma.LZMADecompressor().decompress(packed, _LIMIT)
        elif packed.startswith(b"\x1f\x8b"):
            content = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(packed, _LIMIT)
        elif packed.startswith(MAGIC):
            content = unpack_legacy(packed, _LIMIT)
        elif packed.startswith(b"\x28\xb5\x2f\xfd"):
            content = zstandard.ZstdDecompressor().stream_reader(packed).read(_LIMIT)
        else:
            raise _strange("it is packed by neither xz, gzip, lz4 nor zstd")
    except (lzma.LZMAError, zlib.error, zstandard.ZstdError, Rejected) as error:
        raise _strange(f"it cannot be unpacked: {error}") from error
    if not content.startswith(_ELF):
        raise _strange("what is packed in it is no ELF file")
    return content


def _strange(why: str) -> Unsupported:
    return Unsupported(
        f"the guest's kernel is not for Firecracker: {why}", remedy="give a vmlinux, or use QEMU"
    )
