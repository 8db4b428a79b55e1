"""A stream of NATS JetStream as the sink of events: connects, finds or creates the stream, and publishes in order.

Messages are pipelined, and the server keeps their order: each names the message that must be the stream's last one, by
its sequence and, after the first message of a connection, by its id. So nothing is stored after a message that was lost
or refused, and what a replica still sends after another took over is stored in its place or not at all. The sequence
alone would not do: a foreign message shifts it by one, and the second event of a batch would pass where the first is
refused. A message's id is that of its event, so the server acknowledges a repeat without storing it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec

from octollm.config import EventSinkUrl, read_secret_file
from octollm.contracts.event_formats import encode_cloudevent
from octollm.contracts.events import EVENT_CATALOGUE, MAX_EVENT_BYTES, Event
from octollm.errors import OctoError, SettingError, map_exceptions

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.js import JetStreamContext
    from nats.js.api import StreamInfo

CONNECT_SECONDS = 5.0
API_SECONDS = 5.0
ACK_SECONDS = 5.0
"""How long the server may acknowledge nothing while messages are on their way."""
CLOSE_SECONDS = 2.0
MAX_IN_FLIGHT = 512
MAX_IN_FLIGHT_BYTES = 4 * 1024 * 1024
ENVELOPE_BYTES = 16 * 1024
"""The members of an event beside its data, and the headers of its message."""
YIELD_INTERVAL = 32
"""Messages after which other tasks of the process get their turn: ``publish`` itself does not wait."""
MAX_ERROR_TEXT = 200
_WRONG_LAST = (10070, 10071)
"""The codes of a wrong last id and of a wrong last sequence."""
_NO_RESPONDERS = "503"


class _AckError(msgspec.Struct, frozen=True):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Ack(msgspec.Struct, frozen=True):
    """The server's response to a message."""

    error: _AckError | None = None
    seq: int = 0
    duplicate: bool = False


OnStored = Callable[[Event, bool], None]
"""Called in order with each event that is stored, and whether it was stored before."""


@dataclass(slots=True)
class _InFlight:
    event: Event
    size: int
    ack: _Ack | None = None


class JetStreamConnection:
    """A connection to the stream. After any failure it is closed, since messages may still be on their way."""

    def __init__(self, url: EventSinkUrl, client: Client) -> None:
        self._url = url
        self._client = client
        self._inbox = client.new_inbox()
        self._last_sequence = 0
        self.last_event_id: str | None = None
        """The id of the event in the stream's last message; ``None`` when there is none, or it is not ours."""
        self.error: Exception | None = None
        """The last error that the server reported outside a response, such as a missing permission."""
        self._last_sent_id = ""
        self._first = 0  # the number of the first message in flight
        self._in_flight: deque[_InFlight] = deque()
        self._bytes = 0
        self._progress = asyncio.Event()
        self._failure: OctoError | None = None
        self._on_stored: OnStored = lambda _event, _duplicate: None

    @property
    def is_empty(self) -> bool:
        """Return whether the stream has never had a message."""
        return self._last_sequence == 0

    async def open(self) -> None:
        """Find or create the stream, and read where it ends."""
        with map_exceptions(self._translate, Exception):
            await self._client.subscribe(  # pyright: ignore[reportUnknownMemberType]
                f"{self._inbox}.*", cb=self._receive
            )
            jetstream = self._client.jetstream(timeout=API_SECONDS)  # pyright: ignore[reportUnknownMemberType]
            await self._open_stream(jetstream)

    async def _open_stream(self, jetstream: JetStreamContext) -> None:
        from nats.js import errors  # noqa: PLC0415  an optional dependency

        name = self._url.stream
        try:
            info = await jetstream.stream_info(name)
        except errors.NotFoundError:
            info = await self._create_stream(jetstream)
        if not covers_events(info.config.subjects or (), self._url.subject):
            raise OctoError(
                f"The stream {name} of NATS does not store {self._url.subject}.>: add this subject to it.",
                code="unavailable",
            )
        self._last_sequence = info.state.last_seq
        if self._last_sequence:
            # The last message may have been deleted.
            with contextlib.suppress(errors.NotFoundError):
                message = await jetstream.get_msg(name, self._last_sequence)
                headers = cast("dict[str, str]", message.headers or {})  # pyright: ignore[reportUnknownMemberType]
                self.last_event_id = headers.get("Nats-Msg-Id")

    async def _create_stream(self, jetstream: JetStreamContext) -> StreamInfo:
        from nats.errors import Error  # noqa: PLC0415
        from nats.js.api import StreamConfig  # noqa: PLC0415

        name, subjects = self._url.stream, f"{self._url.subject}.>"
        config = StreamConfig(name, "Events of OctoLLM", [subjects], num_replicas=self._url.replicas)
        try:
            return await jetstream.add_stream(config)  # pyright: ignore[reportUnknownMemberType]
        except Error as error:
            raise OctoError(
                f"NATS has no stream {name}, and it cannot be created: {_describe(self.error or error)}. Create it:"
                f" nats stream add {name} --subjects '{subjects}' --storage file --defaults",
                code="unavailable",
            ) from error

    def check(self) -> None:
        """Raise ``unavailable`` when the connection has failed."""
        if self._failure is not None:
            raise self._failure

    async def publish(self, events: Sequence[Event], on_stored: OnStored) -> None:
        """Store events in order; return when all of them are stored. Raises ``unavailable``."""
        self._on_stored = on_stored
        for count, event in enumerate(events, 1):
            body, headers = self._encode(event)
            while self._in_flight and (
                len(self._in_flight) >= MAX_IN_FLIGHT or self._bytes + len(body) > MAX_IN_FLIGHT_BYTES
            ):
                await self._wait_for_progress()
            number = self._first + len(self._in_flight)
            headers |= {
                "Nats-Msg-Id": event.id,
                "Nats-Expected-Stream": self._url.stream,
                "Nats-Expected-Last-Sequence": str(self._last_sequence + len(self._in_flight)),
            }
            # Not of the first message: a server that was restarted may not know the id of its last one.
            if self._last_sent_id:
                headers["Nats-Expected-Last-Msg-Id"] = self._last_sent_id
            self._last_sent_id = event.id
            self._in_flight.append(_InFlight(event, len(body)))
            self._bytes += len(body)
            with map_exceptions(self._translate, Exception):
                await self._client.publish(
                    subject_of(event, self._url.subject), body, reply=f"{self._inbox}.{number}", headers=headers
                )
            if count % YIELD_INTERVAL == 0:
                await asyncio.sleep(0)
        while self._in_flight:
            await self._wait_for_progress()

    def _encode(self, event: Event) -> tuple[bytes, dict[str, str]]:
        if self._url.format == "octollm":
            return msgspec.json.encode(event), {}
        message = encode_cloudevent(event, "structured" if self._url.format == "cloudevents" else "binary")
        return message.body, message.headers

    async def _wait_for_progress(self) -> None:
        try:
            async with asyncio.timeout(ACK_SECONDS):
                await self._progress.wait()
        except TimeoutError as error:
            raise OctoError(f"NATS has acknowledged nothing for {ACK_SECONDS:g} s.", code="unavailable") from error
        self._progress.clear()
        self.check()

    async def _receive(self, message: Msg) -> None:
        """Take the acknowledgement of one message."""
        index = int(message.subject.rpartition(".")[2]) - self._first
        if not 0 <= index < len(self._in_flight):
            return
        if (message.headers or {}).get("Status") == _NO_RESPONDERS:
            detail = f"no stream stores {self._url.subject}.>, or JetStream is not enabled"
            self._in_flight[index].ack = _Ack(_AckError(description=detail))
        else:
            self._in_flight[index].ack = _decode_ack(message.data)
        self._settle()

    def _settle(self) -> None:
        """Report what is stored, in order; a message that was refused ends it."""
        while self._failure is None and self._in_flight and (ack := self._in_flight[0].ack) is not None:
            if ack.error is not None:
                self._failure = self._describe_refusal(self._in_flight[0].event, ack.error)
                break
            stored = self._in_flight.popleft()
            self._first += 1
            self._bytes -= stored.size
            # A repeat has the sequence that it was stored with.
            self._last_sequence = max(self._last_sequence, ack.seq)
            self._on_stored(stored.event, ack.duplicate)
        self._progress.set()

    def _describe_refusal(self, event: Event, error: _AckError) -> OctoError:
        if error.err_code in _WRONG_LAST:
            detail = (
                f"The stream {self._url.stream} of NATS has messages that this replica did not publish; its end is read"
                " again. Nothing else may publish into it."
            )
        else:
            text = _printable(error.description)
            detail = f"The stream {self._url.stream} of NATS refused the event {event.seq}: {text}."
        return OctoError(detail, code="unavailable")

    async def report_closed(self) -> None:
        """Fail what is on its way: the server closed the connection, or went away."""
        if self._failure is None:
            cause = "" if self.error is None else f": {_describe(self.error)}"
            self._failure = OctoError(f"The connection to NATS was closed{cause}.", code="unavailable")
        self._progress.set()

    async def report_error(self, error: Exception) -> None:
        """Keep an error that the server reported outside a response."""
        self.error = error

    def _translate(self, error: Exception) -> Exception | None:
        from nats.errors import Error  # noqa: PLC0415

        if isinstance(error, OctoError) or not isinstance(error, Error | OSError | TimeoutError):
            return None
        # A request without permission gets no response; the server says so in an error of the connection.
        return OctoError(f"NATS refused or failed: {_describe(self.error or error)}.", code="unavailable")


class JetStreamSink:
    """Opens connections to the stream that the setting ``OCTOLLM_EVENT_SINK`` names."""

    def __init__(self, url: EventSinkUrl, credentials: Path | None, tls: ssl.SSLContext) -> None:
        """Raise :class:`SettingError` without the package that is needed, or for a wrong file of credentials."""
        try:
            # An optional dependency.
            import nats  # noqa: F401, PLC0415  # pyright: ignore[reportUnusedImport]
        except ImportError as error:
            raise SettingError("OCTOLLM_EVENT_SINK needs nats-py; install it: pip install 'octollm[nats]'") from error
        if credentials is not None:
            with map_exceptions(
                lambda error: SettingError(f"OCTOLLM_EVENT_SINK_CREDENTIALS cannot be read: {error.strerror}."), OSError
            ):
                read_secret_file(credentials)
        self._url = url
        self._credentials = credentials
        self._tls = tls

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncGenerator[JetStreamConnection]:
        """Connect to one of the hosts and open the stream. Raises ``unavailable``."""
        failures: list[str] = []
        for host in self._url.hosts:
            client = _create_client(require_tls=self._url.tls)
            connection = JetStreamConnection(self._url, client)
            try:
                if (failure := await self._try_connect(host, client, connection)) is None:
                    await connection.open()
                    yield connection
                    return
                failures.append(f"{host}: {failure}")
            finally:
                await _close(client)
        raise OctoError(f"NATS cannot be reached ({'; '.join(failures)}).", code="unavailable")

    async def _try_connect(self, host: str, client: Client, connection: JetStreamConnection) -> str | None:
        """Connect to a host; return why that failed."""
        from nats.errors import Error  # noqa: PLC0415

        url = self._url
        is_token = url.user is not None and url.password is None
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await client.connect(
                    f"nats://{host}",
                    name="octollm event sink",
                    error_cb=connection.report_error,
                    closed_cb=connection.report_closed,
                    # The library's own reconnection would send what it had buffered after messages that were lost.
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=int(CONNECT_SECONDS),
                    ping_interval=10,
                    pending_size=2 * MAX_IN_FLIGHT_BYTES,
                    tls=self._tls,
                    user=None if is_token else url.user,
                    password=None if is_token else url.password,
                    token=url.user if is_token else None,
                    user_credentials=None if self._credentials is None else str(self._credentials),
                )
        except (Error, OSError, TimeoutError) as error:
            return _describe(connection.error or error)
        wanted = MAX_EVENT_BYTES + ENVELOPE_BYTES
        if client.max_payload < wanted:
            return f"max_payload is {client.max_payload}, and an event may have {wanted} bytes"
        return None


def _create_client(*, require_tls: bool) -> Client:
    from nats.aio.client import Client  # noqa: PLC0415
    from nats.errors import Error  # noqa: PLC0415

    class TlsClient(Client):
        """The library uses TLS when the server asks for it, so anybody in between could have the credentials sent."""

        def _connect_command(self) -> bytes:
            if not self._server_info.get("tls_required"):
                raise Error("the server does not use TLS")
            return super()._connect_command()

    return TlsClient() if require_tls else Client()


async def _close(client: Client) -> None:
    # A server that reads nothing must not hold up the next attempt.
    with contextlib.suppress(Exception):
        async with asyncio.timeout(CLOSE_SECONDS):
            await client.close()


def _decode_ack(data: bytes) -> _Ack:
    try:
        return msgspec.json.decode(data, type=_Ack)
    except msgspec.MsgspecError:
        return _Ack(_AckError(description="the response is not JetStream's"))


def _describe(error: Exception) -> str:
    from nats.js.errors import APIError, ServiceUnavailableError  # noqa: PLC0415

    if isinstance(error, ServiceUnavailableError) and not error.description:
        return "JetStream is not enabled"
    text = (error.description if isinstance(error, APIError) else str(error)) or type(error).__name__
    return _printable(text.removeprefix("nats: "))


def _printable(text: str) -> str:
    """Return the server's text for logs and terminals."""
    return "".join(char if char.isprintable() else "?" for char in text)[:MAX_ERROR_TEXT]


def subject_of(event: Event, prefix: str) -> str:
    """Return the subject of an event's message: ``<prefix>.<tenant>.<entity>.<action>``.

    The tenant has one token, so that the permissions of a NATS user can be bound to one tenant: its dots are ``%2E``.
    """
    return f"{prefix}.{event.tenant.replace('.', '%2E')}.{event.event_type}"


def covers_events(patterns: Sequence[str], prefix: str) -> bool:
    """Return whether one of a stream's subjects takes each event of the catalogue."""
    subjects = [f"{prefix}.tenant.{name}".split(".") for name in EVENT_CATALOGUE]
    return all(any(_matches(pattern.split("."), subject) for pattern in patterns) for subject in subjects)


def _matches(pattern: Sequence[str], subject: Sequence[str]) -> bool:
    if pattern[-1] == ">":
        pattern, subject = pattern[:-1], subject[: len(pattern) - 1] if len(subject) >= len(pattern) else ()
    return len(pattern) == len(subject) and all(
        each in ("*", token) for each, token in zip(pattern, subject, strict=True)
    )
