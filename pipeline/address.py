"""Where a URL leads (this machine, a private network, the internet; through which proxy), and what must not be printed.

The one place that knows either. Reads the environment's proxy variables, and writes nothing.
"""

import re
import socket
from collections.abc import Iterable
from ipaddress import ip_address
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

HIDDEN = "[secret]"
_USERINFO = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # user:password@ in a URL
_KEY = re.compile(r"\b(?:sk|pk|rk|gsk|hf|xai)[-_][A-Za-z0-9_-]{8,}|(?<=Bearer )[A-Za-z0-9._~+/=-]{8,}")


def is_loopback(url: str) -> bool:
    """Whether the URL is on this machine."""
    host = urlsplit(url).hostname or ""
    try:
        address = ip_address(host)
    except ValueError:
        return host == "localhost"
    return address.is_loopback or address.is_unspecified


def is_private(url: str) -> bool:
    """Whether the URL is on this machine or in a private network: a server of one's own."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_private
    except ValueError:
        return host == "localhost" or "." not in host or host.endswith((".local", ".internal", ".lan"))


def proxy_of(url: str) -> str | None:
    """The proxy that the environment names for a URL (HTTPS_PROXY, NO_PROXY, …); none for a server on this machine."""
    parts = urlsplit(url)
    if is_loopback(url) or proxy_bypass(parts.hostname or ""):
        return None
    proxy = getproxies().get(parts.scheme)
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def is_port_open(url: str, timeout_s: float = 1.0) -> bool:
    """Whether something listens at the URL's host and port. Sends nothing, and needs no key and no proxy."""
    parts = urlsplit(url)
    try:
        with socket.create_connection((parts.hostname, parts.port or 80), timeout=timeout_s):
            return True
    except OSError:
        return False


class Redactor:
    """Hides secrets in text that leaves the client: errors, failures.jsonl, messages on the screen."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        """`secrets`: values that must never be shown, like the key and header values from the environment."""
        known = sorted({secret for secret in secrets if secret}, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, known))) if known else None

    def __call__(self, text: str) -> str:
        """The text with known secrets, passwords in URLs and anything shaped like a key replaced by `[secret]`."""
        if self._known:
            text = self._known.sub(HIDDEN, text)
        return _KEY.sub(HIDDEN, _USERINFO.sub(HIDDEN, text))
