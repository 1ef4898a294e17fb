"""Whether the best of several candidates is better than what they were compared with, row by row.

Symbols: d_ci = score of candidate c minus that of the reference on row i, 0 where either has none; s_i = a random
sign, the same for all candidates. If no candidate were better or worse than the reference, the signs of a row's
differences would be a coin flip. The p-value of a candidate chosen among all of them is the chance that the best of
them, ``max_c sum_i s_i d_ci``, would have gained as much as it did (single-step max: Westfall and Young 1993,
"Resampling-Based Multiple Testing", section 2.3). Candidates that are right on the same rows cost little, as they
should: six programs that mend the same mistakes are one finding, not six. With one candidate it is the exact sign-flip
test, for right/wrong scores McNemar's.

What it cannot correct for are candidates that were dropped before they had a full score: see `evidence`. Pure functions
of scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from copa_harness.optimize.racing import MAX_ENUMERATED, worse_p_value
from copa_harness.optimize.sheets import Sheet

N_DRAWS = 9_999
"""Random sign patterns where there are too many to count; a p-value near 0.2 is then known to 0.008 (95 %)."""


def chosen_p_value(reference: Sheet, chosen: Sheet, others: Sequence[Sheet] = ()) -> float:
    """One-sided p-value of "the chosen candidate is no better than the reference", it being one of several.

    Args:
        reference: Scores of the program compared with, by row.
        chosen: Scores of the candidate.
        others: Scores of those it was chosen among, with or without itself.

    Returns:
        0..1; 1.0 when the chosen one gained nothing.
    """
    differences = np.array([_differences(reference, sheet) for sheet in (chosen, *others)])
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
        signs = 1 - 2 * ((np.arange(2**k)[:, None] >> np.arange(k)) & 1)
        return float(np.mean((signs @ differences.T).max(axis=1) >= gain - 1e-9))
    signs = np.random.default_rng(0).choice((-1, 1), size=(N_DRAWS, k))
    return float((1 + np.sum((signs @ differences.T).max(axis=1) >= gain - 1e-9)) / (1 + N_DRAWS))


def least_p_value(reference: Sheet) -> float:
    """The p-value of a single candidate with full marks on every row: no result can have a smaller one."""
    known = [score for score in reference if score is not None]
    return worse_p_value([1.0] * len(known), known)


def _differences(reference: Sheet, sheet: Sheet) -> list[float]:
    pairs = zip(reference, sheet, strict=True)
    return [0.0 if old is None or new is None else new - old for old, new in pairs]
