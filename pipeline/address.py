"""Where a URL leads (this machine, a private network, the internet; through which proxy), and what must not be printed.

The only module that decides either. Reads the proxy variables of the environment and the secrets that a teacher's
settings name. Writes nothing.
"""

import os
import re
import socket
from base64 import b64encode
from collections.abc import Iterable
from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.teacher_config import TeacherConfig

HIDDEN = "[secret]"
SHORTEST_SECRET = 6  # characters; a shorter one cannot be replaced without destroying ordinary text
VARIABLE = re.compile(r"\$\{(\w+)\}")  # in a header's value: the value of that environment variable
DEFAULT_PORTS = {"http": 80, "https": 443}
_USERINFO = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # user:password@ in a URL
_KEY = re.compile(
    r"\b(?:sk|pk|rk)[-_][\w*-]{8,}"  # OpenAI, Anthropic, OpenRouter, Stripe's gateways
    r"|\b(?:gsk_|hf_|xai-|ghp_)[A-Za-z0-9]{16,}|\bAIza[\w-]{30,}"  # Groq, Hugging Face, xAI, GitHub, Google
    r"|\beyJ[\w-]+\.[\w-]+\.[\w-]+"  # a JSON web token
    r"|(?<=Bearer )[\w.~+/=-]{8,}|(?<=Basic )[\w+/=]{8,}"
)


def is_in_store(place: str) -> bool:
    """Whether a run's place is a store's URL, and no folder. Raises UsageError for a URL that lacks its two slashes."""
    if "://" not in place and (scheme := re.match("(?:s3|gs|file):", place)):
        raise UsageError(
            f"{place}: a store's URL begins with {scheme[0]}//, as s3://bucket/path or file:///folder does"
        )
    return "://" in place


def is_loopback(url: str) -> bool:
    """Whether the URL names this machine by a loopback address or as `localhost`."""
    host = urlsplit(url).hostname or ""
    try:
        address = ip_address(host)
    except ValueError:
        return host == "localhost"
    return address.is_loopback or address.is_unspecified


def is_this_machine(url: str) -> bool:
    """Whether a server can be started here for the URL: loopback, the machine's own name, or an address it has."""
    host = urlsplit(url).hostname or ""
    if is_loopback(url) or (host and host == socket.gethostname()):
        return True
    try:
        family = socket.AF_INET6 if ip_address(host).version == 6 else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except (ValueError, OSError):
        return False
    return True


def is_private(url: str) -> bool:
    """Whether the URL is on this machine or in a private network: a server of one's own."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_private
    except ValueError:
        return host == "localhost" or "." not in host or host.endswith((".local", ".internal", ".lan"))


def proxy_of(url: str) -> str | None:
    """The proxy that the environment names for a URL (HTTPS_PROXY, NO_PROXY, …); none for a server on this machine.

    Raises UsageError for one that does not speak HTTP.
    """
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    if not proxy or is_loopback(url) or proxy_bypass(parts.hostname or ""):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        speaks_http = urlsplit(proxy).scheme in ("http", "https") and urlsplit(proxy).port != 0
    except ValueError:  # `port` raises it where it is no number
        speaks_http = False
    if not speaks_http:
        name = f"{parts.scheme.upper()}_PROXY"
        shown = _USERINFO.sub(HIDDEN, proxy)
        raise UsageError(
            f"{name}: {shown} is no HTTP proxy; set it to http://HOST:PORT, or {parts.hostname} in NO_PROXY"
        )
    return proxy


def is_port_open(url: str) -> bool:
    """Whether something listens at the URL's host and port. Sends nothing, and needs no key and no proxy."""
    parts = urlsplit(url)
    try:
        address = parts.hostname, parts.port or DEFAULT_PORTS.get(parts.scheme, 80)
        with socket.create_connection(address, timeout=1.0):
            return True
    except OSError:
        return False


class Redactor:
    """Hides secrets in text that leaves the client: errors, failures.jsonl, messages on the screen."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        """`secrets`: values that must never be shown. Values under SHORTEST_SECRET characters are ignored."""
        known = sorted({secret for secret in secrets if len(secret) >= SHORTEST_SECRET}, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, known))) if known else None

    @classmethod
    def of(cls, teacher: "TeacherConfig") -> "Redactor":
        """Knows what a teacher's requests carry: its key, the variables in its headers, and proxy passwords."""
        key = teacher.api_key()
        secrets = [key.get_secret_value()] if key else []
        for value in teacher.headers.values():
            secrets += [os.environ.get(name, "") for name in VARIABLE.findall(value)]
        for proxy in filter(None, map(proxy_of, teacher.urls)):
            userinfo = urlsplit(proxy).netloc.rpartition("@")[0]
            password = userinfo.partition(":")[2]
            secrets += [userinfo, password, unquote(password), b64encode(unquote(userinfo).encode()).decode()]
        return cls(secrets)

    def __call__(self, text: str) -> str:
        """The text with known secrets, passwords in URLs and anything shaped like a key replaced by `[secret]`."""
        if self._known:
            text = self._known.sub(HIDDEN, text)
        return _KEY.sub(HIDDEN, _USERINFO.sub(HIDDEN, text))
