"""A webhook receiver that misbehaves on demand and writes down everything that it gets."""

import asyncio
import contextlib
import hashlib
import json
from dataclasses import dataclass, field

from standardwebhooks import Webhook, WebhookVerificationError

from tests.chaos.history import History

HANG_SECONDS = 4.0  # longer than the senders' timeout in these runs
REASONS = {204: "No Content", 410: "Gone", 429: "Too Many Requests", 500: "Internal Server Error"}


@dataclass
class HookFault:
    """Hits the next delivery: "hang", "500" or "429"."""

    kind: str
    hit: asyncio.Event = field(default_factory=asyncio.Event)
    job: str = ""


class Receiver:
    """Answers 204; 410 below ``/gone/``."""

    def __init__(self, history: History) -> None:
        self._history = history
        self.secret = ""
        self.faults: list[HookFault] = []
        self.gone: dict[str, asyncio.Event] = {}  # by path: set at its first delivery
        self.reclaimed: set[str] = set()  # nodes whose cloud takes them back: told once
        self.port = 0

    async def start(self) -> None:
        """Listen on a port of loopback."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def url(self, path: str = "/hook") -> str:
        """A callback URL."""
        return f"http://127.0.0.1:{self.port}{path}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError, ValueError):
            await self._handle(reader, writer)
        writer.close()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *fields = head[:-4].split("\r\n")
        path = line.split(" ")[1]
        if path.startswith("/metadata/"):
            await self._tell_notice(path.split("/")[2], writer)
            return
        names = {name.lower(): value.strip() for name, _, value in (one.partition(":") for one in fields)}
        body = await reader.readexactly(int(names["content-length"]))
        status = 410 if path.startswith("/gone/") else 204
        fault = None
        if status == 204 and self.faults:
            fault = self.faults.pop(0)
            status = 0 if fault.kind == "hang" else int(fault.kind)
        elif path in self.gone:
            self.gone[path].set()
        parsed = json.loads(body)
        job = parsed["data"]["id"]
        if fault is not None:
            fault.job = job
            fault.hit.set()
        self._history.add(
            "hook",
            id=names["webhook-id"],
            job=job,
            type=parsed["type"],
            version=parsed["data"].get("version"),
            path=path,
            st=status,
            sha=hashlib.sha256(body).hexdigest()[:16],
            ok=self._verified(body, names),
        )
        if status == 0:
            await asyncio.sleep(HANG_SECONDS)
            return
        retry = "Retry-After: 1\r\n" if status == 429 else ""
        rest = f"{retry}Content-Length: 0\r\nConnection: close\r\n\r\n"
        writer.write(f"HTTP/1.1 {status} {REASONS[status]}\r\n{rest}".encode())
        await writer.drain()

    async def _tell_notice(self, who: str, writer: asyncio.StreamWriter) -> None:
        """As GCP's metadata service answers a node that asks for its preemption."""
        word = "TRUE" if who in self.reclaimed else "FALSE"
        self.reclaimed.discard(who)
        writer.write(
            f"HTTP/1.1 200 OK\r\nContent-Length: {len(word)}\r\nConnection: close\r\n\r\n{word}".encode()
        )
        await writer.drain()

    def _verified(self, body: bytes, names: dict[str, str]) -> bool:
        try:
            Webhook(self.secret).verify(body, names)
        except WebhookVerificationError:
            return False
        return True
