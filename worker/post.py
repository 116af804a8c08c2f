"""One HTTP POST to an address on the internet that a client named: checked, pinned, bounded in every way."""

import asyncio
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from urllib.parse import urlsplit, urlunsplit

import httpx

from jobs.addresses import Address, CallbackRefused, check_callback_url

TIMEOUT_SECONDS = 15.0  # of a whole exchange, name lookup excepted, unless the caller says otherwise
ADDRESSES_TRIED = 3  # of a name's, when one refuses the connection


@dataclass(frozen=True)
class Answer:
    """What came of a POST. status None: nothing came, and `error` says why."""

    status: int | None = None
    error: str = ""
    retry_after: float | None = None  # seconds, as the receiver asked


def post(
    url: str,
    body: bytes,
    headers: dict[str, str],
    *,
    allow_loopback: bool,
    allowed_hosts: frozenset[str] = frozenset(),
    timeout: float = TIMEOUT_SECONDS,
) -> Answer:
    """POST `body` within `timeout` seconds; never raises.

    The answer's body is not read, redirects are not followed, proxies not used.

    The address is looked up and checked now, and the connection goes to exactly what was checked.
    """
    try:
        addresses = check_callback_url(url, allow_loopback=allow_loopback, allowed_hosts=allowed_hosts)
        return asyncio.run(_post_any(url, addresses, body, headers, timeout))
    except CallbackRefused as error:
        return Answer(error=str(error))
    except TimeoutError:
        return Answer(error=f"no answer within {timeout:g} s")
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        return Answer(error=f"{type(error).__name__}: {error}"[:300])


async def _post_any(
    url: str, addresses: list[Address], body: bytes, headers: dict[str, str], timeout: float
) -> Answer:
    """Try the addresses in order until one takes the connection, all within one time limit."""
    async with (
        asyncio.timeout(timeout),
        httpx.AsyncClient(verify=_tls(), timeout=timeout, trust_env=False, follow_redirects=False) as client,
    ):
        tried = addresses[:ADDRESSES_TRIED]
        for address in tried[:-1]:
            try:
                return await _post_to(client, url, address, body, headers)
            except httpx.ConnectError:
                continue
        return await _post_to(client, url, tried[-1], body, headers)


async def _post_to(
    client: httpx.AsyncClient, url: str, address: Address, body: bytes, headers: dict[str, str]
) -> Answer:
    """Connect to `address`, but speak to the URL's host: its name goes into Host and into TLS."""
    parts = urlsplit(url)
    literal = f"[{address}]" if address.version == 6 else str(address)
    netloc = literal if parts.port is None else f"{literal}:{parts.port}"
    pinned = urlunsplit((parts.scheme, netloc, parts.path or "/", parts.query, ""))
    request = client.build_request(
        "POST",
        pinned,
        content=body,
        headers={**headers, "host": parts.netloc},
        extensions={"sni_hostname": (parts.hostname or "").removesuffix(".")},
    )
    response = await client.send(request, stream=True)
    await response.aclose()
    return Answer(response.status_code, "", retry_after(response.headers.get("retry-after")))


def retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds that a Retry-After header asks for (RFC 9110, 10.2.3: seconds or a date); None without one.

    A stranger wrote it: whatever it is, nothing is raised.
    """
    if value is None:
        return None
    digits = value.strip()
    if digits.isascii() and digits.isdecimal():
        return float(digits)
    try:
        when = parsedate_to_datetime(value)
        when = when if when.tzinfo else when.replace(tzinfo=UTC)
        return max((when - (now or datetime.now(UTC))).total_seconds(), 0.0)
    except (ValueError, OverflowError):  # no date, or one of no year that we know
        return None


@cache
def _tls() -> ssl.SSLContext:
    """One verifying context for all posts: loading the certificate store takes tens of milliseconds."""
    return httpx.create_ssl_context(trust_env=False)
