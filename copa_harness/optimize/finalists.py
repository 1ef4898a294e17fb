"""Finalists: the best few of a search, looked at once more on examples that did not choose them.

The best of many candidates scored on the same rows is partly the luckiest: among those within a row or two of one
another the order says nothing more. So the finalists are scored on other rows, and the search's rows, on which they
were selected, count half (`SEARCH_WEIGHT`). Other rows are validation rows held back, where there are enough (see
`evidence`), else training rows that no finalist shows. The latter are no evidence of how good a program is, since
weights and rules may come from them, but they tell finalists apart.

Measured on development tasks (4 tasks, 3 splits, 25 validation rows, 400 calls; mean test score): p .841 before, .864
with 26 training rows; joint .887 and .908; p -> w -> p .916 and .915. Knows candidates, examples and scores; knows
nothing of budgets or of what is done with the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from copa_harness.evaluate.examples import plain
from copa_harness.optimize.candidate import Candidate
from copa_harness.optimize.scoring import Validation

N_FINALISTS = 3
"""The more, the more calls; four were no better than three."""

SEARCH_WEIGHT = 0.5
"""Weight of a row of the search beside one that did not choose the finalists."""

MAX_ERRORS_BEHIND = 2.0
"""Standard errors of the paired difference by which a finalist may be behind the best on the search's rows."""


def finalists_of(
    validation: Validation, candidates: Sequence[Candidate], best: Candidate, *, reference: Candidate
) -> tuple[Candidate, ...]:
    """The incumbent, and the best others: fully scored, not clearly worse, and not below the reference.

    Args:
        validation: The search's rows.
        candidates: Who may be returned.
        best: The incumbent.
        reference: The program as written.
    """
    others = {one.key: one for one in candidates if one.key != best.key and validation.is_complete(one)}
    ranked = sorted(others.values(), key=lambda one: (-validation.mean(one), one.size))
    close = [
        one
        for one in ranked
        if validation.difference(one, best) >= -MAX_ERRORS_BEHIND * validation.standard_error(one, best) - 1e-9
        and validation.difference(one, reference) >= -1e-9
    ]
    return (best, *close[: N_FINALISTS - 1])


def unshown(examples: Sequence[Any], candidates: Sequence[Candidate]) -> list[int]:
    """Which examples none of the candidates shows among its demonstrations.

    A demonstration shows an example when they agree in every field both have, inputs among them. What an inner stage
    shows may hold none of the example's inputs; that cannot be told and does not count.
    """
    shown = [dict(demo) for candidate in candidates for part in candidate.parts for demo in part.demos]
    return [i for i, example in enumerate(examples) if not any(_is_of(demo, example) for demo in shown)]


def _is_of(demo: Mapping[str, Any], example: Any) -> bool:
    inputs = set(example.inputs().keys()) & set(demo)
    both = set(example.keys()) & set(demo)
    return bool(inputs) and all(plain(demo[name]) == plain(example[name]) for name in both)


def chosen(finalists: Sequence[Candidate], *, search: Validation, fresh: Validation) -> Candidate:
    """The finalist with the best mean over both kinds of rows, the search's at `SEARCH_WEIGHT`; the first of equals."""

    def pooled(candidate: Candidate) -> float:
        known = [(SEARCH_WEIGHT, score) for score in search.scores(candidate) if score is not None]
        known += [(1.0, score) for score in fresh.scores(candidate) if score is not None]
        return sum(weight * score for weight, score in known) / sum(weight for weight, _ in known)

    scores = [round(pooled(candidate), 9) for candidate in finalists]
    return finalists[scores.index(max(scores))]
