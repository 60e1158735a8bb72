"""Who asks: the key's tenant or, on a loopback address without keys, this machine's own user.

Without keys, any page that a browser shows could ask too: a request from another origin, or under
a name that was bound to this machine to get here (DNS rebinding), is refused.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from still_agent.server.errors import ApiError
from still_agent.server.keys import Keys


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the host."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def tenant_of(request: HTTPConnection, keys: Keys | None) -> str:
    """Whose request it is. ApiError 401 for a wrong or missing key, 403 for a foreign page."""
    if keys is None:
        _require_own_page(request)
        return ""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    tenant = keys.tenant(key.strip())
    if scheme.lower() != "bearer" or tenant is None:
        raise ApiError(
            401,
            "No API key, or a wrong one: send `Authorization: Bearer KEY`.",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
    return tenant


def _require_own_page(request: HTTPConnection) -> None:
    host = request.headers.get("host", "")
    origin = request.headers.get("origin")
    own = origin is None or origin.lower() in (f"http://{host}".lower(), f"https://{host}".lower())
    # A browser that sends no origin with a GET says this.
    foreign = request.headers.get("sec-fetch-site", "none") in ("cross-site", "same-site")
    if not _names_loopback(host) or not own or foreign:
        raise ApiError(
            403,
            "Without keys, only this machine's own programs and pages are answered: ask at "
            "http://localhost or http://127.0.0.1, or start the server with --keys.",
            code="foreign_origin",
        )


def _names_loopback(host: str) -> bool:
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False
