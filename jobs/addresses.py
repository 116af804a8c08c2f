"""Which addresses a client's URL may lead to: only public ones, so that none can reach our own network.

For callbacks and for image URLs. The API asks at submission and the webhook sender asks again at every
attempt, then connects to exactly the address that was checked: a name that changes its answer in between (DNS
rebinding) gains nothing.
Special-purpose ranges: the IANA IPv4 and IPv6 Special-Purpose Address Registries (RFC 6890), which
`ipaddress.is_global` follows; the ranges below are those that it leaves open or that carry another address.
"""

import ipaddress
import re
import socket
from collections.abc import Callable
from urllib.parse import SplitResult, urlsplit

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, int], list[str]]

MAX_URL_CHARACTERS = 2048
PORTS = frozenset({443, 8443})
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")  # the only IPv6 space that IANA hands out as global unicast
REFUSED = tuple(
    ipaddress.ip_network(text)
    for text in (
        "100.64.0.0/10",  # carrier-grade NAT, RFC 6598; one cloud's metadata lives here
        "168.63.129.16/32",  # Azure's wire server: a public address, but the host's own
        "192.0.0.0/24",  # IETF protocol assignments, RFC 6890; another cloud's metadata lives here
        "192.88.99.0/24",  # 6to4 relay anycast, RFC 7526
        "2001::/23",  # IETF protocol assignments, RFC 2928; Teredo (RFC 4380) carries an IPv4 address
        "2002::/16",  # 6to4, RFC 3056: carries an IPv4 address
        "3fff::/20",  # documentation, RFC 9637
    )
)
# The last label decides whether a host is meant as a number (WHATWG URL, "ends in a number").
NUMERIC_LABEL = re.compile(r"(?:[0-9]+|0[xX][0-9a-fA-F]*)\Z")
HOST_NAME = re.compile(
    r"(?=.{1,253}\Z)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9])?\.)*[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\Z"
)


class CallbackRefused(ValueError):
    """The URL is not one that we would ever connect to; the message says what to send instead."""


class CallbackUnresolved(CallbackRefused):
    """The host name has no address at the moment; a later attempt may find one."""


def check_callback_url(
    url: str,
    *,
    allow_loopback: bool,
    allowed_hosts: frozenset[str] = frozenset(),
    resolve: Resolver | None = None,
) -> list[Address]:
    """Return the addresses that `url` may lead to, in the resolver's order.

    https on port 443 or 8443 to public addresses only; with `allow_loopback` also http and https on any port
    to the loopback interface (the local stack's own receivers), and the same for any address of a host that
    the operator named in `allowed_hosts`. Every address of the name has to be allowed.
    Raises CallbackRefused, or CallbackUnresolved when the name has no address.
    """
    parts = _split(url)
    host, port = _host(parts), _port(parts)
    if host in allowed_hosts:
        return _lookup(host, port, resolve or _getaddrinfo)
    if not allow_loopback:
        _check_scheme_and_port(parts.scheme, port)  # before asking DNS for a name that can't be posted to
    addresses = [literal] if (literal := _literal(host)) else _lookup(host, port, resolve or _getaddrinfo)
    if allow_loopback and all(_is_loopback(address) for address in addresses):
        return addresses
    _check_scheme_and_port(parts.scheme, port)
    for address in addresses:
        if why := refusal(address):
            raise CallbackRefused(f"host {host!r} is refused: {why}; use a public https address")
    return addresses


def _check_scheme_and_port(scheme: str, port: int) -> None:
    if scheme != "https":
        raise CallbackRefused(f"scheme {scheme}:// is refused; send an https:// URL")
    if port not in PORTS:
        raise CallbackRefused(f"port {port} is refused; use 443 or 8443")


def refusal(address: Address) -> str | None:
    """Why an address is off limits, or None when it is a public unicast address."""
    inner = _carried(address)
    if inner is not None:
        return refusal(inner)
    if any(address in network for network in REFUSED if network.version == address.version):
        return "its address is in a special-purpose range"
    if address.is_loopback:
        return "its address is a loopback address"
    if address.is_link_local:
        return "its address is link-local (cloud metadata lives there)"
    if address.is_multicast:
        return "its address is a multicast address"
    if isinstance(address, ipaddress.IPv6Address) and address not in PUBLIC_V6:
        return "its address is outside global unicast"
    if not address.is_global or address.is_reserved or address.is_unspecified:
        return "its address is private or reserved"
    return None


def _carried(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 one stands for: v4-mapped, or NAT64's well-known prefix."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return None


def _is_loopback(address: Address) -> bool:
    inner = _carried(address)
    return inner.is_loopback if inner is not None else address.is_loopback


def _split(url: str) -> SplitResult:
    if len(url) > MAX_URL_CHARACTERS:
        raise CallbackRefused(f"the URL has {len(url)} characters; at most {MAX_URL_CHARACTERS}")
    # urlsplit drops tabs and newlines and reads a backslash unlike other parsers: two readings of one URL
    # are how such checks are passed by, so anything outside printable ASCII is refused.
    if not url.isascii() or "\\" in url or any(c <= " " or c == "\x7f" for c in url):
        raise CallbackRefused("the URL has blanks, backslashes or non-ASCII characters; percent-encode them")
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise CallbackRefused(f"the URL can't be read ({error}); send https://host/path") from None
    if parts.scheme not in ("http", "https"):
        raise CallbackRefused(f"scheme {parts.scheme or 'none'!r} is refused; send an https:// URL")
    if "@" in parts.netloc:
        raise CallbackRefused("the URL carries credentials; leave out user:password@")
    return parts


def _host(parts: SplitResult) -> str:
    host = (parts.hostname or "").removesuffix(".")
    if not host:
        raise CallbackRefused("the URL has no host; send https://host/path")
    if "%" in host:
        raise CallbackRefused(f"host {host!r} has a zone or an escape; send a plain name or address")
    return host


def _port(parts: SplitResult) -> int:
    try:
        port = parts.port
    except ValueError:
        raise CallbackRefused("port is not a number from 1 to 65535; use 443 or 8443") from None
    return port if port is not None else {"http": 80, "https": 443}[parts.scheme]


def _literal(host: str) -> Address | None:
    """The address that `host` spells, or None for a name; odd spellings (0x7f.1, 2130706433) are refused."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    if NUMERIC_LABEL.match(host.rsplit(".", 1)[-1]):
        raise CallbackRefused(f"host {host!r} is an odd spelling of an address; write four decimal bytes")
    if not HOST_NAME.match(host):
        raise CallbackRefused(f"host {host!r} is not a host name")
    return None


def _lookup(host: str, port: int, resolve: Resolver) -> list[Address]:
    try:
        found = resolve(host, port)
    except (OSError, UnicodeError) as error:
        raise CallbackUnresolved(f"host {host!r} has no address ({error})") from None
    addresses = [ipaddress.ip_address(text.split("%", 1)[0]) for text in dict.fromkeys(found)]
    if not addresses:
        raise CallbackUnresolved(f"host {host!r} has no address")
    return addresses


def _getaddrinfo(host: str, port: int) -> list[str]:
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return [str(info[4][0]) for info in infos]
