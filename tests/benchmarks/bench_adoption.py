"""How often a search adopts something though nothing is better: `adoption_p` where candidates are raced.

    python tests/benchmarks/bench_adoption.py            # three minutes; nothing is asked of a model

Every candidate is truly as good as the program as written (right on 60 % of rows), or truly five points worse; one row
in five comes out otherwise by chance. Candidates are raced by the search's own rule (mistakes first, in blocks of four,
`next_rows`, `cannot_catch_up`, `worse_p_value`), the best one stands for the search, and the paired test of
`chosen_p_value` is held to adoption_p = 0.2, and beside it the same where the best one must not lose on 26 training
rows either. Of 120 rows a quarter is held back, as in a search: there the test is on rows that chose none of the three
finalists, and its p-value is one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2])]

from copa_harness.optimize.finalists import SEARCH_WEIGHT, chosen_p_value  # noqa: E402
from copa_harness.optimize.options import SearchOptions  # noqa: E402
from copa_harness.optimize.search.racing import cannot_catch_up, look_level, next_rows, worse_p_value  # noqa: E402

LEVEL = SearchOptions().adoption_p
RIGHT, MOVED, BLOCK, N_FRESH = 0.6, 0.2, 4, 26


def rerun(scores, rng, *, drop=0.0):
    """Scores of a program whose true mean is `drop` below that of the program with these scores."""
    lost, gained = (MOVED + drop) / 2 / RIGHT, (MOVED - drop) / 2 / (1 - RIGHT)
    moved = rng.random(scores.size) < np.where(scores == 1, lost, gained)
    return np.where(moved, 1 - scores, scores)


def raced(scores, incumbent):
    """The scores a candidate has when the race is over; None where it was dropped before."""
    seen: dict[int, float] = {}
    level = look_level(0.1, -(-len(incumbent) // BLOCK))
    while len(seen) < len(incumbent):
        seen |= {i: float(scores[i]) for i in next_rows(incumbent, seen=seen, size=BLOCK)}
        before = [incumbent[i] for i in (*seen, *(i for i in range(len(incumbent)) if i not in seen))]
        after = list(seen.values())
        if cannot_catch_up(before, after, ties_lose=True):
            break
        if len(seen) >= 4 and worse_p_value(before[: len(seen)], after) < level:
            break
    return [seen.get(i) for i in range(len(incumbent))]


def held_back(n_rows, n_candidates, rng, *, drop):
    """The same where a quarter of the rows is held back: the p-value is of these, among three finalists."""
    n_search = n_rows - n_rows // 4
    truth = (rng.random(n_rows) < RIGHT).astype(float)
    written, best, complete = truth[:n_search].tolist(), truth[:n_search].tolist(), []
    for _ in range(n_candidates):
        found = rerun(truth, rng, drop=drop)
        scores = raced(found[:n_search], best)
        if None not in scores:
            complete.append(found)
            best = scores if sum(scores) > sum(best) else best
    if best == written:
        return 1.0, 0.0
    finalists = sorted(complete, key=lambda one: -one[:n_search].sum())[:3]
    winner = max(finalists, key=lambda one: SEARCH_WEIGHT * one[:n_search].sum() + one[n_search:].sum())
    fresh = [one[n_search:].tolist() for one in (truth, winner, *finalists)]
    return chosen_p_value(fresh[0], fresh[1], fresh[2:]), float((winner - truth)[n_search:].mean())


def search(n_rows, n_candidates, rng, *, drop):
    """(p-value of the winner, what it gains on fresh rows); (1, 0) where nothing won."""
    truth = (rng.random(n_rows + N_FRESH) < RIGHT).astype(float)
    written = truth[:n_rows].tolist()
    best, fresh, complete = written, truth[n_rows:], []
    for _ in range(n_candidates):
        found = rerun(truth, rng, drop=drop)
        scores = raced(found[:n_rows], best)
        if None not in scores:
            complete.append(scores)
            if sum(scores) > sum(best):
                best, fresh = scores, found[n_rows:]
    if best is written:
        return 1.0, 0.0
    return chosen_p_value(written, best, complete), float((fresh - truth[n_rows:]).mean())


def adoption_rates(n_rows, n_candidates, *, drop=0.0, n_searches=100, seed=0):
    """(share of searches that adopt, the same with 26 fresh rows)."""
    rng = np.random.default_rng([seed, n_rows, n_candidates])
    find = held_back if n_rows >= 80 else search
    ends = [find(n_rows, n_candidates, rng, drop=drop) for _ in range(n_searches)]
    passed = [(p <= LEVEL, p <= LEVEL and gain >= 0) for p, gain in ends]
    return tuple(float(np.mean(column)) for column in zip(*passed, strict=True))


def main():
    print(f"adopted at adoption_p = {LEVEL:g}, and with {N_FRESH} fresh rows, when every candidate is")
    print(f"{'rows':>5} {'candidates':>11}   {'as good':>13}   {'5 points worse':>14}")
    for n_rows in (25, 60, 120):
        for n_candidates in (20, 40, 100):
            cells = [adoption_rates(n_rows, n_candidates, drop=drop) for drop in (0.0, 0.05)]
            print(f"{n_rows:>5} {n_candidates:>11}   " + "   ".join(f"{a:>5.2f} {b:>5.2f}  " for a, b in cells))


if __name__ == "__main__":
    main()
