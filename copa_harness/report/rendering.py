"""How every table is drawn: alignment, wrapped names, notes below, intervals in brackets."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from html import escape
from typing import Literal

from copa_harness.formatting import visible
from copa_harness.results import Interval

Style = Literal["terminal", "markdown", "html"]

MAX_WIDTH = 120
"""Columns of a terminal that a line of explanation may fill."""

_MAX_NAME_WIDTH = 20


def draw(
    rows: Sequence[Sequence[str]],
    headers: Sequence[str],
    *,
    style: Style,
    n_text: int,
    last_text: bool = False,
    wrap: bool = True,
) -> str:
    """Draw with the first `n_text` columns (and the last, if asked) left-aligned, the others right-aligned.

    In a terminal long names of those columns stand on several lines, unless `wrap` is False.
    """
    from tabulate import tabulate

    n_right = len(headers) - n_text - last_text
    alignment = ["left"] * n_text + ["right"] * n_right + ["left"] * last_text
    rows = [[visible(cell) for cell in row] for row in rows]
    if style == "html":
        return str(tabulate(rows, headers=list(headers), tablefmt="html", colalign=alignment, disable_numparse=True))
    if style == "markdown":
        texts = {*range(n_text), *([len(headers) - 1] if last_text else [])}
        cells = [[plain_markdown(cell) if i in texts else cell for i, cell in enumerate(row)] for row in rows]
        return tabulate(cells, headers=list(headers), tablefmt="github", colalign=alignment, disable_numparse=True)
    # The header goes in as a row: tabulate widens every column by two for a header of its own.
    wrapped = [[_wrapped(cell) if wrap and i < n_text else cell for i, cell in enumerate(row)] for row in rows]
    lines = tabulate(
        [list(headers), *wrapped], tablefmt="presto", colalign=alignment, disable_numparse=True
    ).splitlines()
    rule = "".join("+" if character == "|" else "-" for character in lines[0])
    return "\n".join(line.rstrip() for line in (lines[0], rule, *lines[1:]))


def table(
    rows: Sequence[Sequence[str]],
    titles: str,
    *notes: str,
    style: Style,
    n_text: int,
    last_text: bool = False,
) -> str:
    """Rows under `task|strategy|n` with lines of explanation below; "" without rows."""
    drawn = draw(rows, titles.split("|"), style=style, n_text=n_text, last_text=last_text) if rows else ""
    return with_notes(drawn, notes, style=style) if rows else ""


def opening(index: int, *names: str) -> list[str]:
    """Names that stand in the first line of several and are left out in the others."""
    return [name if index == 0 else "" for name in names]


def plain_markdown(text: str) -> str:
    """Text on one line, with what Markdown or HTML would read as markup escaped."""
    escaped = re.sub(r"([<>*`\[\]\\|]|\b_|_\b)", r"\\\1", visible(" ".join(text.split())))
    return re.sub(r"([@#])(?=\w)", r"\1<!-- -->", escaped)  # names and numbers become links after Markdown is read


def _wrapped(text: str) -> str:
    """A name on several lines if it is long, broken after a blank or an underscore."""
    lines = [""]
    for piece in re.findall(r"[^\s_]*[\s_]*", text):
        if lines[-1] and len(lines[-1] + piece.rstrip()) > _MAX_NAME_WIDTH:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def with_notes(table: str, notes: Sequence[str], *, style: Style) -> str:
    """A table, if there is one, with lines of explanation below it."""
    if style == "html":
        return "\n".join([*([table] if table else []), *(f"<p>{escape(visible(note))}</p>" for note in notes)])
    if style == "markdown":
        return "\n\n".join([*([table] if table else []), *notes])
    lines = [
        textwrap.fill(
            note,
            MAX_WIDTH,
            initial_indent="  ",
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for note in notes
    ]
    return "\n".join([*([table] if table else []), *lines])


def bounds(interval: Interval | None, *, signed: bool = False) -> str:
    """` [.85, .97]`, or "" for none."""
    if interval is None:
        return ""
    return f" [{_short(interval.low, signed=signed)}, {_short(interval.high, signed=signed)}]"


def _short(value: float, *, signed: bool) -> str:
    """`.85`, `1.00`, `+.05`: two decimals without the leading zero."""
    text = f"{value:+.2f}" if signed else f"{value:.2f}"
    return text.replace("0.", ".", 1) if abs(float(text)) < 1 else text
