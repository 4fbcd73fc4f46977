"""Pieces of HTML: escaped text, tables that sort, tiles of facts, sections."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lit_eval.formats import MISSING


def escape(value: object) -> str:
    """Text for an element or a quoted attribute. Control characters, which HTML cannot hold, become spaces."""
    text = "".join(c if c >= " " or c in "\n\t" else " " for c in str(value) if not "\ud800" <= c <= "\udfff")
    return html.escape(text, quote=True)


def script_json(value: Any) -> str:
    """JSON inside a <script> element: no `<`, so that no string in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.encode("utf-8", "replace").decode()  # without lone surrogates, as from undecodable file names
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


@dataclass(frozen=True)
class Cell:
    """A table's cell.

    Attributes:
        html: its content, escaped.
        key: to sort by: a number or a text; None sorts last.
    """

    html: str
    key: float | str | None = None


@dataclass(frozen=True)
class Column:
    """A table's column; numbers align to the right."""

    title: str
    numeric: bool = True
    hint: str = ""


def text_cell(value: object) -> Cell:
    return Cell(escape(value), str(value).casefold())


def number_cell(shown: str, value: float | None) -> Cell:
    """A number as it is shown, sorted by its value."""
    if value is not None and not math.isfinite(value):
        value = None if math.isnan(value) else math.copysign(1e308, value)
    return Cell(escape(shown), value)


def bar_cell(shown: str, value: float, largest: float, colour: int = 1) -> Cell:
    """A number with a bar under it, as long as its share of the largest."""
    width = 0.0 if not largest > 0 else max(0.0, min(100.0, 100 * value / largest))
    bar = f'<svg class="bar c{colour}" aria-hidden="true"><rect width="{width:.2f}%" height="100%"/></svg>'
    return Cell(f"<span>{escape(shown)}</span>{bar}", value)


def table(caption: str, columns: Sequence[Column], rows: Sequence[Sequence[Cell]], *, sortable: bool = True) -> str:
    """A table with a caption for screen readers, in a box that scrolls sideways where it is too wide."""
    head = []
    for column in columns:
        kind = ' class="num"' if column.numeric else ""
        hint = f' title="{escape(column.hint)}"' if column.hint else ""
        title = escape(column.title)
        label = f'<button type="button">{title}</button>' if sortable and len(rows) > 1 else title
        head.append(f'<th scope="col"{kind}{hint}>{label}</th>')
    body = []
    for row in rows:
        cells = []
        for i, (column, cell) in enumerate(zip(columns, row, strict=True)):
            kind = ' class="num"' if column.numeric else ""
            key = "" if cell.key is None else f' data-key="{escape(cell.key)}"'
            tag = 'th scope="row"' if i == 0 and not column.numeric else "td"
            cells.append(f"<{tag}{kind}{key}>{cell.html}</{tag.split()[0]}>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    kind = ' class="sortable"' if sortable and len(rows) > 1 else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table{kind}>'
        f"<caption>{escape(caption)}</caption><thead><tr>{''.join(head)}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def tiles(facts: Iterable[tuple[str, str, str]]) -> str:
    """Large numbers: (label, value, remark below it)."""
    shown = [
        f"<div><dt>{escape(label)}</dt><dd><b>{escape(value)}</b>"
        + (f"<small>{escape(remark)}</small>" if remark else "")
        + "</dd></div>"
        for label, value, remark in facts
        if value != MISSING
    ]
    return f'<dl class="tiles">{"".join(shown)}</dl>' if shown else ""


def pairs(facts: Iterable[tuple[str, object]]) -> str:
    """A list of names and values."""
    shown = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    return f'<dl class="pairs">{shown}</dl>'


def details(summary: str, content: str, *, opened: bool = False) -> str:
    return f"<details{' open' if opened else ''}><summary>{escape(summary)}</summary>{content}</details>"


def paragraph(text: str, kind: str = "note") -> str:
    return f'<p class="{kind}">{escape(text)}</p>'


@dataclass(frozen=True)
class Section:
    """A part of the page with its entry in the navigation; left out if it has no content."""

    id: str
    title: str
    content: str
