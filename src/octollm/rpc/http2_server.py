"""The HTTP/2 server protocol of a connection (RFC 9113): streams, flow control and bounds.

Framing and HPACK are those of h2.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator, Iterable, Mapping
from typing import Any, cast
from urllib.parse import unquote

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    RemoteSettingsChanged,
    RequestReceived,
    StreamEnded,
    StreamReset,
    WindowUpdated,
)
from h2.exceptions import H2Error
from h2.settings import SettingCodes, Settings
from hyperframe.frame import GoAwayFrame
from starlette.types import ASGIApp, Scope

from octollm.errors import OctoError
from octollm.rpc.asgi_extension import EXTENSION
from octollm.rpc.http1_exchange import MAX_DISCARDED_BYTES, problem_parts
from octollm.rpc.http1_parser import MAX_HEADER_BYTES, MAX_URL_BYTES, Headers
from octollm.rpc.http1_server import HEADER_SECONDS, MAX_DISCARD_SECONDS, ServerConfig, ServerState, connection_scope
from octollm.rpc.http2_stream import Http2Stream

MAX_STREAMS = 128
STREAM_WINDOW = 256 * 1024
CONNECTION_WINDOW = 1024 * 1024
"""Bytes of bodies that a peer may send before they are read, of one request and of all."""
MAX_RESETS = 500
"""Requests that a peer may give up beyond those that were answered before it counts as an attack (CVE-2023-44487)."""
_DEFAULT_WINDOW = 65_535
_SETTINGS = {
    SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
    SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
    # Twice what is allowed, so that headers which are too large get their answer.
    SettingCodes.MAX_HEADER_LIST_SIZE: 2 * MAX_HEADER_BYTES,
}


class Http2ServerProtocol(asyncio.Protocol):
    """One connection. It is closed when 10 s bring no first request, and when nothing is asked for 75 s."""

    def __init__(
        self,
        config: ServerConfig,
        server_state: ServerState,
        app_state: Mapping[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._app = cast("ASGIApp", config.loaded_app)
        self._idle_seconds = config.timeout_keep_alive
        self._state = server_state
        self._app_state = app_state
        self._loop = _loop or asyncio.get_running_loop()
        self._h2 = H2Connection(H2Configuration(client_side=False, header_encoding=None))
        self._h2.local_settings = Settings(client=False, initial_values=_SETTINGS)
        self._streams: dict[int, Http2Stream] = {}
        self._transport: asyncio.Transport | None = None
        self._discarding: dict[int, int] = {}
        self._window_open = asyncio.Event()
        self._writable = True
        self._is_shutting_down = False
        self._resets = 0
        self._timer: asyncio.TimerHandle | None = None
        self._scope: dict[str, Any] = {}

    # What the transport says.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Tell the peer our bounds."""
        self._transport = cast("asyncio.Transport", transport)
        self._state.connections.add(self)
        self._scope = {**connection_scope(self._transport), "http_version": "2"}
        self._h2.initiate_connection()
        # Settings change the window of streams only (RFC 9113 section 6.9.2): that of the connection is raised here.
        self._h2.increment_flow_control_window(CONNECTION_WINDOW - _DEFAULT_WINDOW)
        self._flush()
        self._start_timer(HEADER_SECONDS)

    def data_received(self, data: bytes) -> None:
        """Take frames; a peer that breaks the protocol is told so and left."""
        try:
            for event in self._h2.receive_data(data):
                self._handle_event(event)
        except H2Error:
            self._flush()
            self._close()
            return
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever works for this peer."""
        del exc
        self._state.connections.discard(self)
        self._stop_timer()
        self._discarding.clear()
        streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            stream.disconnect()
        self._wake()

    def eof_received(self) -> None:
        """Let the transport close."""

    def pause_writing(self) -> None:
        """Take no more from a peer that takes nothing."""
        self._writable = False
        # Frames such as PING need an answer each: read on, and the answers would pile up here.
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Go on."""
        self._writable = True
        if self._transport is not None:
            self._transport.resume_reading()
        self._wake()

    def shutdown(self) -> None:
        """Take no further request (RFC 9113 section 6.8); close once those under way are answered."""
        if self._transport is None or self._transport.is_closing():
            return
        self._is_shutting_down = True
        # The library would send nothing more after a GOAWAY of its own.
        frame = GoAwayFrame(0, last_stream_id=self._h2.highest_inbound_stream_id, error_code=ErrorCodes.NO_ERROR)
        self._transport.write(frame.serialize())
        if not self._streams:
            self._close()

    # What frames say.

    def _handle_event(self, event: Event) -> None:
        match event:
            case RequestReceived():
                self._on_request(event.stream_id, cast("Headers", event.headers))
            case DataReceived():
                self._on_data(event)
            case StreamEnded():
                self._discarding.pop(event.stream_id, None)
                if (stream := self._streams.get(event.stream_id)) is not None:
                    stream.end()
            case StreamReset():
                self._on_reset(event.stream_id)
            case WindowUpdated() | RemoteSettingsChanged():
                self._wake()
            case ConnectionTerminated():
                self.shutdown()
            case _:
                pass

    def _on_data(self, event: DataReceived) -> None:
        stream = self._streams.get(event.stream_id)
        size = event.flow_controlled_length or 0
        if stream is not None:
            stream.feed(event.data or b"", size)
            return
        left = self._discarding.get(event.stream_id, 0) - size
        if left > 0:
            self._discarding[event.stream_id] = left
        # The bytes are dropped, but they count against the window that all requests of the connection share.
        self._h2.acknowledge_received_data(size, event.stream_id)
        if left <= 0:
            self._reset_discarded(event.stream_id)

    def _on_reset(self, stream_id: int) -> None:
        self._resets += 1
        if self._resets > MAX_RESETS:
            self._h2.close_connection(ErrorCodes.ENHANCE_YOUR_CALM)
            self._flush()
            self._close()
        self._drop_stream(stream_id)

    def _on_request(self, stream_id: int, given: Headers) -> None:
        pseudo = {name: value for name, value in given if name.startswith(b":")}
        method = pseudo.get(b":method", b"").decode("latin-1")
        if self._is_shutting_down:
            # Surely not begun: the peer may send it elsewhere.
            self._h2.reset_stream(stream_id, ErrorCodes.REFUSED_STREAM)
            return
        stream = self._streams[stream_id] = Http2Stream(self, stream_id, method)
        self._stop_timer()
        path, _, query = pseudo.get(b":path", b"").partition(b"?")
        if sum(len(name) + len(value) + 4 for name, value in given) > MAX_HEADER_BYTES:
            self._refuse(stream, "header_too_large", f"The headers may have at most {MAX_HEADER_BYTES} bytes.")
            return
        if len(path) + len(query) > MAX_URL_BYTES:
            self._refuse(stream, "url_too_long", f"The URL may have at most {MAX_URL_BYTES} bytes.")
            return
        raw = path.decode("latin-1")
        scope: Scope = {
            **self._scope,
            "method": method,
            "path": unquote(raw) if "%" in raw else raw,
            "raw_path": path,
            "query_string": query,
            "headers": _headers(given, pseudo.get(b":authority")),
            "state": dict(self._app_state),
            "extensions": {EXTENSION: stream},
        }
        task = self._loop.create_task(stream.run(self._app, scope))
        self._state.total_requests += 1
        self._state.tasks.add(task)
        task.add_done_callback(self._state.tasks.discard)

    def _refuse(self, stream: Http2Stream, code: str, detail: str) -> None:
        stream.respond(*problem_parts(OctoError(detail, code=code)))

    # What streams ask.

    def send_head(self, stream: Http2Stream, headers: Headers, *, last: bool) -> None:
        """Send the head of an answer; ``last`` says that no body follows."""
        with self._sending(stream):
            self._h2.send_headers(stream.id, [headers[0], *self._state.default_headers, *headers[1:]], end_stream=last)
            if last:
                self._finish_stream(stream)

    def send_window(self, stream: Http2Stream) -> int:
        """Return how many bytes of a body the peer takes now, in one frame."""
        if stream.disconnected or not self._writable:
            return 0
        try:
            window = self._h2.local_flow_control_window(stream.id)
        except H2Error:
            return 0
        return max(0, min(window, self._h2.max_outbound_frame_size))

    def send_data(self, stream: Http2Stream, body: bytes, *, last: bool) -> None:
        """Send bytes for which there is room."""
        with self._sending(stream):
            self._h2.send_data(stream.id, body, end_stream=last)
            if last:
                self._finish_stream(stream)

    async def wait_for_window(self) -> None:
        """Wait until there may be more room, or the stream is over."""
        self._window_open.clear()
        await self._window_open.wait()

    def acknowledge(self, stream: Http2Stream, size: int) -> None:
        """Let the peer send as many bytes of a body again."""
        with self._sending(stream):
            self._h2.acknowledge_received_data(size, stream.id)

    def abort(self, stream: Http2Stream) -> None:
        """End a request whose answer cannot be whole."""
        with contextlib.suppress(H2Error):
            self._h2.reset_stream(stream.id, ErrorCodes.INTERNAL_ERROR)
        self._drop_stream(stream.id)

    @contextlib.contextmanager
    def _sending(self, stream: Http2Stream) -> Generator[None]:
        """Do something for a stream, and send it; the peer may have ended the stream meanwhile."""
        try:
            yield
        except H2Error:
            self.abort(stream)
        self._flush()

    # Inside.

    def _finish_stream(self, stream: Http2Stream) -> None:
        """Forget a stream that is answered."""
        self._streams.pop(stream.id, None)
        self._resets = max(0, self._resets - 1)
        if not stream.ended:
            self._discarding[stream.id] = MAX_DISCARDED_BYTES
            self._loop.call_later(MAX_DISCARD_SECONDS, self._reset_discarded, stream.id)
        self._start_idle_timer()

    def _reset_discarded(self, stream_id: int) -> None:
        """Have the peer stop sending what nobody wants (RFC 9113 section 8.1)."""
        if self._discarding.pop(stream_id, None) is not None:
            with contextlib.suppress(H2Error):
                self._h2.reset_stream(stream_id, ErrorCodes.NO_ERROR)
            self._flush()

    def _drop_stream(self, stream_id: int) -> None:
        """Forget a stream that will have no answer."""
        self._discarding.pop(stream_id, None)
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            stream.disconnect()
        self._wake()
        self._start_idle_timer()

    def _start_idle_timer(self) -> None:
        """Wait for the next request, for a while, when none is under way."""
        if self._streams:
            return
        if self._is_shutting_down:
            self._flush()
            self._close()
        else:
            self._start_timer(self._idle_seconds)

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self._loop.call_later(seconds, self.shutdown)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wake(self) -> None:
        self._window_open.set()

    def _flush(self) -> None:
        data = self._h2.data_to_send()
        if data and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def _close(self) -> None:
        self._stop_timer()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.close()


def _headers(given: Iterable[tuple[bytes, bytes]], authority: bytes | None) -> Headers:
    """Return headers as HTTP/1.1 has them: a host, and the cookies in one (RFC 9113 section 8.2.3)."""
    headers: Headers = []
    cookies: list[bytes] = []
    for name, value in given:
        if name == b"cookie":
            cookies.append(value)
        elif name.startswith(b":") or (name == b"host" and authority is not None):
            continue
        else:
            headers.append((name, value))
    if authority is not None:
        headers.insert(0, (b"host", authority))
    if cookies:
        headers.append((b"cookie", b"; ".join(cookies)))
    return headers
