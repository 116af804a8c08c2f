"""Fetch an image that a client named by URL, then decode it: alone in the process that `api.sanitize` starts.

Usage: python -I -m api.image_fetch. stdin: one line of JSON (`Order`), then, once "fetched" was answered, an
empty line that says "decode now". stdout: "fetched", then what `image_process` writes. Exits with 2 and one
line on stderr when the image is refused. Address check, TLS, HTTP and pixels all happen here, away from
settings and keys; the connection goes to exactly the address that was checked; redirects are refused.
"""

import http.client
import json
import signal
import socket
import ssl
import sys
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn
from urllib.parse import SplitResult, urlsplit

from api.image_process import RefusedError, limit, write_image
from jobs.addresses import Address, CallbackRefused, check_callback_url

SECONDS = 15.0  # the whole exchange, from the name's lookup to the last byte
ADDRESSES_TRIED = 3  # of a name's, when one refuses the connection
CHUNK = 65_536


@dataclass(frozen=True)
class Order:
    """What to fetch, and within which limits."""

    url: str
    max_bytes: int
    max_pixels: int
    allow_loopback: bool = False
    allowed_hosts: tuple[str, ...] = ()


def fetch(order: Order) -> bytes:
    """The bytes behind the URL. Raises RefusedError, which says why not."""
    try:
        addresses = check_callback_url(
            order.url, allow_loopback=order.allow_loopback, allowed_hosts=frozenset(order.allowed_hosts)
        )
    except CallbackRefused as error:
        raise RefusedError(str(error)) from None
    parts = urlsplit(order.url)
    last: Exception | None = None
    for address in addresses[:ADDRESSES_TRIED]:
        try:
            return _get(_connect(parts, address), parts, order.max_bytes)
        except (OSError, http.client.HTTPException) as error:
            last = error
    raise RefusedError(f"it cannot be fetched ({type(last).__name__})") from None


def _connect(parts: SplitResult, address: Address) -> http.client.HTTPConnection:
    """A connection to `address` that speaks to, and verifies, the URL's host. Raises OSError."""
    host, tls = (parts.hostname or "").removesuffix("."), parts.scheme == "https"
    connection = http.client.HTTPConnection(host, parts.port or (443 if tls else 80), timeout=SECONDS)
    plain = socket.create_connection((str(address), connection.port), timeout=SECONDS)
    connection.sock = tls_context().wrap_socket(plain, server_hostname=host) if tls else plain
    return connection


def _get(connection: http.client.HTTPConnection, parts: SplitResult, most: int) -> bytes:
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = {
        "Host": parts.netloc,
        "Accept": "image/png, image/jpeg, image/webp",
        "Accept-Encoding": "identity",
        "User-Agent": "reelserve",
    }
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    if 300 <= response.status < 400:
        raise RefusedError(f"its address answered {response.status}; redirects are not followed")
    if response.status != 200:
        raise RefusedError(f"its address answered {response.status}")
    announced = response.headers.get("Content-Length", "")
    if announced.isdigit() and int(announced) > most:
        raise RefusedError(f"it has {int(announced)} bytes; at most {most} are accepted")
    data = bytearray()
    while chunk := response.read(CHUNK):
        data += chunk
        if len(data) > most:
            raise RefusedError(f"it has more than {most} bytes")
    return bytes(data)


def tls_context() -> ssl.SSLContext:
    """Verifies like the webhook sender's: certifi's roots, since slim images have none of their own."""
    import certifi

    return ssl.create_default_context(cafile=certifi.where())


def _too_long(number: int, frame: FrameType | None) -> NoReturn:
    raise RefusedError(f"it did not arrive within {SECONDS:g} s")


def main() -> int:
    """Fetch, wait for the word to decode, write."""
    limit()
    order = Order(**json.loads(sys.stdin.buffer.readline()))
    signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        data = fetch(order)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(b"fetched\n")
        sys.stdout.buffer.flush()
        if not sys.stdin.buffer.readline():
            return 1  # nobody waits for the picture any more
        write_image(data, order.max_pixels)
    except RefusedError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
