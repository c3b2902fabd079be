"""The page is one file that asks nothing of anyone but its server, and its headers let nothing else run in it."""

from __future__ import annotations

import base64
import hashlib
import re

from mplus.serving.page.page import page

BODY = page().body.decode()


def test_it_names_no_other_server():
    assert set(re.findall(r"(?:https?:)?//[\w.]+", re.sub(r"//(?=[ -])", "", BODY))) == {"http://www.w3.org"}, "SVG"
    assert not re.search(r"<(?:link|script|img|iframe)[^>]*(?:src|href)=\"(?!data:)", BODY)


def test_only_its_own_script_and_style_run():
    policy = dict(part.split(" ", 1) for part in page().headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'self'"
    for tag in ("script", "style"):
        (inline,) = re.findall(f"<{tag}>(.*?)</{tag}>", BODY, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert not re.search(r"<[^>]* (?:style|on[a-z]+)=", BODY), "attributes that the policy forbids"


def test_text_is_never_taken_for_html():
    words = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "DOMParser", "new Function")
    assert not [word for word in words if word in BODY]


def test_every_field_has_a_label():
    for field in re.findall(r"<(?:input|textarea|select)[^>]*>", BODY):
        name = re.search(r'id="([\w-]+)"', field)
        before = BODY[: BODY.index(field)]
        in_label = before.rfind("<label") > before.rfind("</label>")
        assert in_label or "aria-label=" in field, name
