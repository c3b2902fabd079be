"""page: the HTML file at ``/``, with headers that let a browser run what is in it and nothing else."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Mapping
from importlib.resources import files

from attrs import define

_INLINE = r"<{tag}>(.*?)</{tag}>"


@define(frozen=True)
class Page:
    """The answer to ``GET /``.

    Attributes:
        body: HTML in UTF-8.
        headers: of the answer, by lower-case name: type, content security policy and caching.
    """

    body: bytes
    headers: Mapping[str, str]


@functools.cache
def page() -> Page:
    """Return the page and its headers.

    The policy names the SHA-256 of the page's own script and style. A script that came in with a text, a source's name
    or an error message would not run, even if it got into the page; and nothing is asked of another server.

    Example:
        >>> from mplus.serving.page.page import page
        >>> page().headers["content-type"]
        'text/html; charset=utf-8'
    """
    text = files("mplus.serving.page").joinpath("index.html").read_text(encoding="utf-8")
    policy = (
        "default-src 'self'",
        f"script-src {_hashes(text, 'script')}",
        f"style-src {_hashes(text, 'style')}",
        "img-src 'self' data:",  # the icon
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "object-src 'none'",
    )
    return Page(
        text.encode(),
        {
            "content-type": "text/html; charset=utf-8",
            "content-security-policy": "; ".join(policy),
            "cache-control": "no-cache",
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
        },
    )


def _hashes(text: str, tag: str) -> str:
    """Return the hash sources of all inline elements of a kind, as content security policies write them."""
    inline = re.findall(_INLINE.format(tag=tag), text, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(element.encode()).digest()).decode() for element in inline)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
