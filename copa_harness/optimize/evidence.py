"""The last look: which finalist is returned, and whether it is better than what came in.

Where there are enough validation examples and calls, a share of the rows is held back from the search. At the end the
finalists and the program as written are scored on them, the best finalist is taken (see `finalists`), and it must not
lose to the program as written there. Where there are too few, training rows that no finalist shows decide among the
finalists alone. Either way the program as written is only given up on paired evidence: the exact one-sided sign-flip
test of the differences (for right/wrong scores the sign test, McNemar's) must reach a level. Where no validation rows
are held back the test flatters the winner, and the record says so.

Knows runs, candidates and their scores; knows nothing of how candidates were found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from copa_harness.errors import BudgetExhausted
from copa_harness.judge.paired import PairedDifference, paired_difference
from copa_harness.optimize.allowance import Allowance, OutOfCalls, step_scope
from copa_harness.optimize.candidate import Candidate
from copa_harness.optimize.finalists import N_FINALISTS, chosen, finalists_of, unshown
from copa_harness.optimize.racing import worse_p_value
from copa_harness.optimize.schema import strata_of, stratified_order
from copa_harness.optimize.scoring import Validation
from copa_harness.optimize.settings import RunSettings
from copa_harness.optimize.strategy import Step, StepKind
from copa_harness.results import Phase

if TYPE_CHECKING:
    from copa_harness.optimize.run import Run

HELD_BACK_SHARE = 1 / 4
"""Of the validation rows, those held back."""

MIN_HELD_BACK = 20
"""Fewer rows decide nothing, and the search needs them more."""

MIN_TRAINING_ROWS = 12
"""Fewer training rows do not tell finalists apart."""

BUDGET_SHARE = 0.2
"""Of the budget, what the last look may cost at most."""


def n_held_back(n_validation: int, *, calls: float, calls_per_example: int) -> int:
    """How many validation rows the search does not get to see; 0 when there are not enough rows or calls.

    Args:
        n_validation: Validation rows.
        calls: The budget, `inf` for none.
        calls_per_example: Upper estimate of what one row costs.
    """
    n = _affordable(int(n_validation * HELD_BACK_SHARE), calls, (N_FINALISTS + 1) * calls_per_example)
    return n if n >= MIN_HELD_BACK else 0


def _affordable(n: int, calls: float, cost: float) -> int:
    return n if math.isinf(calls) else min(n, int(BUDGET_SHARE * calls / cost))


@dataclass(frozen=True, slots=True)
class LastLook:
    """What is set aside for the end of a run.

    Attributes:
        held_back: Validation rows the search does not see, None where there are not enough.
        n_training: Training rows at most to tell finalists apart by, 0 where rows are held back or calls are few.
        cost: Calls it may take.
        level: Of the paired test against the program as written, 0..1; 1 keeps whatever scored at least as well.
    """

    held_back: Validation | None = None
    n_training: int = 0
    cost: int = 0
    level: float = 1.0


def planned(
    whole: Validation,
    student: Candidate,
    steps: Sequence[Step],
    settings: RunSettings,
    *,
    n_training: int,
    calls: float,
) -> tuple[Validation, LastLook]:
    """What the search scores on, and what is set aside for its end: nothing for DSPy's optimizers alone.

    Args:
        whole: All validation rows.
        student: For what a row costs.
        steps: What will be done. Who asks for DSPy's optimizers by name wants to see what they do.
        settings: Their seed decides which rows are held back; both parts have about the same mix of labels.
        n_training: Training rows there are.
        calls: The budget.
    """
    if all(step.kind in (StepKind.OPTIMIZER, StepKind.NONE) for step in steps):
        return whole, LastLook()
    cost = whole.calls_per_example(student)
    n = n_held_back(whole.n, calls=calls, calls_per_example=cost)
    if n == 0:
        n = _affordable(n_training, calls, N_FINALISTS * cost)
        n = n if n >= MIN_TRAINING_ROWS else 0
        return whole, LastLook(None, n, N_FINALISTS * n * cost, settings.adoption_p)
    order = [int(i) for i in stratified_order(strata_of(whole.examples), np.random.default_rng([settings.seed, 606]))]
    held_back = whole.part(sorted(order[:n]))
    return whole.part(sorted(order[n:])), LastLook(held_back, 0, (N_FINALISTS + 1) * n * cost, settings.adoption_p)


@contextmanager
def setting_aside(run: Run, look: LastLook) -> Iterator[None]:
    """Hold the run to its budget less what the last look will cost."""
    whole = run.scope
    if not look.cost or math.isinf(whole.budget.calls):
        yield
        return
    try:
        with step_scope(Allowance(whole, whole.budget.calls - look.cost), name="search") as run.scope:
            yield
    finally:
        run.scope = whole


def decide(run: Run, look: LastLook) -> Mapping[str, Any]:
    """Choose among the finalists, and keep the choice or go back to the program as written; the evidence.

    Args:
        run: A run whose steps are over.
        look: What was set aside.

    Returns:
        A record of plain numbers; empty when nothing was found, or when the program as written is no alternative
        because it breaks a limit or has no score.
    """
    student, validation, level = run.student, run.validation, look.level
    if run.forbids(student) is not None or not validation.is_complete(student) or run.incumbent.key == student.key:
        return {}
    allowed = [one for one in validation.completed() if run.forbids(one) is None and one.key != student.key]
    sheets = [validation]
    finalists = finalists_of(validation, allowed, run.incumbent)
    if look.held_back is not None or (look.n_training and len(finalists) > 1):
        with run.recorded("last look", len(run.notes)):
            sheets.extend(_look_again(run, look, finalists))
    found, p_value = _compared(student, run.incumbent, sheets), _p_value(student, run.incumbent, sheets)
    fresh = _compared(student, run.incumbent, sheets[1:])
    loses_unseen = fresh.n > 0 and fresh.difference < -1e-9
    adopted = p_value <= level and not loses_unseen
    shown = fresh if fresh.n else found
    what = f"{found.n_better} of {found.n} rows better, {found.n_worse} worse, p = {p_value:.2g}, paired and one-sided"
    if fresh.n:
        what += f"; {fresh.difference:+.3f} on the {fresh.n} rows the search did not use"
    elif len(allowed) > 1:
        what += f"; on rows that chose it among {len(allowed)}, so it flatters"
    if adopted:
        run.note(f"evidence for the result: {what}")
    else:
        why = "it loses on rows the search did not use" if loses_unseen else f"p is above adoption_p = {level:g}"
        told = f"the program as written is returned: the best found has {what}, which is no evidence ({why})"
        run.note(told, headline=True)
        run.incumbent = student
    return {
        "n": found.n, "unseen": fresh.n, "n_tried": len(allowed), "difference": shown.difference,
        "low": shown.interval.low, "high": shown.interval.high, "gained": found.n_better, "lost": found.n_worse,
        "p_value": p_value, "level": level, "adopted": adopted,
    }  # fmt: skip


def _look_again(run: Run, look: LastLook, finalists: Sequence[Candidate]) -> list[Validation]:
    """Score the finalists on other rows and make the best of them the incumbent.

    Returns:
        The rows held back, if the student was scored on them as well: they are evidence.
    """
    if look.held_back is not None:
        fresh, scored, what = look.held_back, (run.student, *finalists), "validation rows the search did not use"
    else:
        rows = unshown(run.trainset, finalists)[: look.n_training]
        if len(rows) < MIN_TRAINING_ROWS:
            return []
        fresh = run.validation.over([run.trainset[i] for i in rows])
        scored, what = (*finalists,), "training rows none shows"
    try:
        for candidate in scored:
            fresh.complete(candidate, allowance=Allowance(run.scope, math.inf), phase=Phase.SEARCH)
    except (OutOfCalls, BudgetExhausted):
        run.note(f"the budget does not pay for scoring {len(finalists)} finalists on {fresh.n} {what}")
        return []
    run.note(
        f"{len(finalists)} finalists scored on {fresh.n} {what}: "
        + ", ".join(f"{run.validation.mean(one):.3f} -> {fresh.mean(one):.3f}" for one in finalists)
    )
    run.incumbent = chosen(finalists, search=run.validation, fresh=fresh)
    return [fresh] if look.held_back is not None else []


def _pairs(before: Candidate, after: Candidate, sheets: Sequence[Validation]) -> tuple[list[float], list[float]]:
    pairs = [
        (old, new)
        for sheet in sheets
        for old, new in zip(sheet.scores(before), sheet.scores(after), strict=True)
        if old is not None and new is not None
    ]
    return [old for old, _ in pairs], [new for _, new in pairs]


def _compared(before: Candidate, after: Candidate, sheets: Sequence[Validation]) -> PairedDifference:
    old, new = _pairs(before, after, sheets)
    return paired_difference(old, new, ids=[str(i) for i in range(len(old))])


def _p_value(before: Candidate, after: Candidate, sheets: Sequence[Validation]) -> float:
    """One-sided, of "no better than before"."""
    old, new = _pairs(before, after, sheets)
    return worse_p_value(new, old)
