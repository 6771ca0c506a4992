"""What a handshake agreed on: all that the transmission phase, or a hand-over, needs to know."""

from dataclasses import dataclass

from nbdserver.protocol.constants import ReplyMode


@dataclass(frozen=True)
class ExportFacts:
    """What the handshake tells of an export. Sizes in bytes; flags are `ExportFlag` bits."""

    name: str
    size: int
    flags: int
    minimum: int = 1
    preferred: int = 4096
    maximum: int = 32 << 20
    description: str = ""
    contexts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Session:
    """One client's transmission phase as agreed. `contexts` are (id, name) as selected."""

    export: str
    size: int
    flags: int
    mode: ReplyMode
    minimum: int
    maximum: int
    contexts: tuple[tuple[int, str], ...] = ()
