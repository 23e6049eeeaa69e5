"""Sections as one HTML file that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

TABLE_ROWS = 60  # of a series: evenly spaced ones, with both ends

STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, CanvasText 22%, Canvas); --faint: color-mix(in srgb, CanvasText 5%, Canvas); }
body { margin: 0; background: Canvas; color: CanvasText; font: 16px/1.5 system-ui, sans-serif; }
header, nav, main { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
h1 { font-size: 1.6rem; margin: 1.2rem 0 0.2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 0.3rem; border-top: 1px solid var(--line); padding-top: 1.2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 0; overflow-wrap: anywhere; }
p { max-width: 46rem; margin: 0.4rem 0; overflow-wrap: anywhere; }
figure { margin: 0.8rem 0 0.2rem; }
svg { display: block; max-width: 100%; height: auto; }
svg image { image-rendering: pixelated; }
svg text { font-family: "DejaVu Sans", Verdana, system-ui, sans-serif !important; }
nav ol { columns: 3 14rem; padding-left: 1.4rem; }
a { color: LinkText; }
:focus-visible { outline: 3px solid #E69F00; outline-offset: 2px; }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 8px; top: 8px; background: Canvas; padding: 6px; }
.scroll { overflow-x: auto; max-height: 40rem; border: 1px solid var(--line); }
details { margin: 0.4rem 0; }
summary { cursor: pointer; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 4px 10px; }
th, td { padding: 2px 10px; text-align: right; border-bottom: 1px solid var(--line); }
th, td { white-space: pre-wrap; max-width: 46rem; overflow-wrap: break-word; }
th { background: var(--faint); }
.word { text-align: left; }
.none { border-left: 4px solid var(--line); padding-left: 10px; }
.alarm { border-left: 4px solid #D55E00; padding-left: 10px; }
@media print { nav { display: none; } }
"""


@dataclass(frozen=True)
class Table:
    """Words to the left, numbers to the right; None is a dash."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]
    shown: bool = False  # or behind a summary


@dataclass(frozen=True)
class Plot:
    title: str
    svg: str


@dataclass
class Section:
    """What it shows and how to read it, in a sentence or two; then headings, plots and tables, as they come."""

    name: str
    title: str
    text: str
    parts: list[Plot | Table | str] = field(default_factory=list)  # a str is a heading
    alarms: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # why something that is looked for here is not there


def page(title: str, intro: Sequence[str], sections: Sequence[Section], refresh_s: float | None = None) -> str:
    """
    Args:
        refresh_s: after which a browser loads it again.
    """
    e = html.escape
    refresh = f'<meta http-equiv="refresh" content="{refresh_s:.0f}">' if refresh_s else ""
    contents = "".join(f'<li><a href="#{s.name}">{e(s.title)}</a></li>' for s in sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{refresh}<link rel="icon" href="data:,">'
        f"<title>{e(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        f'<a class="skip" href="#{sections[0].name}">Skip to the first section</a>\n'
        f"<header><h1>{e(title)}</h1>{''.join(f'<p>{e(line)}</p>' for line in intro)}</header>\n"
        f'<nav aria-label="Contents"><ol>{contents}</ol></nav>\n<main>\n{"".join(map(_section, sections))}</main>\n</body>\n</html>\n'
    )


def _section(s: Section) -> str:
    e = html.escape
    out = [f'<section id="{s.name}" aria-labelledby="{s.name}-title">\n<h2 id="{s.name}-title">{e(s.title)}</h2>\n<p>{e(s.text)}</p>\n']
    out += [f'<p class="alarm"><strong>Alarm.</strong> {e(text)}</p>\n' for text in s.alarms]
    for part in s.parts:
        if isinstance(part, str):
            out.append(f"<h3>{e(part)}</h3>\n")
        elif isinstance(part, Plot):
            out.append(f"<figure>{part.svg}<figcaption>{e(part.title)}</figcaption></figure>\n")
        else:
            out.append(_table(part))
    out += [f'<p class="none">{e(text)}</p>\n' for text in s.missing]
    return "".join([*out, "</section>\n"])


def _table(t: Table) -> str:
    e = html.escape
    words = [all(isinstance(row[i], str) for row in t.rows) for i in range(len(t.heads))]
    css = [' class="word"' if w else "" for w in words]
    head = "".join(f'<th scope="col"{c}>{e(h)}</th>' for h, c in zip(t.heads, css, strict=True))
    body = "".join("<tr>" + "".join(f"<td{c}>{e(cell(v))}</td>" for v, c in zip(row, css, strict=True)) + "</tr>\n" for row in t.rows)
    table = f"<table><caption>{e(t.caption)}</caption><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>"
    table = f'<div class="scroll" tabindex="0" role="region" aria-label="{e(t.caption)}">{table}</div>'
    return f"{table}\n" if t.shown else f"<details><summary>Numbers: {e(t.caption)}</summary>{table}</details>\n"


def cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def series_rows(rows: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """At most TABLE_ROWS of them, evenly spaced, with both ends."""
    n = len(rows)
    kept = range(n) if n <= TABLE_ROWS else sorted({round(i * (n - 1) / (TABLE_ROWS - 1)) for i in range(TABLE_ROWS)})
    return [rows[i] for i in kept]
