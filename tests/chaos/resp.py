"""Enough of the Redis protocol (RESP 2 and 3) to follow a connection: whole messages, raw and parsed."""

from asyncio import StreamReader
from typing import Any

NESTED = {b"*": 1, b"~": 1, b">": 1, b"%": 2, b"|": 2}


async def read_message(reader: StreamReader) -> tuple[bytes, Any]:
    """(raw bytes, value) of one message: bytes, list or None. Raises IncompleteReadError at the end."""
    line = await reader.readuntil(b"\r\n")
    kind, rest = line[:1], line[1:-2]
    if kind in (b"$", b"=", b"!"):
        length = int(rest)
        if length < 0:
            return line, None
        body = await reader.readexactly(length + 2)
        return line + body, body[:-2]
    if kind in NESTED:
        count = int(rest) * NESTED[kind]
        if count < 0:
            return line, None
        raws, values = [line], []
        for _ in range(count):
            raw, value = await read_message(reader)
            raws.append(raw)
            values.append(value)
        return b"".join(raws), values
    return line, rest
