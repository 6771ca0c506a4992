"""The worker process: jobs on stdin, a line each; JSON lines on stdout; it ends with its stdin.

`python -m imagecache.build.worker` reads {"kind": "layer" | "image", ...}; events are
{"event": "pack" | "progress" | "done" | "error", ...}. It parses hostile bytes, so its parent
gives it a deadline and a memory limit, and believes nothing but the files it names.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import resource
import sys
import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

from blake3 import blake3

from imagecache.blockimage.layerindex import LayerIndex
from imagecache.blockimage.manifest import Face
from imagecache.blockimage.seals import PackKey
from imagecache.build.assemble import assemble
from imagecache.build.chunksink import FinishedPack
from imagecache.build.convert import LayerConverter
from imagecache.build.growing import open_blob
from imagecache.build.known import KnownChunks, in_few_packs, known_chunks
from imagecache.errors import CubecacheError, as_record
from imagecache.flatten.limits import Limits

JOB_LIMIT = 8 << 20


def emit(event: str, **values: Any) -> None:
    """Writes one event line."""
    sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
    sys.stdout.flush()


def announce(pack: FinishedPack) -> None:
    """Tells the parent of a pack that is ready to be stored."""
    emit("pack", path=str(pack.path), name=pack.name.hex(), length=pack.length)


def run_layer(job: dict[str, Any]) -> dict[str, Any]:
    """Converts one layer; the index and location table are left in the output directory."""
    directory = Path(job["directory"])
    known = KnownChunks(
        image=known_chunks(_pairs(job["known"])),
        references=in_few_packs(known_chunks(_pairs(job["references"]))),
    )
    converter = LayerConverter(
        directory,
        known,
        announce,
        lambda count: emit("progress", bytes=count),
        limits=_limits(job),
        level=job["level"],
        threads=job.get("threads", 0),
        generation=job["generation"],
        pack_key=_pack_key(job),
    )
    with open_blob(Path(job["blob"]), job["blob_bytes"]) as blob:
        result = converter.convert(blob, job["diff_id"])
    (directory / "index").write_bytes(result.index)
    (directory / "locations").write_bytes(result.locations)
    return {
        "files": result.files,
        "chunks": result.chunks,
        "new_chunks": result.new_chunks,
        "stored_bytes": result.stored_bytes,
    }


def run_image(job: dict[str, Any]) -> dict[str, Any]:
    """Assembles one image; the manifest and location table are left in the output directory."""
    directory = Path(job["directory"])
    pairs = _pairs(job["layers"])
    layers = []
    for index_path, _ in pairs:
        plaintext = index_path.read_bytes()
        layers.append((LayerIndex.decode(plaintext), blake3(plaintext).digest()))
    known = KnownChunks(
        image=known_chunks(pairs),
        references=in_few_packs(known_chunks(_pairs(job["references"]))),
    )
    result = assemble(
        directory,
        layers,
        known,
        announce,
        face=Face(job["face"]),
        options=job["options"],
        limits=_limits(job),
        level=job["level"],
        threads=job.get("threads", 0),
        generation=job["generation"],
        pack_key=_pack_key(job),
    )
    (directory / "manifest").write_bytes(result.manifest)
    (directory / "locations").write_bytes(result.locations)
    return {"new_chunks": result.new_chunks, "stored_bytes": result.stored_bytes}


def _pairs(paths: list[list[str]]) -> list[tuple[Path, Path]]:
    return [(Path(subject), Path(table)) for subject, table in paths]


def _pack_key(job: dict[str, Any]) -> PackKey | None:
    fields = job.get("pack_key")
    return None if fields is None else PackKey.from_json(fields)


def _limits(job: dict[str, Any]) -> Limits:
    known = {field.name for field in fields(Limits)}
    return Limits(**{name: value for name, value in job["limits"].items() if name in known})


def main() -> int:
    """Runs the jobs on stdin; a typed error is an event, and the last one."""
    os.umask(0o077)
    # A job builds large acyclic tables: collecting would walk them again and again.
    gc.disable()
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    while run_job(json.loads(jobs.get())):
        pass
    return 0


def _listen(jobs: queue.SimpleQueue[bytes]) -> None:
    """Passes jobs on; without a parent nobody wants their results, so the process ends at once."""
    while line := sys.stdin.buffer.readline(JOB_LIMIT):
        jobs.put(line)
    os._exit(0)


def run_job(job: dict[str, Any]) -> bool:
    """Runs one job; False after an error, when what it left behind may be half done."""
    limit = job.get("memory_bytes", 0)
    if limit:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    kinds = {"layer": run_layer, "image": run_image}
    try:
        emit("done", **kinds[job["kind"]](job))
        return True
    except CubecacheError as error:
        emit("error", **as_record(error))
    except MemoryError:
        emit(
            "error",
            kind="LimitExceeded",
            message=f"a conversion needs more than {limit} bytes of memory",
            remedy="raise [build] worker_memory_bytes",
        )
    except OSError as error:
        emit("error", kind="NoSpace" if error.errno == 28 else "Unavailable", message=str(error))
    return False


if __name__ == "__main__":
    sys.exit(main())
