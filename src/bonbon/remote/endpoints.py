"""OpenAI-compatible endpoints: checks of address and key, and reading of replies.

Shared by the judge (`evaluation.judge`), remote samplers and rewards (`remote`), and the server
in front of another one (`serve.upstream`). Errors name the settings as `SECTION.base_url`
and `SECTION.api_key_env`.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from dataclasses import dataclass, field
from typing import Any

import httpx

from bonbon.system.errors import BonbonError

_PASSING = {408, 409, 425, 429}  # temporary errors, like every 5xx
_SHORTEST_SECRET = 8  # shorter ones ("EMPTY", "x") are placeholders


# --- the address and the key ----------------------------------------------------------------------


@dataclass(frozen=True)
class Endpoint:
    """A checked address, and its key ("" if none is set).

    `api_key_env` names the environment variable of the key.
    """

    base_url: str
    secret: str = field(repr=False)
    local: bool
    api_key_env: str

    def url(self, path: str) -> str:
        """Return the URL of `path`."""
        return f"{self.base_url.rstrip('/')}/{path}"

    def headers(self) -> dict[str, str]:
        """Return the headers of every request."""
        authorization = {"Authorization": f"Bearer {self.secret}"} if self.secret else {}
        return {"Content-Type": "application/json"} | authorization


def checked_endpoint(base_url: str, api_key_env: str, section: str) -> Endpoint:
    """Return the endpoint of a section of the configuration.

    Raises BonbonError when the address or the key cannot be used, or when the key would be sent
    unencrypted to another machine.
    """
    url, secret = checked_address(base_url, section), secret_from(api_key_env, section)
    local = is_local(url)
    if secret and not local and url.scheme != "https":
        raise BonbonError(
            f"the key in {api_key_env} would go unencrypted to {base_url}; use an https address, a "
            f"tunnel to this machine, or name another variable in {section}.api_key_env"
        )
    return Endpoint(base_url, secret, local, api_key_env)


def checked_address(base_url: str, section: str) -> httpx.URL:
    """Parse an address. Raises BonbonError if it is invalid or has more than an address."""
    # Errors do not show the address: a malformed one may contain a password anywhere.
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host or (url.port or 1) > 65535:
        raise BonbonError(
            f"{section}.base_url is no address; write it as http://HOST:PORT/v1 or https://HOST/v1"
        )
    if url.userinfo or url.query or url.fragment:
        raise BonbonError(
            f"{section}.base_url has a user name, a query or a fragment; leave them out, and put "
            f"the key in the environment variable that {section}.api_key_env names"
        )
    return url


def is_local(url: httpx.URL) -> bool:
    """Return whether an address is this machine's own."""
    return is_loopback(url.host)


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine's loopback, which other machines cannot reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def secret_from(name: str, section: str) -> str:
    """Return the key in the environment variable `name`, or "" if none is set.

    Raises BonbonError for an invalid variable name, or a key that a header cannot hold.
    """
    if not re.fullmatch(r"\w+", name, re.ASCII):  # not shown: it may be the key itself
        raise BonbonError(
            f"{section}.api_key_env is the name of an environment variable, of letters, digits and "
            "'_'; put the key in that variable"
        )
    secret = os.environ.get(name, "").strip()
    if not re.fullmatch(r"[!-~]*", secret):
        raise BonbonError(f"the key in {name} has a blank or a non-ASCII character; set it again")
    return secret


# --- replies --------------------------------------------------------------------------------------


def is_passing(status: int) -> bool:
    """Return whether a status is temporary, so that a retry may succeed."""
    return status in _PASSING or status >= 500


def retry_after_seconds(header: str) -> float:
    """Return the seconds of a Retry-After header; 0 without one, or for a date (clocks differ)."""
    return float(header) if re.fullmatch(r"[0-9]{1,9}", header) else 0.0


def message_text(content: Any) -> str:
    """Return the text of a message's content: a text, a list of parts, or None.

    Raises TypeError or KeyError for anything else.
    """
    if content is None:  # a reasoning model that did not finish thinking
        return ""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def server_message(content: bytes, secret: str, longest: int = 200) -> str:
    """Return a server's error message as one line, without the key."""
    text = content.decode(errors="replace")
    try:
        value = json.loads(text)
        for name in ("error", "detail", "message"):
            value = value.get(name, value) if isinstance(value, dict) else value
        text = value if isinstance(value, str) else text
    except (ValueError, RecursionError):
        pass
    line = "".join(filter(str.isprintable, " ".join(text.split())))
    return redacted(line, secret)[:longest] or "no message"


def redacted(text: str, secret: str) -> str:
    """Replace the key in a text."""
    return text if len(secret) < _SHORTEST_SECRET else text.replace(secret, "[key]")
