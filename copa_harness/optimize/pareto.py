"""Two objectives: the score, and what an answer costs. The front of both, and the choice from it.

    COPA(..., prefer="cheapest within 1 point of best")

Symbols: s = mean validation score, 0..1, higher is better; c = cost per answer, lower is better. A candidate is on the
front when no other is at least as good in both and better in one. "One point" is 0.01 of mean score. Knows numbers;
knows nothing of programs or searches.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from copa_harness.errors import ConfigurationError

OBJECTIVES = {"cheapest": "usd", "fastest": "seconds", "shortest": "prompt_tokens"}
"""Word -> what is minimized; without prices "cheapest" means the fewest tokens, in and out."""

_GRAMMAR = re.compile(r"(cheapest|fastest|shortest) within (\d+(?:\.\d+)?) points? of (?:the )?best")


@dataclass(frozen=True, slots=True)
class Preference:
    """Which of the good candidates is returned: the one that minimizes `objective` within `within` of the best."""

    objective: str
    within: float

    def __str__(self) -> str:
        word = next(word for word, objective in OBJECTIVES.items() if objective == self.objective)
        return f"{word} within {100 * self.within:g} point{'' if self.within == 0.01 else 's'} of best"


def parse_preference(text: str | None) -> Preference | None:
    """The preference in words, `"cheapest within 1 point of best"`; None or "best" for the best score.

    Raises:
        ConfigurationError: None of the known forms.
    """
    if text is None or text == "best":
        return None
    match = _GRAMMAR.fullmatch(" ".join(text.lower().split())) if isinstance(text, str) else None
    if match is None:
        raise ConfigurationError(
            f"got prefer={text!r}; expected 'best' or '<{'|'.join(OBJECTIVES)}> within <number> points of best', for "
            "instance 'cheapest within 1 point of best'"
        )
    return Preference(OBJECTIVES[match.group(1)], float(match.group(2)) / 100)


def pareto_front(points: Sequence[tuple[float, float]]) -> tuple[int, ...]:
    """Indices of the (score, cost) points on the front, cheapest first; of equal points the first."""
    order = sorted(range(len(points)), key=lambda i: (points[i][1], -points[i][0], i))
    front: list[int] = []
    best = float("-inf")
    for i in order:
        if points[i][0] > best:
            front.append(i)
            best = points[i][0]
    return tuple(front)


def preferred(points: Sequence[tuple[float, float]], *, within: float, at_least: float = float("-inf")) -> int:
    """The cheapest point within `within` of the best score and not below `at_least`; of equals the better, the first.

    Raises:
        ValueError: There is no point.
    """
    best = max(score for score, _ in points)
    good = [i for i, (score, _) in enumerate(points) if score >= max(best - within, min(at_least, best)) - 1e-9]
    return min(good, key=lambda i: (points[i][1], -points[i][0], i))
