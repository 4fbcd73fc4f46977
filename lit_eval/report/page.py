"""Puts sections into one self-contained HTML file: style, script and data are in it, and it can request nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from lit_eval.report.elements import Section, escape, paragraph

MOST_BYTES = 2_000_000
POINTS = (1600, 800, 400, 200, 100, 50)  # of a line; fewer where the page would be too large
HERE = Path(__file__).parent


def page(kind: str, title: str, state: str, head: str, sections: Sequence[Section], notices: Sequence[str] = ()) -> str:
    """The HTML of a page.

    Args:
        kind: the kind of report, above the title.
        state: a line below the title.
        head: HTML under it.
        notices: sentences shown above everything else.
    """
    style, script = (HERE / "page.css").read_text("utf-8"), (HERE / "page.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Nothing but this script runs, and nothing is loaded: a text that slipped through unescaped would stay a text.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    shown = [section for section in sections if section.content]
    links = "".join(f'<li><a href="#{s.id}">{escape(s.title)}</a></li>' for s in shown)
    body = "".join(
        f'<section id="{s.id}" aria-labelledby="{s.id}-title"><h2 id="{s.id}-title">{escape(s.title)}</h2>'
        f"{s.content}</section>"
        for s in shown
    )
    notice = f'<div class="notice" role="note">{"".join(paragraph(n, "") for n in notices)}</div>' if notices else ""
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}: {escape(kind.lower())}</title><link rel="icon" href="data:,"><style>\n{style}</style>'
        '</head><body><a class="skip" href="#content">Skip to the content</a>'
        f'<header class="wide"><p class="kind">{escape(kind)}</p><h1>{escape(title)}</h1>'
        f'<p class="state">{escape(state)}</p>{notice}{head}</header>'
        f'<nav aria-label="Sections"><div class="wide"><ul>{links}</ul>'
        '<button id="theme" type="button">Theme: system</button></div></nav>'
        f'<main id="content" class="wide">{body}</main>'
        f'<footer><div class="wide"><p>Written by llammlein on {made}.</p></div></footer>'
        f"<script>{script}</script></body></html>\n"
    )


def fit(build: Callable[[int], str]) -> str:
    """The page that `build` makes with as many points a line as MOST_BYTES allow."""
    made = ""
    for points in POINTS:
        made = build(points)
        if len(made.encode()) < MOST_BYTES:
            break
    return made
