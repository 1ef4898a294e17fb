"""How numbers are written for people: scores, counts, amounts, sizes and durations, in every message and table."""

from __future__ import annotations

import math
import re

_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff]"
)
"""What a terminal or a browser obeys instead of showing: escape sequences, marks of direction, blanks of no width; and
halves of characters, which cannot be written at all."""


def visible(text: str) -> str:
    """A text of somebody else's as it really is: what would be obeyed and not seen is named instead (`<U+001B>`)."""
    return _UNSEEN.sub(lambda found: f"<U+{ord(found[0]):04X}>", text)


def number(value: float | None, *, signed: bool = False) -> str:
    """A score or a difference to three decimals; '-' for none."""
    if value is None or math.isnan(value):
        return "-"
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return text.replace("-0.000", "0.000").replace("+0.000", "0.000") if float(text) == 0 else text


def probability(value: float) -> str:
    """`p = 0.021`, `p < 0.0001`: two digits, and no more zeros than mean something."""
    return f"p = {value:.2g}" if value >= 1e-4 else "p < 0.0001"


def probability_cell(value: float) -> str:
    """The same for a column of them: `0.021`, `< 0.0001`."""
    return probability(value).removeprefix("p ").removeprefix("= ")


def counted(n: int, noun: str) -> str:
    """`1 example`, `75 examples`."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def amount(value: float) -> str:
    """`1,500`, `0.25`: whole where it is whole, else six digits."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.6g}"


def dollars(value: float) -> str:
    """`$1.50`, `$0.00023`: cents, or two digits of what is less than a dollar."""
    digits = 2 if value >= 1 or value == 0 else min(8, 1 - math.floor(math.log10(value)))
    return f"${value:,.{digits}f}"


def ceiling(name: str, value: float) -> str:
    """`400 calls`, `$2`, `5,000 input tokens`: one of the ceilings of a `Budget`, by the name it has there."""
    return f"${value:,g}" if name == "usd" else f"{value:,.10g} {name.replace('_', ' ')}"


def size(n_bytes: float, *, rough: bool = False) -> str:
    """Bytes as people say them: `812.4 MB`, `3.4 GB`.

    Args:
        n_bytes: at least 0.
        rough: for what is estimated: megabytes are whole, and the least unit.
    """
    if rough and n_bytes < 10**9:
        return f"{n_bytes / 10**6:.0f} MB"
    for unit, n_in_unit in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= n_in_unit:
            return f"{n_bytes / n_in_unit:.1f} {unit}"
    return f"{n_bytes:.0f} bytes"


def duration(seconds: float, *, rough: bool = False) -> str:
    """Seconds as people say them: `42 s`, `3 min 20 s`, `2 h 05 min`.

    Args:
        seconds: at least 0.
        rough: for what is estimated: one unit only (`48 s`, `12 min`, `3.4 h`).
    """
    if rough:
        if seconds < 90:
            return f"{seconds:.0f} s"
        return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
