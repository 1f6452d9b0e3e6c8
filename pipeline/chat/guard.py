"""What reaches the page: requests for this machine by its own name, bodies of a bounded size, uploads that begin as pictures do.

An ASGI middleware in front of Gradio, so that what is refused is never stored.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pipeline.chat.paths import SUFFIXES

MAX_UPLOAD = 32 << 20  # bytes of a request with pictures
MAX_BODY = 1 << 20  # of any other: words and settings
HOSTS = ("127.0.0.1", "localhost")
TYPES = ", ".join(suffix[1:].upper() for suffix in SUFFIXES)
_SIGNS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"RIFF")  # of FORMATS

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """Refuses with 421 for another Host (a page elsewhere whose name was made to point here), 413 for size, 415 for type."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1").rsplit(":", 1)[0]
        if host not in HOSTS:
            return await _refuse(send, 421, f"this page is at {HOSTS[0]}")
        if scope["type"] == "websocket" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self._app(scope, receive, send)
        uploads = scope["path"].rstrip("/").endswith("/upload")
        limit = MAX_UPLOAD if uploads else MAX_BODY
        body = await _read(receive, limit)
        if body is None:
            what = "pictures may have" if uploads else "a question may have"
            return await _refuse(send, 413, f"too large: {what} {limit >> 20} MB")
        if uploads and not are_pictures(body, headers.get(b"content-type", b"")):
            return await _refuse(send, 415, f"not a picture: {TYPES}")
        return await self._app(scope, _again(body, receive), send)


def are_pictures(body: bytes, content_type: bytes) -> bool:
    """Whether every file in a form (multipart) begins as a picture of a known format does."""
    _, found, boundary = content_type.partition(b"boundary=")
    if not found:
        return False
    parts = body.split(b"--" + boundary.split(b";")[0].strip().strip(b'"'))
    files = [data for head, _, data in (part.partition(b"\r\n\r\n") for part in parts) if b"filename" in head.lower()]
    return bool(files) and all(data.startswith(_SIGNS) for data in files)


async def _read(receive: Receive, limit: int) -> bytes | None:
    """The whole body; None once it is longer than `limit`, whatever its headers promised."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > limit:
            return None
        if message["type"] != "http.request" or not message.get("more_body"):
            return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once more, then what comes next: the end of the connection."""
    given = False

    async def next_message() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message


async def _refuse(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
