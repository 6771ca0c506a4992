"""Kubernetes' resource quantities: `500m` of a processor, `1.5Gi` of memory. Pure."""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, Decimal
from typing import Final

from imagecache.errors import UsageError

_QUANTITY = re.compile(
    r"([0-9]{1,20}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})(?:([eE][+-]?[0-9]{1,3})|([A-Za-z]{0,2}))"
)
_UNITS: Final = {
    "": Decimal(1),
    "m": Decimal("0.001"),
    **{unit: Decimal(1000) ** power for power, unit in enumerate("kMGTP", 1)},
    **{unit + "i": Decimal(1024) ** power for power, unit in enumerate("KMGTP", 1)},
}
MEMORY_MAXIMUM: Final = 1 << 50
CPU_MAXIMUM: Final = 1_000_000  # thousandths


def parse_memory(value: str | int) -> int:
    """Bytes, rounded up; raises UsageError for what is none, negative, fractional or absurd."""
    number, unit = _number(value)
    if unit == "m":
        raise UsageError(f"{value!r} is no amount of memory: m means thousandths of a byte")
    bytes_ = (number * _UNITS[unit]).to_integral_value(ROUND_CEILING)
    if bytes_ > MEMORY_MAXIMUM:
        raise UsageError(f"{value!r} is over the limit of 1Pi")
    return int(bytes_)


def parse_cpu(value: str | int | float) -> int:
    """Thousandths of a processor, rounded up; raises UsageError."""
    number, unit = _number(value)
    if unit not in ("", "m", "k"):
        raise UsageError(f"{value!r} is no number of processors, such as 2 or 500m")
    millis = (number * _UNITS[unit] * 1000).to_integral_value(ROUND_CEILING)
    if millis > CPU_MAXIMUM:
        raise UsageError(f"{value!r} is over the limit of 1000 processors")
    return int(millis)


def _number(value: str | int | float) -> tuple[Decimal, str]:
    text = str(value)
    match = _QUANTITY.fullmatch(text)
    if match is None or (match[3] or "") not in _UNITS:
        raise UsageError(f"{text[:40]!r} is no quantity, such as 500m, 1.5 or 256Mi")
    return Decimal(match[1] + (match[2] or "")), match[3] or ""
