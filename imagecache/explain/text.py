"""A report as text. Pure."""

from __future__ import annotations

from typing import Any

from imagecache.terminal import size_text, table_text

_CAUSES = {
    "cold": "fetched from the store, nobody had asked before",
    "rot": "the local copy was bad and fetched again",
    "late": "asked for ahead, but not here yet",
    "joined": "another read was waiting for it already",
    "first-use": "here, and compared with its digest first",
    "copy": "here, and a private copy was asked for",
}


def seconds_text(seconds: float) -> str:
    """A time for people: `12.3 ms`, `4.56 s`."""
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def shown(text: str) -> str:
    """A name of the image, safe for a terminal."""
    return text.encode("unicode_escape").decode()


def percent(ratio: float | None) -> str:
    """A ratio as percent; a dash where there is none."""
    return "-" if ratio is None else f"{ratio * 100:.0f} %"


def verdict(report: dict[str, Any]) -> str:
    """The report in one sentence."""
    stalls, seconds = report["stalls"], report["seconds"]
    if not report["reads"]:
        return "Nothing has been read yet."
    if not stalls["count"]:
        return f"No read waited: all that the start of {seconds_text(seconds)} read was here."
    share = stalls["wall_seconds"] / seconds if seconds else 0.0
    worst = max(stalls["by_cause"].items(), key=lambda item: item[1]["seconds"])
    return (
        f"Of {seconds_text(seconds)}, {seconds_text(stalls['wall_seconds'])} ({share * 100:.0f} %) "
        f"were spent waiting in {stalls['count']} reads; most of it: {_CAUSES[worst[0]]}."
    )


def counterfactual_text(report: dict[str, Any]) -> str:
    """What the store's profile of today would have changed."""
    found = report["counterfactual"]
    if found is None and not report["stalls"]["count"]:
        return "There was nothing to wait for, with or without a profile."
    if found is None:
        return "No profile is known yet: cubecache profile record, or cubecache profile build."
    return (
        f"With the profile that the store has now ({found['plan_chunks']} chunks, "
        f"{size_text(found['plan_bytes'])}), at {size_text(found['bytes_per_second'])}/s and "
        f"{seconds_text(found['first_byte_seconds'])} to the first byte: "
        f"{seconds_text(found['wall_seconds_with_profile'])} of waiting instead of "
        f"{seconds_text(found['wall_seconds'])}; {found['stalls_not_covered']} waits not covered."
    )


def report_text(report: dict[str, Any]) -> str:
    """All of it, for a terminal."""
    stalls, ahead, wide = report["stalls"], report["ahead"], report["amplification"]
    state = "" if report["over"] else " (still starting)"
    lines = [
        f"{report['export']}: {shown(report['reference'])}{state}",
        verdict(report),
        "",
        f"read      {report['reads']} reads of {size_text(report['read_bytes'])}; "
        f"{size_text(report['touched_bytes'])} of the disk in {report['touched_chunks']} chunks",
        f"fetched   {size_text(wide['fetched_bytes'])} in {wide['gets']} ranged GETs and streams "
        f"by the whole daemon meanwhile; the touched chunks are "
        f"{size_text(wide['stored_bytes_of_touched_chunks'])} as stored",
        f"ahead     {ahead['source']}: {ahead['chunks']} chunks, "
        f"{size_text(ahead['stored_bytes'])}; {percent(ahead['hit_rate'])} of what was "
        f"read had been brought or asked for, {percent(ahead['waste_rate'])} of what "
        f"was brought was not read",
    ]
    stream = ahead["stream"]
    if stream is not None:
        lines.append(
            f"stream    {size_text(stream['bytes'])} in {seconds_text(stream['seconds'])}, "
            f"{stream['chunks']} chunks new, {stream['already_here']} were here, "
            f"{stream['overtaken']} overtaken, {stream['left']} left"
        )
    if ahead["error"]:
        lines.append(f"          {ahead['error']}")
    lines += ["", counterfactual_text(report)]
    if stalls["count"]:
        rows = [("CAUSE", "WAITS", "TIME", "LONGEST", "")]
        rows += [
            (
                cause,
                f"{row['count']:.0f}",
                seconds_text(row["seconds"]),
                seconds_text(row["longest"]),
                _CAUSES[cause],
            )
            for cause, row in stalls["by_cause"].items()
        ]
        lines += ["", table_text(rows), ""]
        longest = [("AT", "WAITED", "DISK OFFSET", "BYTES", "CAUSE", "FROM", "FILE")]
        longest += [
            (
                seconds_text(stall["at"]),
                seconds_text(stall["seconds"]),
                str(stall["offset"]),
                str(stall["length"]),
                stall["cause"],
                stall["tier"],
                place_text(stall) + (f"  {stall['error']}" if stall["error"] else ""),
            )
            for stall in sorted(stalls["longest"], key=lambda x: float(x["at"]))
        ]
        lines += ["The longest waits, in order of time:", table_text(longest)]
    return "\n".join(lines)


def place_text(stall: dict[str, Any]) -> str:
    """File and offset of a stall."""
    inside = stall["file_offset"]
    return shown(stall["path"]) + (f" +{inside}" if inside is not None else "")
