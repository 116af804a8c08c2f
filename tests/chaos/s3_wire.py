"""Between everybody and S3: one HTTP request a connection, recorded, and failed where a fault says so."""

import asyncio
import contextlib
from dataclasses import dataclass, field

from tests.chaos.history import History

HANG_SECONDS = 4.0  # a held request; then the connection ends without an answer
UNAVAILABLE = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@dataclass
class S3Fault:
    """Hits the next upload: "503", "hang", or "partial" (half of the body reaches the server)."""

    kind: str
    hit: asyncio.Event = field(default_factory=asyncio.Event)
    key: str = ""


class S3Wire:
    """The way to S3."""

    def __init__(self, target: tuple[str, int], history: History) -> None:
        self._target, self._history = target, history
        self.faults: list[S3Fault] = []
        self.up = True
        self.on_put: asyncio.Event = asyncio.Event()  # set at each upload, for kills at that edge
        self.port = 0
        self._serving: set[asyncio.Task[None] | None] = set()  # asyncio itself drops them with their client

    async def start(self) -> None:
        """Listen on a port of loopback."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._serving.add(task)
        try:
            if self.up:
                await self._handle(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError, ValueError):
            pass
        finally:
            with contextlib.suppress(OSError):
                if writer.can_write_eof():
                    writer.write_eof()
            writer.close()
            self._serving.discard(task)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *fields = head[:-4].split("\r\n")
        method, path, _ = line.split(" ", 2)
        names = {name.lower(): value.strip() for name, _, value in (one.partition(":") for one in fields)}
        length = int(names.get("content-length", "0"))
        if "expect" in names:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(length)
        kept = [one for one in fields if one.partition(":")[0].lower() not in ("expect", "connection")]
        request = "\r\n".join([line, *kept, "Connection: close", "", ""]).encode("latin-1") + body
        key = path.partition("?")[0]
        upload = method == "PUT" and length > 0 and "/jobs/" in key
        if upload:
            self.on_put.set()
            if self.faults and await self._fail(self.faults.pop(0), key, request, writer, length):
                return
        answer = await self._ask(request, writer)
        if upload:
            self._history.add("put", key=key, st=int(answer.split(b" ", 2)[1]) if answer else None)

    async def _ask(self, request: bytes, writer: asyncio.StreamWriter) -> bytes:
        """Forward, and pass the answer on as it comes; its head."""
        upstream_reader, upstream = await asyncio.open_connection(*self._target)
        try:
            upstream.write(request)
            await upstream.drain()
            first = b""
            while data := await upstream_reader.read(1 << 16):
                first = first or data
                writer.write(data)
                await writer.drain()
            return first
        finally:
            upstream.close()

    async def _fail(
        self, fault: S3Fault, key: str, request: bytes, writer: asyncio.StreamWriter, length: int
    ) -> bool:
        """Whether the request ends here."""
        fault.key = key
        fault.hit.set()
        self._history.add("put", key=key, st=fault.kind)
        if fault.kind == "503":
            writer.write(UNAVAILABLE)
            await writer.drain()
        elif fault.kind == "hang":
            await asyncio.sleep(HANG_SECONDS)
            writer.transport.abort()
        else:
            _, upstream = await asyncio.open_connection(*self._target)
            upstream.write(request[: len(request) - length // 2])
            await upstream.drain()
            await asyncio.sleep(0.05)
            upstream.transport.abort()
            writer.transport.abort()
        return True
