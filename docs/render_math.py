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


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with the text of each page."""
    return _TOKENS.sub(_replace, markdown)


def _replace(match: re.Match[str]) -> str:
    if match["code"] is not None:
        return match[0]
    if match["inline"] is not None:
        return convert(match["inline"])
    tag = _TAG.search(match["display"])
    formula = convert(_TAG.sub("", match["display"]).strip(), display="block")
    if tag is None:
        return f'<div class="equation">{formula}</div>'
    number = f'<span class="equation-number">({tag[1]})</span>'
    return f'<div class="equation" id="eq-{tag[1]}">{formula}{number}</div>'
