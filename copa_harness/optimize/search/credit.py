"""Who earned the gain: every part of every stage of the winner, by leaving parts out again.

Symbols: k parts in which winner and student differ (weights, instruction or demonstrations of one predictor); a cell S
is the student with the winner's setting in the parts of S; v_e(S) its score on validation example e, so v_e({}) is the
student's and v_e(all) the winner's. A part's credit on example e is

    leave one out    v_e(all) - v_e(all without p)
    Shapley value    the mean of v_e(S + p) - v_e(S) over all orders in which the parts could have been added

(Shapley 1953; for prompts and data: Ghorbani and Zou 2019, arXiv 1904.02868). Shapley values add up to the whole gain
and need all 2^k cells, so they are taken for up to three parts when those are scored or affordable; otherwise parts are
left out one at a time, and a part whose cell is not affordable is not measured. Credits are means over the validation
examples the winner was chosen on, so they flatter it, and an interval would not cover the truth as often as it says.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from copa_harness.errors import BudgetExhausted
from copa_harness.optimize.search.candidate import Candidate, model_name
from copa_harness.optimize.search.scoring import Validation
from copa_harness.optimize.step_budget import CallBudget, OutOfCalls
from copa_harness.results import Phase

if TYPE_CHECKING:
    from copa_harness.optimize.run import Run

MAX_SHAPLEY_PARTS = 3
"""Parts up to which all 2^k cells are scored."""

CREDIT_SHARE = 0.1
"""Of the budget, what finding out who earned the gain may use of the calls the search left over."""

KINDS = ("weights", "instruction", "demonstrations")

Cell = frozenset["CreditedPart"]


def credit_of(run: Run) -> dict[str, Any]:
    """Who earned a finished run's gain, measured with calls its search left over; a phase of its own if it cost any."""
    if run.incumbent.key == run.student.key:
        return {}
    whole = run.scope.budget.calls
    with run.recorded("credit", only_if_charged=True):
        return assign_credit(
            run.student,
            run.incumbent,
            validation=run.validation,
            allowance=run.capped(math.inf if math.isinf(whole) else math.floor(CREDIT_SHARE * whole)),
        )


def assign_credit(
    student: Candidate,
    winner: Candidate,
    *,
    validation: Validation,
    allowance: CallBudget,
) -> dict[str, Any]:
    """Split the winner's gain among its parts; plain JSON types.

    Cells scored before cost nothing; missing ones are scored in a fixed order, each only if the allowance pays for it
    whole.

    Args:
        student: The program as given, fully scored.
        winner: The program to be returned, fully scored, of the same structure.
        validation: Where both were scored.
        allowance: Calls for the missing cells.

    Returns:
        ``method``, ``n`` examples, ``total`` and ``parts``, each part with gain and its own method; empty
        when nothing changed or the two cannot be compared part by part.
    """
    if student.structure or winner.structure:  # an optimizer changed the program itself
        return {}
    parts = changed_parts(student, winner)
    if not parts or not (validation.is_complete(student) and validation.is_complete(winner)):
        return {}
    wanted = [frozenset(parts) - {part} for part in parts]
    if len(parts) <= MAX_SHAPLEY_PARTS:
        sizes = range(len(parts) - 2, 0, -1)
        wanted += [frozenset(some) for size in sizes for some in itertools.combinations(parts, size)]
    cells: dict[Cell, Candidate] = {frozenset(): student, frozenset(parts): winner}
    for cell in wanted:
        candidate = mixed(student, winner, cell)
        if _scored(candidate, validation, allowance):
            cells[cell] = candidate
    is_shapley = len(cells) == 2 ** len(parts)
    scores = {cell: validation.scores(candidate) for cell, candidate in cells.items()}
    rows = [i for i in range(validation.n) if all(found[i] is not None for found in scores.values())]
    if not rows:
        return {}
    values = {cell: np.array([found[i] or 0.0 for i in rows]) for cell, found in scores.items()}
    credited = []
    for part in parts:
        if is_shapley:
            row = {"gain": _mean(_shapley(part, parts, values)), "method": "Shapley value"}
        elif (without := frozenset(parts) - {part}) in values:
            row = {"gain": _mean(values[frozenset(parts)] - values[without]), "method": "leave one out"}
        else:
            row = {"gain": None, "method": "not measured"}
        credited.append({"predictor": part.predictor, "part": part.kind, **row})
    methods = list(dict.fromkeys(str(row["method"]) for row in credited))
    return {
        "method": ", ".join(methods),
        "n": len(rows),
        "n_cells": len(cells),
        "total": {"gain": _mean(values[frozenset(parts)] - values[frozenset()])},
        "parts": credited,
    }


@dataclass(frozen=True, slots=True, order=True)
class CreditedPart:
    """One setting of one predictor; the predictor is "" for weights that all predictors share."""

    predictor: str
    kind: str


def changed_parts(student: Candidate, winner: Candidate) -> tuple[CreditedPart, ...]:
    """The parts in which two candidates of one program differ, in the program's order.

    Weights that were one model and became one model are one part.
    """
    found: list[CreditedPart] = []
    pairs = list(zip(student.parts, winner.parts, strict=True))
    shared = len({model_name(old.lm) for old, _ in pairs}) == len({model_name(new.lm) for _, new in pairs}) == 1
    if shared and model_name(pairs[0][0].lm) != model_name(pairs[0][1].lm):
        found.append(CreditedPart("", "weights"))
    for old, new in pairs:
        differs = (
            not shared and model_name(old.lm) != model_name(new.lm),
            old.instruction != new.instruction,
            old.demos != new.demos,
        )
        found.extend(CreditedPart(old.predictor, kind) for kind, changed in zip(KINDS, differs, strict=True) if changed)
    return tuple(found)


def mixed(student: Candidate, winner: Candidate, parts: Iterable[CreditedPart]) -> Candidate:
    """The student with the winner's settings in some parts."""
    chosen = set(parts)

    def has(predictor: str, kind: str) -> bool:
        return CreditedPart(predictor, kind) in chosen or (kind == "weights" and CreditedPart("", kind) in chosen)

    pairs = list(zip(student.parts, winner.parts, strict=True))
    candidate = student.with_lms(tuple(new.lm if has(old.predictor, "weights") else old.lm for old, new in pairs))
    candidate = candidate.with_instructions(
        {new.predictor: new.instruction for _, new in pairs if has(new.predictor, "instruction")}
    )
    return candidate.with_demos({new.predictor: new.demos for _, new in pairs if has(new.predictor, "demonstrations")})


def _scored(candidate: Candidate, validation: Validation, allowance: CallBudget) -> bool:
    try:
        validation.complete(candidate, allowance=allowance, phase=Phase.SEARCH)
    except (OutOfCalls, BudgetExhausted):
        return False
    return validation.is_complete(candidate) and not math.isnan(validation.mean(candidate))


def _shapley(part: CreditedPart, parts: Sequence[CreditedPart], values: Mapping[Cell, np.ndarray]) -> np.ndarray:
    """Per example, the weighted mean of what the part adds to every set of the others."""
    others = [one for one in parts if one != part]
    k = len(parts)
    credit = np.zeros_like(values[frozenset()])
    for size in range(k):
        weight = math.factorial(size) * math.factorial(k - size - 1) / math.factorial(k)
        for some in map(frozenset, itertools.combinations(others, size)):
            credit += weight * (values[some | {part}] - values[some])
    return credit


def _mean(contributions: np.ndarray) -> float:
    """Rounded: parts that cancel must not leave the last bits as a finding."""
    return float(np.round(contributions, 12).mean())
