"""Tables as text: cells that are strings already."""

from __future__ import annotations

from collections.abc import Collection, Sequence

Lines = Sequence[Sequence[str]]


def aligned(title: Sequence[str], lines: Lines, left: Collection[int] = ()) -> str:
    """For a terminal. `left`: the columns that are words; numbers stand to the right."""
    widths = [max(map(len, column)) for column in zip(title, *lines, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in (title, *lines)
    )


def piped(title: Sequence[str], lines: Lines, left: Collection[int] = ()) -> str:
    """For Markdown."""
    rule = ["---" if i in left else "---:" for i in range(len(title))]
    return "\n".join(f"| {' | '.join(c.replace('|', '/') for c in line)} |" for line in (title, rule, *lines))
