"""Between one party and Redis: follows every script call, records it, and fails where a trap says so."""

import asyncio
import contextlib
import hashlib
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from jobs.scripts import FOLDER, source
from tests.chaos.history import History
from tests.chaos.resp import read_message

EDGES = ("before", "applied", "after")  # the call not yet at Redis; done but unheard of; heard of
# Where a script's arguments (after the settings) name the job and the token.
WITH_TOKEN = ("heartbeat", "finish", "fail", "give_back", "cancel_running")
WITH_JOB = (*WITH_TOKEN, "cancel", "expire", "lose", "purge", "delete", "replay", "reject")


@dataclass
class Call:
    """One script call on its way."""

    who: str
    script: str
    args: list[str]
    t0: float = field(default_factory=time.time)
    reply: Any = None

    @property
    def result(self) -> str:
        """The reply's first word."""
        first = self.reply[0] if isinstance(self.reply, list) and self.reply else self.reply
        return first.decode(errors="replace") if isinstance(first, bytes) else str(first)

    @property
    def job(self) -> str | None:
        """The job it is about."""
        if self.script == "claim":
            return str(json.loads(self.reply[1])["id"]) if self.result == "ok" else None
        if self.script == "submit":
            return str(json.loads(self.args[0])["id"])
        return self.args[0] if self.script in WITH_JOB else None

    @property
    def token(self) -> int | None:
        """The fencing token that it carries, or that it was given."""
        if self.script == "claim":
            return int(json.loads(self.reply[1])["token"]) if self.result == "ok" else None
        return int(self.args[1]) if self.script in WITH_TOKEN else None


Action = Callable[[Call], Awaitable[str | None]]  # "drop": cut the connection instead of passing on


@dataclass
class Trap:
    """Springs once: at `edge` of the first call that `wanted` accepts."""

    wanted: Callable[[Call], bool]
    edge: str
    action: Action
    sprung: asyncio.Event = field(default_factory=asyncio.Event)


class RedisWire:
    """One party's way to Redis."""

    def __init__(self, who: str, target: tuple[str, int], history: History) -> None:
        self.who, self._target, self._history = who, target, history
        self.up = True
        self.traps: list[Trap] = []
        self.port = 0
        self.asked_at = 0.0  # monotonic, of the latest claim: a node that asks is up
        self._writers: set[asyncio.StreamWriter] = set()
        self._scripts: dict[str, str] = {}
        for path in FOLDER.glob("[a-z]*.lua"):
            self._scripts[hashlib.sha1(source(path.stem).encode()).hexdigest()] = path.stem

    async def start(self) -> None:
        """Listen on a port of loopback."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 24)
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Refuse everybody until `up` is set again."""
        self.up = False
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # the run's end
            await self._carry(reader, writer)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.up:
            writer.transport.abort()
            return
        try:
            upstream = await asyncio.open_connection(*self._target, limit=1 << 24)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, upstream[1]}
        pending: deque[Call | None] = deque()
        ways = [
            asyncio.create_task(self._forth(reader, upstream[1], pending)),
            asyncio.create_task(self._back(upstream[0], writer, pending)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            for one in (writer, upstream[1]):
                one.transport.abort()
                self._writers.discard(one)
            await asyncio.gather(*ways, return_exceptions=True)
            for call in pending:
                if call is not None:
                    self._record(call, "cut")

    async def _forth(
        self, reader: asyncio.StreamReader, out: asyncio.StreamWriter, pending: deque[Call | None]
    ) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                raw, command = await read_message(reader)
                call = self._call_of(command)
                if call is not None and await self._spring(call, "before") == "drop":
                    return
                pending.append(call)
                out.write(raw)
                await out.drain()

    async def _back(
        self, reader: asyncio.StreamReader, out: asyncio.StreamWriter, pending: deque[Call | None]
    ) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                raw, reply = await read_message(reader)
                call = None
                if raw[:1] != b">" and pending:
                    call = pending[0]
                    if call is not None:
                        call.reply = reply
                        if await self._spring(call, "applied") == "drop":
                            return  # it stays pending, so it is recorded as cut
                    pending.popleft()
                out.write(raw)
                await out.drain()
                if call is not None:
                    self._record(call, call.result)
                    if await self._spring(call, "after") == "drop":
                        return

    def _call_of(self, command: Any) -> Call | None:
        if not isinstance(command, list) or len(command) < 4 or command[0].upper() != b"EVALSHA":
            return None
        script = self._scripts.get(command[1].decode())
        if script is None:
            return None
        if script == "claim":
            self.asked_at = time.monotonic()
        return Call(self.who, script, [arg.decode(errors="replace") for arg in command[4:]])

    async def _spring(self, call: Call, edge: str) -> str | None:
        for trap in self.traps:
            if trap.edge == edge and not trap.sprung.is_set() and trap.wanted(call):
                trap.sprung.set()
                return await trap.action(call)
        return None

    def _record(self, call: Call, result: str) -> None:
        if call.script in ("position", "stats", "authenticate", "rise", "uploads_due"):
            return
        if result == "none" and call.script in ("claim", "outbox_take", "lose", "expire", "purge"):
            return
        self._history.add(
            "call", t0=call.t0, who=call.who, s=call.script, job=call.job, token=call.token, r=result
        )
