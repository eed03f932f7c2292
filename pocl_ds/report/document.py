"""One HTML file with its styles, scripts and data. A content security policy blocks all else.

Functions that return HTML escape the text they are given, unless it is named `html`.
"""

from __future__ import annotations

import base64
import hashlib
import html as html_module
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pocl_ds.report.charts import Chart
from pocl_ds.report.colors import css_variables
from pocl_ds.report.formatting import UNPRINTABLE, escape_html

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("uplot.js", "charts.js", "scatter.js", "lists.js", "page.js")
STYLES = ("uplot.css", "report.css")


def html_document(title: str, html: str, data: dict[str, Any], *, subsets: int = 1) -> str:
    """The page.

    Args:
        html: the body.
        data: what the scripts read.
        subsets: number of subsets that need a color.
    """
    styles = [_read_asset(name) for name in STYLES] + [css_variables(subsets)]
    scripts = [_read_asset(name) for name in SCRIPTS]
    policy = (
        f"default-src 'none'; script-src {_hashes(scripts)}; style-src {_hashes(styles)}; "
        "base-uri 'none'; form-action 'none'"
    )
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape_html(title)} · POCL report</title>",
        *(f"<style>{style}</style>" for style in styles),
    ]
    tail = "".join(f"<script>{script}</script>" for script in scripts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{"".join(head)}</head>'
        f"<body><main>{_add_contents(html)}</main>"
        f'<script type="application/json" id="data">{embed_json(data)}</script>{tail}'
        "</body></html>\n"
    )


def embed_json(data: Any) -> str:
    """JSON that cannot end its script element, even if its texts contain tags."""
    text = json.dumps(_printable(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def page_header(kind: str, title: str, lead: str) -> str:
    """The top of a page. kind: for example `run report`."""
    return (
        f'<header><p class="eyebrow">POCL distillation · {escape_html(kind)}</p>'
        f"<h1>{escape_html(title)}</h1>"
        f'<p class="lead">{escape_html(lead)}</p></header>'
    )


def html_table(header: Sequence[str], html: str, *, css: str = "", caption: str = "") -> str:
    """A table that scrolls if it is too wide. html: its rows."""
    head = "".join(f'<th scope="col">{escape_html(name)}</th>' for name in header)
    caption_html = f"<caption>{escape_html(caption)}</caption>" if caption else ""
    label = f' aria-label="{escape_html(caption or "table")}"'
    return (
        f'<div class="scroll" role="region" tabindex="0"{label}>'
        f'<table class="{css}">{caption_html}<thead><tr>{head}</tr></thead>'
        f"<tbody>{html}</tbody></table></div>"
    )


def html_rows(rows: Sequence[Sequence[object]]) -> str:
    """The rows of a table."""
    return "".join(f"<tr>{row_cells(row)}</tr>" for row in rows)


def row_cells(values: Sequence[object]) -> str:
    """The cells of a row; the first is its heading."""
    heading, *cells = (escape_html(value) for value in values)
    return f'<th scope="row">{heading}</th>' + "".join(f"<td>{cell}</td>" for cell in cells)


def section(title: str, *html: str, anchor: str, note: str = "") -> str:
    """A section of the page; nothing if all its parts are empty."""
    if not any(html):
        return ""
    return (
        f'<section id="{anchor}"><h2>{escape_html(title)}</h2>'
        f"{paragraph_note(note) if note else ''}{''.join(html)}</section>"
    )


def paragraph_note(text: str) -> str:
    """A paragraph in small print."""
    return f'<p class="note">{escape_html(text)}</p>'


def details(title: str, html: str) -> str:
    """A part that opens on a click."""
    return f"<details><summary>{escape_html(title)}</summary>{html}</details>"


def preformatted(text: str) -> str:
    """Preformatted text, for example a recipe."""
    return f'<pre tabindex="0">{escape_html(text)}</pre>'


def chart_figures(charts: Sequence[Chart], start: int) -> str:
    """Empty figures, which the script fills. start: index of the first chart in data.charts."""
    figures = []
    for index, chart in enumerate(charts, start):
        wide = " wide" if chart["wide"] else ""
        note = chart["note"] and f"<figcaption>{escape_html(chart['note'])}</figcaption>"
        figures.append(
            f'<figure class="chart{wide}" data-chart="{index}">'
            f"<h3>{escape_html(chart['title'])}</h3>"
            f'<div class="legend"></div><div class="plot"></div>{note}</figure>'
        )
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def filter_list(name: str, menus: Sequence[tuple[str, str]]) -> str:
    """A list to search and filter, which the script fills. menus: (field, label)."""
    menu_html = "".join(
        f'<label>{escape_html(label)}<select data-field="{field}"></select></label>'
        for field, label in menus
    )
    return (
        f'<div class="filter-list" data-list="{name}"><div class="controls" role="search">'
        '<label class="wide">Search'
        f'<input type="search" autocomplete="off" spellcheck="false"></label>{menu_html}</div>'
        '<p class="count note" role="status"></p><div class="rows"></div>'
        f'<nav class="pager" aria-label="pages of {name}"></nav></div>'
    )


def bar_cell(share: float) -> str:
    """A table cell with a bar. share: 0 to 1 of its width."""
    return (
        '<td class="meter"><svg aria-hidden="true">'
        f'<rect width="{100 * share:.1f}%" height="100%" rx="5"/></svg></td>'
    )


def _add_contents(html: str) -> str:
    """Add links to the sections after the header. Text from data is escaped, so it cannot look like
    a section.
    """
    sections = re.findall(r'<section id="(\w+)"><h2>(.*?)</h2>', html)
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title in sections)
    navigation = f'<nav class="contents" aria-label="sections">{links}</nav>'
    return html.replace("</header>", f"</header>{navigation}", 1)


def _read_asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _hashes(texts: Sequence[str]) -> str:
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return html_module.escape(" ".join(f"'sha256-{digest}'" for digest in digests), quote=False)


def _printable(value: Any) -> Any:
    """A tree of plain values without characters that a page cannot hold."""
    if isinstance(value, str):
        return UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {key: _printable(entry) for key, entry in value.items()}
    return [_printable(entry) for entry in value] if isinstance(value, (list, tuple)) else value
