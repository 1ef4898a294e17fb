"""Canaries: test rows whose stored answers are asked for again, so that a provider that changed is found out.

Verdicts compare with answers that may be months old, since what is stored is replayed. With `--copa-canaries=20` a run
asks for those of so many test rows afresh: of its own program, or of the program as written where all answers of its
own are new. The rows are the same from run to run. A row that may vary (an endpoint, a temperature above 0) is asked
twice, which tells a drift from noise. New answers are paid and counted like any others, and never stored: what is
replayed stays what it was.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from copa_harness.errors import BudgetExhausted, CopaError
from copa_harness.results import EvaluationResult, ExampleResult, PhaseRecord
from copa_harness.session.options import Settings

if TYPE_CHECKING:
    import dspy

    from copa_harness.judge.flaky import Drift
    from copa_harness.lm.call_context import Afresh
    from copa_harness.lm.metered import MeteredLM
    from copa_harness.tasks.task import Task

_NONE = (
    "no canaries: no answer is older than this session, so there is nothing to find a drift in "
    "(--copa-against=merge-base asks for those of the other commit)"
)


@dataclass(frozen=True, slots=True)
class Canaries:
    """What a run's canaries show, what they cost, and why there are none."""

    drift: Drift | None = None
    phases: tuple[PhaseRecord, ...] = ()
    note: str = ""


Answered = tuple["dspy.Module", "MeteredLM", EvaluationResult | None]
"""A program, its model, and what it answered on the test split in this session."""


def ask_canaries(task: Task, answered: Sequence[Answered], *, settings: Settings, began_s: float) -> Canaries:
    """Ask for stored answers again.

    Args:
        task: Where examples and metric come from.
        answered: Programs in the order in which their stored answers are looked for.
        settings: How many canaries, among others.
        began_s: When the session began, in Unix seconds: what was stored later is no old answer.
    """
    from copa_harness.lm.call_context import in_context, open_scope

    drift, note = None, _NONE
    as_evaluated = in_context(json_fallback=settings.json_fallback, label_scores=not settings.sequential)
    with open_scope(f"{task.name}: canaries") as scope, as_evaluated:
        try:
            drifts = (_drift(task, one, settings=settings, began_s=began_s) for one in answered)
            drift = next((found for found in drifts if found is not None), None)
        except (CopaError, BudgetExhausted) as error:
            note = f"canaries could not be asked: {error}"
    return Canaries(drift, (PhaseRecord("canaries", scope.usage()),), "" if drift else note)


def _drift(task: Task, answered: Answered, *, settings: Settings, began_s: float) -> Drift | None:
    from copa_harness.evaluate.examples import example_ids
    from copa_harness.evaluate.runner import results_of, run_examples
    from copa_harness.judge.flaky import Canary, drift_of
    from copa_harness.lm.call_context import Afresh, in_context, in_threads

    program, lm, evaluation = answered
    examples = dict(zip(example_ids(task.testset), task.testset, strict=True))
    scored = () if evaluation is None else [row.example_id for row in evaluation.results if row.score is not None]
    names = sorted(scored, key=lambda name: hashlib.sha256(name.encode()).digest())[: settings.canaries]

    def result(name: str, afresh: Afresh | None) -> ExampleResult:
        # Rows side by side open a phase each, but all the same one.
        ask_one = partial(run_examples, program, [examples[name]], metric=task.metric, split="test", lm=lm)
        with in_context(afresh=afresh):
            return results_of(program, ask_one(threads=1, ids=[name]))[0]

    def ask(asked: Mapping[str, Afresh | None]) -> dict[str, ExampleResult]:
        jobs = [partial(result, *one) for one in asked.items()]
        return dict(zip(asked, in_threads(jobs, threads=settings.threads), strict=True))

    asked = {name: Afresh(began_s) for name in names}
    new = ask(asked)
    asked = {name: afresh for name, afresh in asked.items() if afresh.stored_s}
    newer = new | ask({name: Afresh(began_s) for name, afresh in asked.items() if afresh.varying})
    stored = ask(dict.fromkeys(asked))
    canaries = [Canary(stored[name], new[name], newer[name], afresh.varying) for name, afresh in asked.items()]
    if not canaries:
        return None
    times = [time_s for afresh in asked.values() for time_s in afresh.stored_s if time_s is not None]
    since = datetime.date.fromtimestamp(min(times)).isoformat() if times else ""
    return drift_of(canaries, model=lm.model, since=since)
