"""OpenAI-compatible endpoints: whether one may be asked, and how to read what it says.

What the judge (`evaluation.judge`), samplers and rewards behind a server (`remote`), and
the server in front of another one (`serve.upstream`) share. The options that errors name are
`SECTION.base_url` and `SECTION.api_key_env`.
"""

from __future__ import annotations

import ipaddress
import json
import os
import random
import re
from dataclasses import dataclass, field
from typing import Any

import httpx

from bonbon.system.errors import BonbonError

_PASSING = {408, 409, 425, 429}  # and every 5xx
_SHORTEST_SECRET = 8  # shorter ones ("EMPTY", "x") only fill the place of a key


# --- the address and the key ----------------------------------------------------------------------


@dataclass(frozen=True)
class Endpoint:
    """An address that may be asked, and the key for it ("" where none is set).

    `api_key_env` names the environment variable that the key was looked for in.
    """

    base_url: str
    secret: str = field(repr=False)
    local: bool
    api_key_env: str

    def url(self, path: str) -> str:
        """Where requests to `path` go."""
        return f"{self.base_url.rstrip('/')}/{path}"

    def headers(self) -> dict[str, str]:
        """The headers of every request."""
        authorization = {"Authorization": f"Bearer {self.secret}"} if self.secret else {}
        return {"Content-Type": "application/json"} | authorization


def checked_endpoint(base_url: str, api_key_env: str, section: str) -> Endpoint:
    """The endpoint that a section of the configuration names.

    Raises BonbonError when the address or the key cannot be used, or when the key would go
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
    """The address, parsed. Raises BonbonError when it is none, or says more than an address."""
    # The errors do not show the address: a wrong one may have a password anywhere.
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
    """Whether an address is this machine's own."""
    return is_loopback(url.host)


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own, which no other machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def secret_from(name: str, section: str) -> str:
    """The key in the environment variable `name`, or "" where none is set.

    Raises BonbonError for what is no variable's name, or no key that a header can hold.
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


# --- what it answers ------------------------------------------------------------------------------


def is_passing(status: int) -> bool:
    """Whether a status may be gone at the next try."""
    return status in _PASSING or status >= 500


def retry_after_seconds(header: str) -> float:
    """The seconds that a Retry-After header asks for; 0 for none, or a date (clocks differ)."""
    return float(header) if re.fullmatch(r"[0-9]{1,9}", header) else 0.0


def message_text(content: Any) -> str:
    """A message's content: a text, a list of parts of which some are texts, or nothing.

    Raises TypeError or KeyError for anything else.
    """
    if content is None:  # a reasoning model that did not get beyond its thoughts
        return ""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def server_message(content: bytes, secret: str, longest: int = 200) -> str:
    """A server's message, for one line of an error, without the key."""
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
    """The text without the key."""
    return text if len(secret) < _SHORTEST_SECRET else text.replace(secret, "[key]")


def backoff(attempt: int, first: float, longest: float) -> float:
    """Seconds before the next try: twice as many after each, up to `longest`.

    Spread by a quarter to either side, so that what failed together does not come back together.
    """
    return min(first * 2.0 ** min(attempt, 30), longest) * random.uniform(0.75, 1.25)
