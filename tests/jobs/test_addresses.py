"""The callback check: every way that is known to reach an inner address is refused, and public ones pass."""

import ipaddress

import pytest

from jobs.addresses import CallbackRefused, CallbackUnresolved, check_callback_url, refusal


def answers(*addresses: str):
    """A resolver with a fixed answer."""
    return lambda host, port: list(addresses)


INNER = [
    "127.0.0.1",
    "127.8.8.8",
    "0.0.0.0",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",  # most clouds' metadata
    "168.63.129.16",  # Azure's wire server
    "100.64.0.1",
    "100.100.100.200",  # one cloud's metadata, in the carrier range
    "192.0.0.192",  # another's
    "192.0.2.1",
    "192.88.99.1",  # 6to4's relays: whoever is nearest answers
    "198.18.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2001:20::1",
    "2002:7f00:1::1",
    "2002:808:808::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fec0::1",
    "ff02::1",
    "2001:db8::1",
    "3fff::1",
    "5f00::1",
    "100::1",
]


@pytest.mark.parametrize("address", INNER)
def test_inner_addresses_are_refused_as_literal_and_as_answer(address: str) -> None:
    literal = f"[{address}]" if ":" in address else address
    with pytest.raises(CallbackRefused):
        check_callback_url(f"https://{literal}/hook", allow_loopback=False)
    with pytest.raises(CallbackRefused):
        check_callback_url("https://example.com/hook", allow_loopback=False, resolve=answers(address))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"]
)
def test_public_addresses_pass(address: str) -> None:
    literal = f"[{address}]" if ":" in address else address
    assert check_callback_url(f"https://{literal}/hook?x=1", allow_loopback=False) == [
        ipaddress.ip_address(address)
    ]
    assert refusal(ipaddress.ip_address(address)) is None


def test_one_inner_address_among_public_ones_is_enough_to_refuse() -> None:
    with pytest.raises(CallbackRefused, match="private or reserved"):
        check_callback_url("https://a.example", allow_loopback=False, resolve=answers("8.8.8.8", "10.0.0.1"))


@pytest.mark.parametrize(
    "host",
    [
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "127.1",
        "127.0.0.0x1",
        "010.8.8.8",
        "1.2.3.4.5",
        "0x",
    ],
)
def test_odd_spellings_of_addresses_are_refused(host: str) -> None:
    with pytest.raises(CallbackRefused, match="odd spelling"):
        check_callback_url(f"https://{host}/", allow_loopback=True)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://example.com/hook", "https"),
        ("ftp://example.com/", "scheme"),
        ("file:///etc/passwd", "scheme"),
        ("//example.com/", "scheme"),
        ("https:///path", "no host"),
        ("https://user:pass@example.com/", "credentials"),
        ("https://user@example.com/", "credentials"),
        ("https://@example.com/", "credentials"),
        ("https://example.com:22/", "port 22"),
        ("https://example.com:80/", "port 80"),
        ("https://example.com:8080/", "port 8080"),
        ("https://example.com:0/", "port 0"),
        ("https://example.com:99999/", "port"),
        ("https://example.com:abc/", "port"),
        ("https://example.com\\@10.0.0.1/", "backslashes"),
        ("https://exa mple.com/", "blanks"),
        ("https://example.com/\n", "blanks"),
        ("https://example.com/\x7f", "blanks"),
        ("https://exämple.com/", "non-ASCII"),
        ("https://[fe80::1%25eth0]/", "zone"),
        ("https://[::1/", "can't be read"),
        ("https://exa%6dple.com/", "escape"),
        ("https://-bad-.com/", "not a host name"),
        ("https://example.com/" + "a" * 3000, "characters"),
    ],
)
def test_other_urls_are_refused_with_a_clear_sentence(url: str, words: str) -> None:
    with pytest.raises(CallbackRefused, match=words):
        check_callback_url(url, allow_loopback=False, resolve=answers("8.8.8.8"))


def test_ports_443_and_8443_and_a_trailing_dot_pass() -> None:
    for url in ("https://example.com", "https://example.com:443/", "https://EXAMPLE.com.:8443/x"):
        assert check_callback_url(url, allow_loopback=False, resolve=answers("8.8.8.8"))


@pytest.mark.parametrize(
    "url", ["http://inner.example/", "https://inner.example:22/", "https://u@inner.example/"]
)
def test_nobody_is_asked_for_a_name_that_is_refused_anyway(url: str) -> None:
    """Who sends the URL would learn which of our inner names exist, and have our resolver ask theirs."""

    def asked(host: str, port: int) -> list[str]:
        pytest.fail(f"{host} was looked up")

    with pytest.raises(CallbackRefused):
        check_callback_url(url, allow_loopback=False, resolve=asked)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9000/hook",
        "http://[::1]:9000/",
        "http://[::ffff:127.0.0.1]:9000/",
        "http://localhost:1/x",
    ],
)
def test_loopback_needs_the_setting(url: str) -> None:
    assert check_callback_url(url, allow_loopback=True)
    with pytest.raises(CallbackRefused):
        check_callback_url(url, allow_loopback=False)


def test_the_setting_opens_loopback_only() -> None:
    for url in ("http://10.0.0.1/", "http://169.254.169.254/", "http://8.8.8.8/"):
        with pytest.raises(CallbackRefused):
            check_callback_url(url, allow_loopback=True)
    with pytest.raises(CallbackRefused):
        check_callback_url("http://a.example/", allow_loopback=True, resolve=answers("127.0.0.1", "10.0.0.1"))


def test_a_name_without_address_is_told_apart() -> None:
    def fails(host: str, port: int) -> list[str]:
        raise OSError("Name or service not known")

    for resolve in (fails, answers()):
        with pytest.raises(CallbackUnresolved, match="no address"):
            check_callback_url("https://nowhere.example/", allow_loopback=False, resolve=resolve)


def test_hosts_that_the_operator_names_may_be_inside() -> None:
    """By name alone: the same address under another name, or as a literal, stays refused."""
    named = frozenset({"hooks.inside"})
    resolve = answers("10.0.0.1", "10.0.0.2", "10.0.0.1")
    for url in ("http://hooks.inside:9000/x", "https://HOOKS.inside./x"):
        found = check_callback_url(url, allow_loopback=False, allowed_hosts=named, resolve=resolve)
        assert [str(address) for address in found] == ["10.0.0.1", "10.0.0.2"]
    for url in (
        "https://other.inside/", "https://hooks.inside.evil.example/", "https://10.0.0.1/",
        "https://x@hooks.inside/", "ftp://hooks.inside/",
    ):  # fmt: skip
        with pytest.raises(CallbackRefused):
            check_callback_url(url, allow_loopback=False, allowed_hosts=named, resolve=resolve)
