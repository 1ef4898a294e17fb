"""The best few programs of a search: which they are, whether the best is better than chance, and what they cost.

**Finalists** (`finalists_of`, `chosen`). The best of many candidates scored on the same rows is partly the luckiest:
among those within a row or two of one another the order says nothing more. So the finalists are scored on other rows,
and the search's rows, on which they were selected, count half (`SEARCH_WEIGHT`). Other rows are validation rows held
back, where there are enough (see `adoption`), else training rows that no finalist shows or was trained on. The latter
are no evidence of how good a program is, since rules may come from them, but they tell finalists apart.

Measured on development tasks (4 tasks, 3 splits, 25 validation rows, 400 calls; mean test score): p .841 before, .864
with 26 training rows; joint .887 and .908; p -> w -> p .916 and .915.

**The paired test** (`chosen_p_value`). Symbols: d_ci = score of candidate c minus that of the reference on row i, 0
where either has none; s_i = a random sign, the same for all candidates. If no candidate were better or worse than the
reference, the signs of a row's differences would be a coin flip. The p-value of a candidate chosen among all of them is
the chance that the best of them, ``max_c sum_i s_i d_ci``, would have gained as much as it did (single-step max:
Westfall and Young 1993, "Resampling-Based Multiple Testing", section 2.3). Candidates that are right on the same rows
cost little, as they should: six programs that mend the same mistakes are one finding, not six. With one candidate it is
the exact sign-flip test, for right/wrong scores McNemar's. What it cannot correct for are candidates that were dropped
before they had a full score (`adoption` says what that means).

**Score and cost** (`pareto_front`, `preferred`). Symbols: s = mean validation score, 0..1, higher is better; c = cost
per answer, lower is better. A candidate is on the front when no other is at least as good in both and better in one.
``prefer="cheapest within 1 point of best"`` chooses from it; "one point" is 0.01 of mean score.

Pure functions of scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from copa_harness.evaluate.examples import plain
from copa_harness.judge.paired_tests import sign_flip_sums
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.racing import MAX_ENUMERATED, Scores, worse_p_value
from copa_harness.optimize.search.scoring import Validation

N_FINALISTS = 3
"""The more, the more calls; four were no better than three."""

SEARCH_WEIGHT = 0.5
"""Weight of a row of the search beside one that did not choose the finalists."""

MAX_ERRORS_BEHIND = 2.0
"""Standard errors of the paired difference by which a finalist may be behind the best on the search's rows."""

N_DRAWS = 9_999
"""Random sign patterns where there are too many to count; a p-value near 0.2 is then known to 0.008 (95 %)."""


def finalists_of(
    validation: Validation,
    candidates: Sequence[Candidate],
    best: Candidate,
    *,
    reference: Candidate,
    part: Candidate | None = None,
) -> tuple[Candidate, ...]:
    """The incumbent, and the best others: fully scored, not clearly worse, and not below the reference.

    Args:
        validation: The search's rows.
        candidates: Who may be returned.
        best: The incumbent.
        reference: The program as written.
        part: Of the others the one that comes first, whatever its place.
    """
    others = {one.key: one for one in candidates if one.key != best.key and validation.is_complete(one)}
    ranked = sorted(others.values(), key=lambda one: (-validation.mean(one), one.size))
    close = [
        one
        for one in ranked
        if validation.difference(one, best) >= -MAX_ERRORS_BEHIND * validation.standard_error(one, best) - 1e-9
        and validation.difference(one, reference) >= -1e-9
    ]
    if part is not None:
        close.sort(key=lambda one: one.key != part.key)
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


def chosen_p_value(reference: Scores, chosen: Scores, others: Sequence[Scores] = ()) -> float:
    """One-sided p-value of "the chosen candidate is no better than the reference", it being one of several.

    Args:
        reference: Scores of the program compared with, by row.
        chosen: Scores of the candidate.
        others: Scores of those it was chosen among, with or without itself.

    Returns:
        0..1; 1.0 when the chosen one gained nothing.
    """
    differences = np.array([_differences(reference, scores) for scores in (chosen, *others)])
    differences = np.unique(differences, axis=0) if len(differences) > 1 else differences
    gain = float(sum(_differences(reference, chosen)))
    if gain <= 1e-9:
        return 1.0
    if len(differences) == 1:
        new, old = differences[0], np.zeros(differences.shape[1])
        return worse_p_value(new.tolist(), old.tolist())
    differences = differences[:, np.any(np.abs(differences) > 1e-12, axis=0)]
    k = differences.shape[1]
    if k <= MAX_ENUMERATED:
        return float(np.mean(sign_flip_sums(differences.T).max(axis=1) >= gain - 1e-9))
    signs = np.random.default_rng(0).choice((-1, 1), size=(N_DRAWS, k))
    return float((1 + np.sum((signs @ differences.T).max(axis=1) >= gain - 1e-9)) / (1 + N_DRAWS))


def least_p_value(reference: Scores) -> float:
    """The p-value of a single candidate with full marks on every row: no result can have a smaller one."""
    known = [score for score in reference if score is not None]
    return worse_p_value([1.0] * len(known), known)


def _differences(reference: Scores, scores: Scores) -> list[float]:
    pairs = zip(reference, scores, strict=True)
    return [0.0 if old is None or new is None else new - old for old, new in pairs]


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
