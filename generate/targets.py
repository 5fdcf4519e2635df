"""Which servers a run asks: those of `teacher.base_url` or of `teacher.urls_file`, and each address of a private name.

A headless service of Kubernetes is one name with an address per server. Each address is an endpoint of its own, with
its own queue and limits. A public name stays one endpoint: what it allows is for all of its addresses together.
Reads the file and asks DNS; writes nothing.
"""

import asyncio
from collections.abc import Collection
from ipaddress import ip_address
from pathlib import Path
from socket import AF_INET, AF_INET6, SOCK_STREAM, getaddrinfo
from typing import NamedTuple
from urllib.parse import urlsplit

from pydantic import AnyHttpUrl, TypeAdapter, ValidationError

from generate.client import check_url
from pipeline.address import DEFAULT_PORTS, is_loopback, proxy_of
from pipeline.errors import RecipeError
from pipeline.section import weighted_urls
from pipeline.teacher_config import TeacherConfig

URLS_KEY = "teacher.urls_file"


class Target(NamedTuple):
    """One server. `address` is the one of its name's addresses to connect to; None: whatever the name leads to.

    `weight` is its share of the requests beside the others. With another weight it counts as another server.
    """

    url: str
    address: str | None = None
    weight: float = 1.0

    @property
    def name(self) -> str:
        """What messages, metrics and reports call it."""
        return self.url if self.address is None else f"{self.url} at {self.address}"


async def find_targets(teacher: TeacherConfig, known: Collection[Target] = ()) -> list[Target]:
    """The servers there are now. A name that DNS does not know at the moment keeps the `known` ones.

    Raises RecipeError if the file cannot be read, or holds something other than URLs.
    """
    weights = urls_now(teacher)
    found = await asyncio.gather(*map(_addresses, weights))
    targets: list[Target] = []
    for (url, weight), addresses in zip(weights.items(), found, strict=True):
        before = [Target(url, target.address, weight) for target in known if target.url == url]
        new = [Target(url, address, weight) for address in addresses if len(addresses) > 1]
        targets += new or (before if before and not addresses else [Target(url, None, weight)])
    return targets


def urls_now(teacher: TeacherConfig) -> dict[str, float]:
    """The URLs that the recipe, or its file, names now, and their weights. Raises RecipeError as `read_urls`."""
    return teacher.url_weights if teacher.urls_file is None else read_urls(teacher.urls_file)


def read_urls(path: Path) -> dict[str, float]:
    """The URLs in a file and their weights: a URL per line, and after a space its weight, if that is not 1.

    Empty lines and lines that begin with `#` are skipped. Raises RecipeError.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise RecipeError(f"{URLS_KEY} {path}: {reason}; it needs one URL per line") from None
    try:
        weights = weighted_urls(line for line in lines if line.strip() and line[0] != "#")
    except ValueError as error:
        raise RecipeError(f"{URLS_KEY} {path}: {error}") from None
    if not weights:
        raise RecipeError(f"{URLS_KEY} {path} holds no URL; it needs one per line, like http://10.0.0.7:8000/v1")
    for url in weights:
        try:
            TypeAdapter(AnyHttpUrl).validate_python(url)
        except ValidationError:
            raise RecipeError(f"{URLS_KEY} {path}: {url!r} is no URL; write http://HOST:PORT/v1") from None
        check_url(url, URLS_KEY)
    return weights


def _is_name(url: str) -> bool:
    """Whether DNS is to be asked about the URL: not for an address, this machine, or what a proxy looks up."""
    try:
        ip_address(urlsplit(url).hostname or "")
    except ValueError:
        return not is_loopback(url) and proxy_of(url) is None
    return False


async def _addresses(url: str) -> list[str]:
    """The addresses of a name, sorted: IPv4 if it has any. Empty if DNS does not say, or they are not all private."""
    parts = urlsplit(url)
    if not _is_name(url):
        return []
    port = parts.port or DEFAULT_PORTS[parts.scheme]
    try:
        found = await asyncio.to_thread(getaddrinfo, parts.hostname, port, type=SOCK_STREAM)
    except OSError:
        return []
    by_family: dict[int, set[str]] = {}
    for family, _, _, _, address in found:
        by_family.setdefault(family, set()).add(str(address[0]))
    addresses = by_family.get(AF_INET) or by_family.get(AF_INET6) or set()
    return sorted(addresses) if all(ip_address(one.partition("%")[0]).is_private for one in addresses) else []
