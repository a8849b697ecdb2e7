"""Checks of host names, addresses and gRPC endpoints; each error names the flag or setting.

A malformed host name must be found here: Python's sockets raise UnicodeError for it, and gRPC
reports it as a failed connection. Resolves no name.
"""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

from outrider.errors import ConfigError
from outrider.replica import split_address
from outrider.settings.fields import require

GRPC_SCHEMES = ("unix:", "dns:", "ipv4:", "ipv6:")

# RFC 1035.
_MAX_LABEL_CHARS, _MAX_HOST_CHARS = 63, 253
# Host names: letters, digits, hyphens; container names: underscores; IPv6: colons, % and brackets.
_NOT_OF_A_HOST = re.compile(r"[^A-Za-z0-9._:%\[\]-]")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a host name, which may resolve to any address
        return False


def host_fault(host: str) -> str | None:
    """Why it is neither a host name nor an IP address, as a predicate; None: it is one."""
    if not host:
        return "is empty"
    if not host.isascii():
        return _non_ascii_fault(host)
    if wrong := _NOT_OF_A_HOST.search(host):
        return f"has the character {wrong[0]!r}, which no host name has"
    labels = host.removesuffix(".").split(".")
    if not all(labels):
        return "has an empty label (two dots in a row, or a dot at the start)"
    longest = max(map(len, labels))
    if longest > _MAX_LABEL_CHARS:
        return f"has a label of {longest} characters; at most {_MAX_LABEL_CHARS}"
    if len(host) > _MAX_HOST_CHARS:
        return f"has {len(host)} characters; at most {_MAX_HOST_CHARS}"
    return None


def _non_ascii_fault(host: str) -> str:
    try:
        return f"is not ASCII; use its ASCII form: {host.encode('idna').decode()}"
    except UnicodeError:
        return "is not ASCII, and has no ASCII form"


def require_host(host: str, name: str) -> None:
    """Raises ConfigError that names the setting unless it is a host name or an IP address."""
    fault = host_fault(host)
    require(fault is None, name, f"host {host!r} {fault}")


def require_address(address: str, name: str) -> None:
    """Raises ConfigError that names the setting unless it is host:port."""
    try:
        host, _ = split_address(address)
    except ValueError:
        raise ConfigError(
            f"{name}: {address!r} is not host:port, for instance 127.0.0.1:50051"
        ) from None
    require_host(host, name)


def require_endpoint(endpoint: str, name: str) -> None:
    """Raises ConfigError that names the setting unless gRPC can connect to it.

    Allowed: host:port, or an address with one of GRPC_SCHEMES, whose port may be left out.
    """
    if endpoint.startswith("unix:"):
        is_path = "\0" not in endpoint and endpoint.isprintable()
        require(is_path, name, f"{endpoint!r} has a character that no path has")
    elif endpoint.startswith(GRPC_SCHEMES):
        for target in endpoint.partition(":")[2].rpartition("/")[2].split(","):
            _, colon, port = target.rpartition(":")
            if not colon or port.endswith("]"):  # no port: a host alone
                require_host(target, name)
            else:
                require_address(target, name)
    else:
        scheme, separator, rest = endpoint.partition("://")
        why = f"{endpoint!r} is a URL; give host and port alone: {rest.strip('/') or scheme}"
        require(not separator, name, why)
        require_address(endpoint, name)


def require_url_host(url: str, name: str) -> None:
    """Raises ConfigError that names the setting unless host and port of the URL are well-formed.

    The error does not show the URL: it may hold a password.
    """
    parts = urlsplit(url)
    try:
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ConfigError(f"{name}: its port is not a number in [0, 65535]") from None
    if host:
        fault = host_fault(host)
        require(fault is None, name, f"its host name {fault}")
