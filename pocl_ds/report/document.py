"""One HTML file that needs nothing beside it: styles, scripts and data are in it, and nothing else
may run or be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pocl_ds.report.charts import Chart
from pocl_ds.report.colours import variables
from pocl_ds.report.formatting import UNPRINTABLE, escaped

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("uplot.js", "charts.js", "plane.js", "lists.js", "page.js")
STYLES = ("uplot.css", "report.css")


def document(title: str, body: str, data: dict[str, Any], *, subsets: int = 1) -> str:
    """The page: `body` is HTML that is escaped already, `data` what its scripts read. subsets: how
    many need a colour.
    """
    styles = [_asset(name) for name in STYLES] + [variables(subsets)]
    scripts = [_asset(name) for name in SCRIPTS]
    policy = (
        f"default-src 'none'; script-src {_hashes(scripts)}; style-src {_hashes(styles)}; "
        f"base-uri 'none'; "
        "form-action 'none'"
    )
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escaped(title)} · POCL report</title>",
        *(f"<style>{style}</style>" for style in styles),
    ]
    tail = "".join(f"<script>{script}</script>" for script in scripts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{"".join(head)}</head><body><main>{_with_contents(body)}</main>'
        f'<script type="application/json" id="data">{embedded(data)}</script>{tail}</body></html>\n'
    )


def embedded(data: Any) -> str:
    """JSON that can end neither its own element nor the file's encoding, whatever its texts hold."""
    text = json.dumps(_printable(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def table(header: Sequence[str], rows: str, *, css: str = "", caption: str = "") -> str:
    """A table that scrolls by itself where it is too wide. rows: HTML."""
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in header)
    name = f"<caption>{escaped(caption)}</caption>" if caption else ""
    label = f' aria-label="{escaped(caption or "table")}"'
    return (
        f'<div class="scroll" role="region" tabindex="0"{label}><table class="{css}">{name}<thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def cells(values: Sequence[object]) -> str:
    """The cells of a row; the first is its heading."""
    first, *others = (escaped(value) for value in values)
    return f'<th scope="row">{first}</th>' + "".join(f"<td>{value}</td>" for value in others)


def section(title: str, *parts: str, anchor: str, note: str = "") -> str:
    """A section of the page; nothing where it has no parts."""
    if not any(parts):
        return ""
    said = f'<p class="note">{escaped(note)}</p>' if note else ""
    return f'<section id="{anchor}"><h2>{escaped(title)}</h2>{said}{"".join(parts)}</section>'


def folded(title: str, body: str) -> str:
    """Something to open."""
    return f"<details><summary>{escaped(title)}</summary>{body}</details>"


def figures(charts: Sequence[Chart], first: int) -> str:
    """Places for charts, which the script fills. first: where they begin in data.charts."""
    found = []
    for number, chart in enumerate(charts, first):
        wide = " wide" if chart["wide"] else ""
        note = f"<figcaption>{escaped(chart['note'])}</figcaption>" if chart["note"] else ""
        found.append(
            f'<figure class="chart{wide}" data-chart="{number}"><h3>{escaped(chart["title"])}</h3>'
            f'<div class="legend"></div><div class="plot"></div>{note}</figure>'
        )
    return f'<div class="charts">{"".join(found)}</div>' if found else ""


def browser(name: str, selects: Sequence[tuple[str, str]]) -> str:
    """A list to search and filter, which the script fills. selects: (field, label) of its menus."""
    menus = "".join(
        f'<label>{escaped(label)}<select data-field="{field}"></select></label>'
        for field, label in selects
    )
    return (
        f'<div class="browser" data-browser="{name}"><div class="controls" role="search"><label class="wide">Search'
        f'<input type="search" autocomplete="off" spellcheck="false"></label>{menus}</div>'
        '<p class="count note" role="status"></p><div class="rows"></div>'
        f'<nav class="pager" aria-label="pages of {name}"></nav></div>'
    )


def bar(share: float) -> str:
    """A bar in a table's cell, 0 to 1 of its width."""
    return f'<td class="meter"><svg aria-hidden="true"><rect width="{100 * share:.1f}%" height="100%" rx="5"/></svg></td>'


def _with_contents(body: str) -> str:
    """The body with links to its sections behind the header. Text from data cannot look like a
    section: it is escaped.
    """
    found = re.findall(r'<section id="(\w+)"><h2>(.*?)</h2>', body)
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title in found)
    return body.replace(
        "</header>", f'</header><nav class="contents" aria-label="sections">{links}</nav>', 1
    )


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _hashes(texts: Sequence[str]) -> str:
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return html.escape(" ".join(f"'sha256-{digest}'" for digest in digests), quote=False)


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {key: _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, (list, tuple)) else value
