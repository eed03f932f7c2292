"""An mkdocs hook: turn `$formulas$` and `$$equations$$` into MathML when the site is built.

Browsers render MathML natively, so that the site needs no script and no network. A display
equation may carry a number, as in `\\tag{9}`, and then gets the anchor `#eq-9`.
"""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

# Code is matched first, so that a dollar sign in it is left alone.
_TOKENS = re.compile(
    r"(?P<code>^(?P<fence>```+|~~~+).*?^(?P=fence)[ \t]*$|`[^`\n]+`)"
    r"|\$\$(?P<display>.+?)\$\$"
    r"|(?<![\\\w])\$(?!\s)(?P<inline>[^$\n]+?)(?<!\s)\$(?!\w)",
    re.MULTILINE | re.DOTALL,
)
_TAG = re.compile(r"\\tag\{(\d+)\}")
# Markdown must not read a formula's underscores, nor take <math> for the start of a block: until
# the page is HTML, a formula is a span that holds its LaTeX in hexadecimal digits.
_HIDDEN = re.compile(r'<span class="(formula|display-formula)">([0-9a-f]+)</span>')


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with the Markdown of each page."""
    return _TOKENS.sub(_hide, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs with the HTML of each page."""
    return _HIDDEN.sub(_show, html)


def _hide(match: re.Match[str]) -> str:
    if match["code"] is not None:
        return match[0]
    if match["inline"] is not None:
        return _span("formula", match["inline"])
    tag = _TAG.search(match["display"])
    formula = _span("display-formula", _TAG.sub("", match["display"]).strip())
    if tag is None:
        return f'<div class="equation">{formula}</div>'
    number = f'<span class="equation-number">({tag[1]})</span>'
    return f'<div class="equation" id="eq-{tag[1]}">{formula}{number}</div>'


def _span(name: str, latex: str) -> str:
    return f'<span class="{name}">{latex.encode().hex()}</span>'


def _show(match: re.Match[str]) -> str:
    latex = bytes.fromhex(match[2]).decode()
    return convert(latex, display="block" if match[1] == "display-formula" else "inline")
