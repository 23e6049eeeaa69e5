"""Plots as SVG text that lies in a page: its ink is the page's, so it is legible on light and dark."""

from __future__ import annotations

import html
import io
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito 2008, colours that colour-blind readers tell apart, without the yellow; lines differ in their dashes too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = "os^Dv*"
INK, FAINT = "#010203", "#808080"  # the first becomes the colour of the page's text
STYLE: Any = {  # matplotlib's type of it names every key there is
    "svg.fonttype": "none", "svg.hashsalt": "distmtl", "font.size": 9, "axes.titlesize": 10, "font.family": "sans-serif",
    "text.color": INK, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "axes.titlecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.grid": True, "grid.color": FAINT, "grid.alpha": 0.25, "grid.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "legend.fontsize": 8.5, "lines.linewidth": 1.6, "lines.markersize": 3.5, "image.composite_image": False,
    "axes.formatter.useoffset": False,
}  # fmt: skip
WIDTH = 11.2  # inches of a row of panels
POINTS = 300  # of a line that is drawn
COLUMNS = 3  # of panels


@dataclass(frozen=True)
class Line:
    """A series. Gaps (None) are drawn as gaps."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: int = 0  # lines of one style are one thing
    faint: bool = False  # a bound or reference, dotted and without marks
    span: Sequence[tuple[float, float]] = ()  # an interval around every y


@dataclass(frozen=True)
class Panel:
    title: str
    x: str  # labels of the axes, with units
    y: str
    lines: list[Line] = field(default_factory=list)
    marks: Sequence[float] = ()  # x of vertical lines
    square: bool = False  # both axes from 0 to the greatest value of either
    names: Sequence[str] = ()  # of the whole numbers on the x axis


def lines(panels: Sequence[Panel], title: str) -> str:
    """Panels side by side, one legend for all."""
    with matplotlib.rc_context(STYLE):
        columns = min(max(len(panels), 2), COLUMNS)
        rows = -(-len(panels) // columns)
        height = 3.6 if any(p.square for p in panels) else 2.5
        figure = Figure(figsize=(WIDTH, height * rows + 0.5), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, panel in zip(grid, panels, strict=False):
            _draw(axes, panel)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        labelled = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        if len(labelled) > 1:
            figure.legend(labelled.values(), labelled.keys(), loc="outside lower left", ncols=min(len(labelled), 5), handlelength=3.4)
        return svg(figure, title)


def _draw(axes: Axes, panel: Panel) -> None:
    axes.set_title(shortened(panel.title, 44), loc="left")
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    for mark in panel.marks:
        axes.axvline(mark, color=INK, linewidth=1, linestyle=(0, (1, 2)), label="restart")
    for line in panel.lines:
        x, y = thinned(line.x, [math.nan if v is None else v for v in line.y])
        look = _look(line.style)
        if line.faint:
            look |= {"linestyle": (0, (1, 2)), "linewidth": 1.2}
        elif np.isfinite(y).sum() <= 30:
            look["marker"] = MARKERS[line.style % len(MARKERS)]
        axes.plot(x, y, label=shortened(line.label, 40), **look)
        if line.span:
            axes.fill_between(
                x, [low for low, _ in line.span], [high for _, high in line.span], color=look["color"], alpha=0.18, linewidth=0
            )
    if panel.square:
        ends = [high for line in panel.lines for _, high in line.span]
        most = 1.03 * max([v for line in panel.lines for v in (*line.x, *line.y) if v is not None] + ends, default=1.0)
        axes.set(xlim=(0, most), ylim=(0, most))
        axes.set_aspect("equal")
    if panel.names:
        every = max(len(panel.names) // 6, 1)
        axes.set_xticks(range(0, len(panel.names), every), [shortened(n, 14) for n in panel.names[::every]], rotation=25, ha="right")
    if axes.get_ylim()[0] > 0 and axes.get_ylim()[1] / axes.get_ylim()[0] > 1e3:
        axes.set_yscale("log")


def _look(style: int) -> dict[str, Any]:
    """Colour and dashes: no two alike among the first len(COLOURS) · len(DASHES)."""
    again = style // len(COLOURS)
    return {"color": COLOURS[style % len(COLOURS)], "linestyle": DASHES[(style + again) % len(DASHES)]}


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS of a series, evenly spaced; both ends stay."""
    kept = np.unique(np.linspace(0, len(x) - 1, POINTS).astype(int)) if len(x) > POINTS else np.arange(len(x))
    return np.asarray(x, float)[kept], np.asarray(y, float)[kept]


@dataclass(frozen=True)
class Map:
    """Values in rows and columns; None where there is none."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    x: str = ""
    y: str = ""


def heat_maps(maps: Sequence[Map], title: str, unit: str, span: tuple[float, float], form: str = "") -> str:
    """Maps with one scale: from dark blue to yellow, or where its span is around 0, from orange to purple.

    Args:
        form: of the numbers that are written into the cells; "" writes none.
    """
    style: Any = {**STYLE, "axes.grid": False}
    with matplotlib.rc_context(style):
        columns = min(COLUMNS, len(maps))
        rows = -(-len(maps) // columns)
        tall = max(len(m.rows) for m in maps)
        height = 0.24 * tall + (1.1 if maps[0].x or len(maps[0].columns) < 20 else 0.8)
        across = max(len(m.columns) for m in maps)
        room = WIDTH if not form else min(WIDTH, columns * (2.4 + 0.75 * across) + 0.6)
        figure = Figure(figsize=(room, height * rows + 0.2), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        colours = matplotlib.colormaps["PuOr" if span[0] < 0 else "cividis"].with_extremes(bad=(0.5, 0.5, 0.5, 0.25))
        for axes, m in zip(grid, maps, strict=False):
            values = np.array([[math.nan if v is None else v for v in row] for row in m.values], float)
            image = axes.imshow(values, cmap=colours, vmin=span[0], vmax=span[1], aspect="auto", interpolation="none")
            axes.set_title(shortened(m.title, 60), loc="left")
            axes.set(xlabel=m.x, ylabel=m.y)
            axes.set_yticks(range(len(m.rows)), [shortened(r, 26) for r in m.rows])
            _name_columns(axes, m, turned=bool(form) and max(map(len, m.columns)) > 9)
            for (i, j), v in np.ndenumerate(values) if form else ():
                colour = INK if math.isnan(v) else "white" if sum(image.cmap(image.norm(v))[:3]) < 1.5 else "black"
                axes.text(j, i, _number(v, form), ha="center", va="center", fontsize=8, color=colour)
        for axes in grid[len(maps) :]:
            axes.set_axis_off()
        figure.colorbar(image, ax=grid[: len(maps)].tolist(), label=unit, fraction=0.04, aspect=12, pad=0.01)
        return svg(figure, title)


def _number(value: float, form: str) -> str:
    if math.isnan(value):
        return "·"
    text = format(value, form)
    return text if float(text) else format(0.0, form)  # no -0.0


def _name_columns(axes: Axes, m: Map, turned: bool) -> None:
    every = max(-(-len(m.columns) * max(map(len, m.columns)) // 40), 1) if not turned else 1
    names = [shortened(c, 18) for c in m.columns[::every]]
    axes.set_xticks(range(0, len(m.columns), every), names, rotation=25 if turned else 0, ha="right" if turned else "center")


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, one per name, with the span of what they are the mean of."""

    title: str
    x: str
    names: Sequence[str]
    values: Sequence[float | None]
    low: Sequence[float]
    high: Sequence[float]


def bars(panels: Sequence[Bars], title: str) -> str:
    """Panels side by side that share their names."""
    with matplotlib.rc_context(STYLE):
        columns = min(len(panels), COLUMNS)
        rows = -(-len(panels) // columns)
        height = 0.19 * max(len(p.names) for p in panels) + 0.9
        figure = Figure(figsize=(WIDTH, height * rows + 0.2), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, p in zip(grid.flatten(), panels, strict=False):
            y, values = np.arange(len(p.names)), np.array([math.nan if v is None else v for v in p.values], float)
            axes.barh(y, values, color=COLOURS[0], height=0.7)
            axes.hlines(y, p.low, p.high, color=INK, linewidth=1.1)
            axes.axvline(0, color=INK, linewidth=0.8)
            axes.set_title(shortened(p.title, 44), loc="left")
            axes.set_xlabel(p.x)
            axes.set_yticks(y, [shortened(n, 30) for n in p.names])
            axes.set_ylim(len(p.names) - 0.4, -0.6)
            axes.grid(axis="y", visible=False)
            axes.ticklabel_format(axis="x", scilimits=(-3, 3))
            axes.locator_params(axis="x", nbins=4)
        for axes in grid.flatten()[len(panels) :]:
            axes.set_axis_off()
        return svg(figure, title)


@dataclass(frozen=True)
class Piece:
    """Of a bar: a table's part on a rank."""

    bar: int
    name: str
    size: float
    kind: str


def stacked(pieces: Sequence[Piece], names: Sequence[str], x: str, title: str) -> str:
    """A bar per name, its pieces side by side, coloured and hatched by their kind, with their name where there is room."""
    hatches = ("", "//", "..", "xx", "\\\\", "++")
    style: Any = {**STYLE, "hatch.color": "#ffffff", "hatch.linewidth": 0.5}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, 0.42 * len(names) + 1.3), layout="constrained")
        axes = figure.subplots()
        ends, kinds = [0.0] * len(names), list(dict.fromkeys(p.kind for p in pieces))
        most = max(sum(p.size for p in pieces if p.bar == b) for b in range(len(names)))
        for p in pieces:
            k = kinds.index(p.kind)
            axes.barh(
                p.bar, p.size, left=ends[p.bar], color=COLOURS[k % len(COLOURS)], hatch=hatches[k % len(hatches)], edgecolor="white",
                linewidth=0.8, label=p.kind,
            )  # fmt: skip
            if p.size > most * (0.008 * len(p.name) + 0.012):
                middle = ends[p.bar] + p.size / 2
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
                axes.text(middle, p.bar, p.name, ha="center", va="center", color="black", fontsize=8, bbox=box)
            ends[p.bar] += p.size
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel(x)
        axes.grid(axis="y", visible=False)
        labelled = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(labelled.values(), labelled.keys(), loc="outside lower left", ncols=5)
        return svg(figure, title)


def shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def svg(figure: Figure, title: str) -> str:
    """The figure as an element of a page. Its identifiers begin with a number of its own, since a page must not have one twice."""
    with io.StringIO() as file:
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        text = file.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)
    text = re.sub(r"\s+\n", "\n", text)
    prefix = f"f{zlib.crc32((title + text).encode()):x}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", text)
    text = text.replace(INK, "currentColor")
    head, rest = text.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)
    width = re.search(r'width="([\d.]+)pt"', head)
    assert view and width
    style = f"width:{float(width[1]) * 4 / 3:.0f}px"
    return f'<svg {view[0]} style="{style}" role="img" aria-label="{html.escape(title)}">{rest}'
