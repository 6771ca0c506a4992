"""Bodies of handshake options: parsing what clients sent, and encoding the server's answers."""

from dataclasses import dataclass
from struct import Struct, error

from nbdserver.protocol.constants import (
    MAX_STRING,
    OPTION_REPLY_MAGIC,
    Info,
    OptionReply,
)
from nbdserver.protocol.session import ExportFacts

_REPLY = Struct(">QIII")
_U32 = Struct(">I")
_U16 = Struct(">H")
_INFO_EXPORT = Struct(">HQH")
_INFO_BLOCK_SIZE = Struct(">HIII")

MAX_QUERIES = 128


class InvalidOption(Exception):
    """The option's body is malformed: the client gets ERR_INVALID and the next option is read."""


@dataclass(frozen=True)
class Choice:
    """INFO or GO: the client asks about `name`, or (`go`) wants to enter transmission with it."""

    name: str
    infos: frozenset[int]
    go: bool
    by_export_name: bool = False


@dataclass(frozen=True)
class ContextQuery:
    """LIST_META_CONTEXT, or (`select`) SET_META_CONTEXT."""

    name: str
    queries: tuple[str, ...]
    select: bool


def parse_string(body: bytes) -> str:
    """A name or query: UTF-8, no NUL, at most 4096 bytes; InvalidOption otherwise."""
    if len(body) > MAX_STRING:
        raise InvalidOption("a string is longer than 4096 bytes")
    if b"\0" in body:
        raise InvalidOption("a string contains NUL")
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as failure:
        raise InvalidOption("a string is not UTF-8") from failure


def parse_choice(body: bytes, *, go: bool) -> Choice:
    """INFO's and GO's body: name length u32, name, count u16, that many u16 information types."""
    try:
        (name_length,) = _U32.unpack_from(body, 0)
        if name_length > len(body) - 6:
            raise InvalidOption("the name is longer than its option")
        name = parse_string(body[4 : 4 + name_length])
        (count,) = _U16.unpack_from(body, 4 + name_length)
    except error as failure:
        raise InvalidOption("the option is too short") from failure
    rest = body[6 + name_length :]
    if len(rest) != 2 * count:
        raise InvalidOption("the number of information requests does not match the option's length")
    wanted = frozenset(_U16.unpack_from(rest, 2 * index)[0] for index in range(count))
    return Choice(name, wanted, go)


def parse_context_query(body: bytes, *, select: bool) -> ContextQuery:
    """Name length u32, name, count u32, then per query its length u32 and text; nothing after."""
    at = 0

    def take_string() -> str:
        nonlocal at
        (length,) = _U32.unpack_from(body, at)
        at += 4
        if length > len(body) - at:
            raise InvalidOption("a string is longer than its option")
        at += length
        return parse_string(body[at - length : at])

    try:
        name = take_string()
        (count,) = _U32.unpack_from(body, at)
        at += 4
        # Each query takes four bytes at least, so a count from the wire never sizes anything.
        if count > (len(body) - at) // 4:
            raise InvalidOption("more queries are announced than the option holds")
        queries = tuple(take_string() for _ in range(count))
    except error as failure:
        raise InvalidOption("the option is too short") from failure
    if at != len(body):
        raise InvalidOption("bytes follow the last query")
    for query in queries:
        if not query.partition(":")[1]:
            raise InvalidOption("a query has no namespace")
    return ContextQuery(name, queries, select)


def match_contexts(query: ContextQuery, available: tuple[str, ...]) -> list[str]:
    """The contexts a query lists or selects; `namespace:` is a wildcard in listings only."""
    if not query.queries:
        return [] if query.select else list(available)
    matched = []
    for context in available:
        namespace = context.partition(":")[0] + ":"
        for text in query.queries:
            if text == context or (not query.select and text == namespace):
                matched.append(context)
                break
    return matched


def encode_reply(option: int, kind: int, body: bytes = b"") -> bytes:
    """One answer to an option."""
    return _REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(body)) + body


def encode_refusal(option: int, kind: int, message: str = "") -> bytes:
    """An error answer with a text for humans, cut to what the protocol allows for strings."""
    text = message.encode("utf-8", "replace")[:512].decode("utf-8", "ignore").encode()
    return encode_reply(option, kind, text)


def encode_server(option: int, name: str, description: str = "") -> bytes:
    """One export of a listing."""
    raw = name.encode()
    return encode_reply(
        option, OptionReply.SERVER, _U32.pack(len(raw)) + raw + description.encode()
    )


def encode_context(option: int, number: int, name: str) -> bytes:
    """One metadata context of an answer."""
    return encode_reply(option, OptionReply.META_CONTEXT, _U32.pack(number) + name.encode())


def encode_infos(option: int, facts: ExportFacts, flags: int, wanted: frozenset[int]) -> bytes:
    """The INFO replies of a successful INFO or GO, without the final ACK."""
    kind = OptionReply.INFO
    parts = [encode_reply(option, kind, _INFO_EXPORT.pack(Info.EXPORT, facts.size, flags))]
    if Info.NAME in wanted:
        parts.append(encode_reply(option, kind, _U16.pack(Info.NAME) + facts.name.encode()))
    if Info.DESCRIPTION in wanted and facts.description:
        text = facts.description.encode()[:MAX_STRING].decode("utf-8", "ignore").encode()
        parts.append(encode_reply(option, kind, _U16.pack(Info.DESCRIPTION) + text))
    if Info.BLOCK_SIZE in wanted or facts.minimum > 1:
        sizes = _INFO_BLOCK_SIZE.pack(
            Info.BLOCK_SIZE, facts.minimum, facts.preferred, facts.maximum
        )
        parts.append(encode_reply(option, kind, sizes))
    return b"".join(parts)
