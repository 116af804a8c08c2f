"""A small HTTP/1.1 load generator: keep-alive connections, one request at a time on each, latencies of all.

A general client such as httpx takes longer per request than the servers that are measured.
"""

import asyncio
import time


async def load(
    port: int, path: str, bodies: list[bytes], headers: str, clients: int
) -> tuple[list[float], float]:
    """POST every body over `clients` connections: (milliseconds of each, seconds in all).

    Raises RuntimeError on an answer other than 2xx.
    """
    waiting = iter(bodies)
    taken: list[float] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for body in waiting:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{headers}"
            began = time.perf_counter()
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            fields = answer.decode().lower()
            length = int(fields.split("content-length:")[1].split("\r\n")[0])
            text = await reader.readexactly(length)
            taken.append((time.perf_counter() - began) * 1000)
            if answer.split(b" ")[1][:1] != b"2":
                raise RuntimeError(f"{answer.decode()}{text.decode()}")
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return taken, time.perf_counter() - began
