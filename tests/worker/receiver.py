"""A webhook receiver on a raw socket: it keeps the bytes as they came and answers what the test says."""

import socket
import ssl
import threading
import time
from dataclasses import dataclass, field


@dataclass
class Received:
    """One request as it came off the wire."""

    line: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Reply:
    """What to answer, and how slowly."""

    status: int = 204
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drip: float = 0.0  # seconds between bytes of an endless header: a slow-loris receiver


class RawReceiver:
    """Answers each request with the next of `replies` (the last one for ever after)."""

    def __init__(self, *replies: Reply, tls: ssl.SSLContext | None = None) -> None:
        self.replies = list(replies) or [Reply()]
        self.received: list[Received] = []
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> "RawReceiver":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def wait(self, count: int, seconds: float = 10.0) -> list[Received]:
        """The first `count` requests."""
        end = time.monotonic() + seconds
        while len(self.received) < count and time.monotonic() < end:
            time.sleep(0.02)
        assert len(self.received) >= count, f"{len(self.received)} of {count} requests came in {seconds} s"
        return self.received[:count]

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._handle, args=(connection,), daemon=True).start()

    def _handle(self, plain: socket.socket) -> None:
        try:
            connection = self._tls.wrap_socket(plain, server_side=True) if self._tls else plain
            with connection:
                self._answer(connection)
        except OSError:
            plain.close()

    def _answer(self, connection: socket.socket) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            data += _some(connection)
        head, _, body = data.partition(b"\r\n\r\n")
        line, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (one.partition(":") for one in lines)}
        while len(body) < int(headers.get("content-length", "0")):
            body += _some(connection)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        self.received.append(Received(line, headers, body))
        time.sleep(reply.delay)
        fields = "".join(f"{name}: {value}\r\n" for name, value in reply.headers.items())
        connection.sendall(f"HTTP/1.1 {reply.status} X\r\n".encode())
        while reply.drip:
            connection.sendall(b"x")
            time.sleep(reply.drip)
        connection.sendall(f"content-length: 0\r\n{fields}\r\n".encode())


def _some(connection: socket.socket) -> bytes:
    """Bytes that came. Raises ConnectionError once there will be none: nobody shall ask again and again."""
    data = connection.recv(65_536)
    if not data:
        raise ConnectionError("the client left")
    return data
