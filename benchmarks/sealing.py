"""What sealing costs, in processor time of one core: of chunks, and of small objects.

Chunks are 256 KiB windows of a real layer's files. `./tools/bench sealing`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

from imagecache.blockimage.envelope import seal, unseal
from imagecache.blockimage.seals import Seals, Secrets
from imagecache.chunks import MAX_CHUNK_BYTES, chunk_digest
from imagecache.chunks.codec import ChunkEncoder, decode_chunk

SOURCE = Path("/usr/lib")


def windows(megabytes: int) -> list[bytes]:
    """Windows of files of this host, without all-zero ones."""
    found: list[bytes] = []
    for path in sorted(SOURCE.rglob("*.so*")):
        if path.is_file() and not path.is_symlink():
            body = path.read_bytes()
            found += [
                body[at : at + MAX_CHUNK_BYTES]
                for at in range(0, len(body) - MAX_CHUNK_BYTES, MAX_CHUNK_BYTES)
            ]
        if len(found) * MAX_CHUNK_BYTES >= megabytes << 20:
            break
    return found


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Processor seconds, the best of some rounds: others may use the machine meanwhile."""
    best = float("inf")
    for _ in range(rounds):
        begin = time.process_time()
        work()
        best = min(best, time.process_time() - begin)
    return best


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    chunks = windows(arguments.megabytes)
    total = sum(map(len, chunks)) / 1e6
    seals = Seals(Secrets(os.urandom(32), {1: os.urandom(32)}, 1))
    key = seals.pack_key
    assert key is not None
    encoder = ChunkEncoder()
    digests = [chunk_digest(chunk) for chunk in chunks]
    stored = [encoder.encode(chunk) for chunk in chunks]
    pairs = list(zip(digests, stored, strict=True))
    sealed = [key.seal_chunk(digest, body) for digest, (_, body) in pairs]
    record = b"x" * 900

    def decode_plain() -> None:
        for digest, (codec, body) in pairs:
            assert chunk_digest(decode_chunk(codec, body, MAX_CHUNK_BYTES)) == digest

    def decode_sealed() -> None:
        for (digest, (codec, _)), body in zip(pairs, sealed, strict=True):
            opened = seals.open_chunk(1, digest, body)
            assert chunk_digest(decode_chunk(codec, opened, MAX_CHUNK_BYTES)) == digest

    def objects_plain() -> None:
        for number in range(1000):
            name, body = seal(record + number.to_bytes(4, "big"))
            unseal(body, name)

    def objects_sealed() -> None:
        for number in range(1000):
            name, body = seal(record + number.to_bytes(4, "big"))
            where = f"v1/r/g00000001/roots/{number}"
            unseal(seals.open_object(where, seals.seal_object(where, body)), name)

    rounds = arguments.rounds
    encode = seconds(lambda: [(chunk_digest(x), encoder.encode(x)) for x in chunks], rounds)
    sealing = seconds(lambda: [key.seal_chunk(d, body) for d, (_, body) in pairs], rounds)
    plain, opened = seconds(decode_plain, rounds), seconds(decode_sealed, rounds)
    small, small_sealed = seconds(objects_plain, rounds), seconds(objects_sealed, rounds)
    answer = {
        "chunks": len(chunks),
        "plaintext_mb": round(total, 1),
        "stored_mb": round(sum(len(body) for _, (_, body) in pairs) / 1e6, 2),
        "sealed_mb": round(sum(map(len, sealed)) / 1e6, 2),
        "encode_mb_s": round(total / encode),
        "encode_and_seal_mb_s": round(total / (encode + sealing)),
        "decode_mb_s": round(total / plain),
        "open_and_decode_mb_s": round(total / opened),
        "record_us": round(small * 1000, 1),
        "sealed_record_us": round(small_sealed * 1000, 1),
        "load": os.getloadavg()[0],
        "check": blake3(b"".join(sealed[:1])).hexdigest()[:8],
    }
    print(json.dumps(answer, indent=2))


if __name__ == "__main__":
    main()
