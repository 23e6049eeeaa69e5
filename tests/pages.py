"""What a report says, read from its HTML."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """`tables`: caption → rows of cells, the heads first; `sections`: id → text; `references`: what the page would load or go to."""

    def __init__(self, html: str):
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.sections: dict[str, str] = {}
        self.references: list[str] = re.findall(r"url\(([^)]*)\)|@import", html)
        self.names: list[str] = []  # ids
        self.labels: list[str] = []  # of the plots
        self.section, self.caption, self.inside = "", "", ""
        self.rows: list[list[str]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.references += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data", "action")]
        self.names += [given["id"]] if "id" in given else []
        self.inside = tag
        match tag:
            case "section":
                self.section = given["id"]
            case "svg":
                self.labels.append(given["aria-label"])
            case "table":
                self.rows, self.caption = [], ""
            case "tr":
                self.rows.append([])
            case "td" | "th":
                self.rows[-1].append("")

    def handle_data(self, data):
        self.sections[self.section] = self.sections.get(self.section, "") + data
        if self.inside in ("td", "th"):
            self.rows[-1][-1] += data
        elif self.inside == "caption":
            self.caption += data

    def handle_endtag(self, tag):
        self.inside = ""
        if tag == "table":
            assert self.caption not in self.tables, f"two tables are called {self.caption!r}"
            self.tables[self.caption] = self.rows

    def columns(self, caption: str) -> dict[str, list[str]]:
        heads, *rows = self.tables[caption]
        return {head: [row[i] for row in rows] for i, head in enumerate(heads)}


def number(text: str) -> float | None:
    return None if text == "–" else float(text.replace(",", ""))
