"""`strategy="advise"`: what a task needs, from what a few hundred calls of `p -> w` have shown.

Compared on the validation rows, paired: the program as written, the best that prompts alone came to, the best of
weights alone, and the best of both; and weights trained on half of the rows beside those trained on all of them, a
learning curve of two points. A difference counts as shown where its 95 % interval is above 0. The best programs were
chosen on these rows, so their gains flatter them; what is adopted is tested as always.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from copa_harness.errors import BudgetExhausted, NoTrainingRowsError, TrainingError
from copa_harness.formatting import amount, counted, dollars
from copa_harness.judge.intervals import mean_interval
from copa_harness.judge.paired_tests import PairedDifference
from copa_harness.optimize.propose.schema import strata_of, stratified_order
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.scoring import Validation
from copa_harness.optimize.step_budget import CallBudget, OutOfCalls
from copa_harness.optimize.weights import has_gold, train_weights
from copa_harness.results import Interval, Phase

if TYPE_CHECKING:
    from copa_harness.optimize.run import Run

ENOUGH = 0.95
"""Score from which a program needs nothing more."""

MIN_CURVE_ROWS = 8
"""Training rows below which half of them is no point of a learning curve."""


def advise(run: Run) -> None:
    """Say what the task of a finished run needs, as headlines."""
    rows, written = run.validation, run.student
    if not rows.is_complete(written):
        return
    found = {
        "prompts": _best(run, (False, True)),
        "weights": _best(run, (True, False)),
        "both": _best(run, (True, True)),
    }
    gains = {what: rows.compared(written, one) for what, one in found.items() if one is not None}
    told = [f"as written {_scored(rows, written)}"]
    told += [f"{what} {_scored(rows, found[what])}, {_told(gain)}" for what, gain in gains.items()]  # type: ignore[arg-type]
    run.note(f"advice, on {counted(rows.n, 'validation row')} with 95 % intervals: " + "; ".join(told), headline=True)
    curve = _curve(run, found["weights"])
    run.note(f"advice: {_sentence(run, found, gains, curve)}", headline=True)


def _best(run: Run, changed: tuple[bool, bool]) -> Candidate | None:
    """The best program, of equals the simplest, that changes weights, prompts, or both; None where none was scored."""
    mine = [one for one in run.validation.completed() if one.changes(run.plain) == changed and not one.structure]
    return max(mine, key=lambda one: (run.validation.mean(one), -one.size), default=None)


def _scored(rows: Validation, candidate: Candidate) -> str:
    """Score with its interval, and the price of answers."""
    scores = [score for score in rows.scores(candidate) if score is not None]
    text = f"{rows.mean(candidate):.2f} {_interval(mean_interval(scores))}" if scores else "without a score"
    usd, tokens = rows.cost(candidate).per_answer("usd"), rows.cost(candidate).per_answer("tokens")
    if usd:
        return f"{text} at {dollars(1000 * usd)} for 1,000 answers"
    return text if tokens is None else f"{text} at {amount(round(tokens))} tokens an answer"


def _told(gain: PairedDifference) -> str:
    return f"{gain.difference:+.2f} {_interval(gain.interval, sign='+')}"


def _interval(interval: Interval, *, sign: str = "-") -> str:
    return f"[{interval.low:{sign}.2f}, {interval.high:{sign}.2f}]"


def _curve(run: Run, full: Candidate | None) -> PairedDifference | None:
    """What the second half of the training rows gave the bare weights; None, and why, where that cannot be said."""
    bare = next((one for one in run.trained if one.n_demos == 0), None)
    n = len(run.context.trainset)
    if full is None or bare is None:
        return None
    why = ""
    if not has_gold(run.student, run.context) or run.context.finetune_data is not None or n < MIN_CURVE_ROWS:
        why = "it takes labels for every output, and 8 rows"
    else:
        order = stratified_order(strata_of(run.context.trainset), np.random.default_rng([run.settings.seed, 808]))
        half = replace(run.context, trainset=[run.context.trainset[i] for i in sorted(order[: n // 2])])
        with run.recorded("learning curve"):
            try:
                fewer = train_weights(replace(bare.job, context=half), best=run.student).prompts
                run.validation.complete(fewer, allowance=CallBudget(run.scope, math.inf), phase=Phase.WEIGHTS)
            except (OutOfCalls, BudgetExhausted):
                why = "the budget does not pay for it"
            except (NoTrainingRowsError, TrainingError) as error:
                why = str(error)
            else:
                gain = run.validation.compared(fewer, bare.prompts)
                scores = [run.validation.mean(one) for one in (fewer, bare.prompts)]
                text = f"weights from {n // 2} rows {scores[0]:.2f}, from {n} rows {scores[1]:.2f}, {_told(gain)}"
                run.note(f"advice: {text}", headline=True)
                return gain
    run.note(f"advice: no learning curve, {why}", headline=True)
    return None


def _sentence(
    run: Run,
    found: dict[str, Candidate | None],
    gains: dict[str, PairedDifference],
    curve: PairedDifference | None,
) -> str:
    """What to do next."""
    rows = run.validation
    if rows.mean(run.student) >= ENOUGH:
        return "the program as written needs nothing"
    shown = [what for what, gain in gains.items() if gain.interval.low > 0]
    best = max(gains, key=lambda what: gains[what].difference, default=None)
    if best is None or not shown:
        more = "give more validation rows: " if best is not None and gains[best].difference > 0 else ""
        return f"{more}neither prompts nor weights have shown a gain; try a larger model, or look at what it gets wrong"
    parts = [what for what in ("prompts", "weights") if found[what] is not None]
    part = max(parts, key=lambda what: gains[what].difference, default=None)
    text = f"optimize {best}"
    if best == "both" and part is not None:
        over = rows.compared(found[part], found["both"])  # type: ignore[arg-type]
        is_shown = over.interval.low > 0
        text = "optimize both" if is_shown else f"{part} do it"
        text += f": both gain {_told(over)} over {part} alone" + ("" if is_shown else ", which may be noise")
        best = best if is_shown else part
    elif len(parts) == 2:
        other = parts[0] if best == parts[1] else parts[1]
        over = rows.compared(found[other], found[best])  # type: ignore[arg-type]
        text += f": {_told(over)} beside {other}" + ("" if over.interval.low > 0 else ", which may be noise")
    if rows.mean(found[best]) >= ENOUGH:  # type: ignore[arg-type]
        return f"{text}; no more is needed"
    if curve is None:
        return text
    if curve.interval.low > 0:
        return f"{text}; the learning curve rises, so label more rows"
    if curve.difference > 0:
        return f"{text}; more labelled rows may help, the curve's rise is within the noise"
    return f"{text}; more rows did not help: try a larger model"
