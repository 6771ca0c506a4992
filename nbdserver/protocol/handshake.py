"""The handshake of fixed newstyle, as a machine: bytes in, events and bytes out.

`receive` takes bytes, `next_event` gives the next thing that the caller must decide (or None: more
bytes are needed), the answering methods append to what `take_output` returns. Everything that needs
no decision (unknown options, malformed bodies, structured replies, TLS policy) is answered here.
"""

from enum import Enum
from struct import Struct

from nbdserver.protocol.constants import (
    NBD_MAGIC,
    OPTION_MAGIC,
    ExportFlag,
    HandshakeFlag,
    Option,
    OptionReply,
    ReplyMode,
)
from nbdserver.protocol.errors import ProtocolViolation
from nbdserver.protocol.options import (
    MAX_QUERIES,
    Choice,
    ContextQuery,
    InvalidOption,
    encode_context,
    encode_infos,
    encode_refusal,
    encode_reply,
    encode_server,
    match_contexts,
    parse_choice,
    parse_context_query,
    parse_string,
)
from nbdserver.protocol.session import ExportFacts, Session

_GREETING = Struct(">QQH")
_OPTION_HEAD = Struct(">QII")
_EXPORT_NAME_REPLY = Struct(">QH")
_CLIENT_FLAGS = Struct(">I")


class TlsMode(Enum):
    """Whether the client may or must upgrade to TLS before it names an export."""

    OFF = "off"
    OPTIONAL = "optional"
    REQUIRED = "required"


class Event(Enum):
    """Decisions without a body."""

    LIST = "list"
    START_TLS = "start TLS"
    ABORTED = "aborted"


class Handshake:
    """One client's options. Raises ProtocolViolation where the only answer is to close."""

    def __init__(
        self, *, tls: TlsMode = TlsMode.OFF, max_options: int = 100, max_option_bytes: int = 65536
    ) -> None:
        self._tls = tls
        self._secure = False
        self._max_options = max_options
        self._max_option_bytes = max_option_bytes
        self._input = bytearray()
        self._output = bytearray(
            _GREETING.pack(
                NBD_MAGIC, OPTION_MAGIC, HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
            )
        )
        self._client_flags: int | None = None
        self._options_seen = 0
        self._mode = ReplyMode.SIMPLE
        self._contexts: tuple[str, tuple[tuple[int, str], ...]] | None = None
        self._option = 0
        self.session: Session | None = None

    def receive(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes from the client; they are bounded by what `next_event` consumes."""
        self._input += data

    def take_output(self) -> bytes:
        """Bytes to send, once."""
        output = bytes(self._output)
        self._output.clear()
        return output

    def take_rest(self) -> bytes:
        """Bytes after the last option: the start of the transmission phase."""
        rest = bytes(self._input)
        self._input.clear()
        return rest

    def next_event(self) -> Event | Choice | ContextQuery | None:
        """The next decision, or None when more bytes are needed or the session is agreed."""
        while self.session is None:
            if self._client_flags is None:
                if len(self._input) < 4:
                    return None
                self._take_client_flags()
                continue
            if len(self._input) < 16:
                return None
            magic, option, length = _OPTION_HEAD.unpack_from(self._input, 0)
            if magic != OPTION_MAGIC:
                raise ProtocolViolation("wrong option magic")
            if length > self._max_option_bytes:
                raise ProtocolViolation(f"an option of {length} bytes")
            if len(self._input) < 16 + length:
                return None
            body = bytes(self._input[16 : 16 + length])
            del self._input[: 16 + length]
            self._options_seen += 1
            if self._options_seen > self._max_options:
                raise ProtocolViolation(f"more than {self._max_options} options")
            self._option = option
            event = self._dispatch(option, body)
            if event is not None:
                return event
        return None

    def _take_client_flags(self) -> None:
        (flags,) = _CLIENT_FLAGS.unpack_from(self._input, 0)
        del self._input[:4]
        if flags & ~(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES):
            raise ProtocolViolation(f"unknown client flags {flags:#x}")
        self._client_flags = flags
        if not flags & HandshakeFlag.FIXED_NEWSTYLE and self._tls is TlsMode.REQUIRED:
            raise ProtocolViolation("TLS is required, and the client does not know options")

    def _dispatch(self, option: int, body: bytes) -> Event | Choice | ContextQuery | None:
        if option == Option.ABORT:
            self._reply(OptionReply.ACK)
            return Event.ABORTED
        if option == Option.STARTTLS:
            return self._start_tls(body)
        if self._tls is TlsMode.REQUIRED and not self._secure:
            if option == Option.EXPORT_NAME:
                raise ProtocolViolation("EXPORT_NAME before TLS")
            self.refuse(OptionReply.ERR_TLS_REQD, "this server requires TLS")
            return None
        try:
            return self._dispatch_plain(option, body)
        except InvalidOption as failure:
            if option == Option.EXPORT_NAME:
                raise ProtocolViolation(f"EXPORT_NAME: {failure}") from failure
            if option == Option.SET_META_CONTEXT:
                self._contexts = None
            self.refuse(OptionReply.ERR_INVALID, str(failure))
            return None

    def _dispatch_plain(self, option: int, body: bytes) -> Event | Choice | ContextQuery | None:
        if option == Option.EXPORT_NAME:
            if self._mode is ReplyMode.EXTENDED:
                raise ProtocolViolation("EXPORT_NAME after extended headers")
            return Choice(parse_string(body), frozenset(), go=True, by_export_name=True)
        if option in (Option.INFO, Option.GO):
            return parse_choice(body, go=option == Option.GO)
        if option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
            if self._mode is ReplyMode.SIMPLE:
                raise InvalidOption("structured replies come first")
            query = parse_context_query(body, select=option == Option.SET_META_CONTEXT)
            if query.select:
                self._contexts = None
            if len(query.queries) > MAX_QUERIES:
                self.refuse(OptionReply.ERR_TOO_BIG, f"more than {MAX_QUERIES} queries")
                return None
            return query
        if option == Option.LIST:
            if body:
                raise InvalidOption("LIST takes no data")
            return Event.LIST
        if option in (Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS):
            if body:
                raise InvalidOption("the option takes no data")
            self._raise_mode(option)
            return None
        self.refuse(OptionReply.ERR_UNSUP, "unknown option")
        return None

    def _raise_mode(self, option: int) -> None:
        if option == Option.EXTENDED_HEADERS:
            self._mode = ReplyMode.EXTENDED
        elif self._mode is ReplyMode.EXTENDED:
            self.refuse(OptionReply.ERR_EXT_HEADER_REQD, "extended headers are in use")
            return
        else:
            self._mode = ReplyMode.STRUCTURED
        self._reply(OptionReply.ACK)

    def _start_tls(self, body: bytes) -> Event | None:
        if body or self._secure:
            message = "STARTTLS takes no data" if body else "TLS is already in use"
            self.refuse(OptionReply.ERR_INVALID, message)
            return None
        fixed = (self._client_flags or 0) & HandshakeFlag.FIXED_NEWSTYLE
        if self._tls is TlsMode.OFF or not fixed:
            self.refuse(OptionReply.ERR_POLICY, "TLS is not offered here")
            return None
        if self._input:
            # Plain bytes sent ahead of the TLS handshake would be taken for protected ones.
            raise ProtocolViolation("bytes follow STARTTLS in the clear")
        self._reply(OptionReply.ACK)
        return Event.START_TLS

    def tls_started(self) -> None:
        """The TLS handshake is done: nothing agreed before it counts."""
        self._input.clear()
        self._secure = True
        self._mode = ReplyMode.SIMPLE
        self._contexts = None

    def answer_list(self, exports: list[tuple[str, str]]) -> None:
        """Answer LIST with (name, description) pairs."""
        for name, description in exports:
            self._output += encode_server(self._option, name, description)
        self._reply(OptionReply.ACK)

    def answer_contexts(self, query: ContextQuery, available: tuple[str, ...]) -> None:
        """Answer LIST_META_CONTEXT or SET_META_CONTEXT from the contexts that the export has."""
        names = match_contexts(query, available)
        chosen = tuple((index, name) for index, name in enumerate(names, 1))
        for number, name in chosen:
            self._output += encode_context(self._option, number if query.select else 0, name)
        if query.select:
            self._contexts = (query.name, chosen)
        self._reply(OptionReply.ACK)

    def answer_choice(self, choice: Choice, facts: ExportFacts) -> None:
        """Answer INFO, GO or EXPORT_NAME with an export; after the last two `session` is set."""
        contexts: tuple[tuple[int, str], ...] = ()
        if self._contexts is not None and self._contexts[0] == choice.name:
            contexts = self._contexts[1]
        flags = facts.flags | ExportFlag.HAS_FLAGS
        if self._mode is not ReplyMode.SIMPLE:
            flags |= ExportFlag.SEND_DF
        if self._mode is ReplyMode.EXTENDED and contexts:
            flags |= ExportFlag.BLOCK_STATUS_PAYLOAD
        if choice.by_export_name:
            self._output += _EXPORT_NAME_REPLY.pack(facts.size, flags)
            if not (self._client_flags or 0) & HandshakeFlag.NO_ZEROES:
                self._output += bytes(124)
        else:
            self._output += encode_infos(self._option, facts, flags, choice.infos)
            self._reply(OptionReply.ACK)
        if choice.go:
            self.session = Session(
                export=facts.name,
                size=facts.size,
                flags=flags,
                mode=self._mode,
                minimum=facts.minimum,
                maximum=facts.maximum,
                contexts=contexts,
            )

    def refuse(self, kind: OptionReply, message: str = "") -> None:
        """Answer the current option with an error."""
        self._output += encode_refusal(self._option, kind, message)

    def refuse_choice(self, choice: Choice, kind: OptionReply, message: str) -> None:
        """Refuse an export; EXPORT_NAME has no error answer and ends the session."""
        if choice.by_export_name:
            raise ProtocolViolation(f"EXPORT_NAME: {message}")
        self.refuse(kind, message)

    def _reply(self, kind: OptionReply) -> None:
        self._output += encode_reply(self._option, kind)
