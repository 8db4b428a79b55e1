"""Fuzz the HTTP/1.1 parser, guided by coverage: however its bytes are cut it reads the same, and h11 reads alike.

The exceptions have names in ``http1_kit``. Run it with ``make fuzz``; it needs the extra ``fuzz``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

with atheris.instrument_imports(include=["octollm.rpc.http1_parser", "h11"]):
    from http1_kit import check_alike, read_ours

PARTS = [
    b"GET / HTTP/1.1\r\nHost: a\r\n", b"POST /p HTTP/1.1\r\nHost: a\r\n", b"PUT /p?q HTTP/1.0\r\n", b"\r\n",
    b"\r\n\r\n", b"\n", b"Host: b\r\n", b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"X: y \t\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"Connection: upgrade\r\nUpgrade: websocket\r\n",
    b"Expect: 100-continue\r\n", b"hello", b"5\r\nhello\r\n", b"5;x=y \r\nhello\r\n", b"0\r\n", b"Trailer: x\r\n",
    b"GET http://a/b HTTP/1.1\r\n", b"OPTIONS * HTTP/1.1\r\n",
]  # fmt: skip


def test_one(data: bytes) -> None:
    """Put a connection together from parts of requests and loose bytes, and read it."""
    fuzz = atheris.FuzzedDataProvider(data)
    sent = b""
    while fuzz.remaining_bytes() and len(sent) < 2000:
        if fuzz.ConsumeIntInRange(0, 3):
            sent += fuzz.PickValueInList(PARTS)
        else:
            sent += fuzz.ConsumeBytes(fuzz.ConsumeIntInRange(1, 4))
    check_alike(sent)
    cut = fuzz.ConsumeIntInRange(0, len(sent))
    whole = read_ours([sent])
    assert read_ours([piece for piece in (sent[:cut], sent[cut:]) if piece]) == whole
    assert read_ours([sent[at : at + 1] for at in range(len(sent))]) == whole


atheris.Setup(sys.argv, test_one)
atheris.Fuzz()
