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
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from copa_harness.errors import BudgetExhausted, CopaError, ProviderError
from copa_harness.results import EvaluationResult, ExampleResult, Phase, PhaseRecord
from copa_harness.session.options import Settings

if TYPE_CHECKING:
    import dspy

    from copa_harness.judge.flaky import Canary, Drift
    from copa_harness.lm.call_context import Afresh
    from copa_harness.lm.metered import MeteredLM
    from copa_harness.tasks.task import Task


@dataclass(frozen=True, slots=True)
class Answered:
    """A program, its model, and what it answered on the test split in this session."""

    program: dspy.Module
    lm: MeteredLM
    evaluation: EvaluationResult | None


@dataclass(frozen=True, slots=True)
class Asked:
    """What became of a run's canaries: what they show, what they cost, and why there are none."""

    drift: Drift | None = None
    phases: tuple[PhaseRecord, ...] = ()
    note: str = ""


def ask_canaries(task: Task, answered: Sequence[Answered], *, settings: Settings, began_s: float) -> Asked:
    """Ask for stored answers again.

    Args:
        task: Where examples and metric come from.
        answered: Programs in the order in which their stored answers are looked for.
        settings: How many canaries, among others.
        began_s: When the session began, in Unix seconds: what was stored later is no old answer.
    """
    from copa_harness.lm.call_context import in_context, open_scope

    with open_scope(f"{task.name}: canaries") as scope:
        drift, note = None, ""
        try:
            with scope.phase(Phase.EVALUATE), in_context(json_fallback=settings.json_fallback):
                for one in answered:
                    drift = drift or _drift(task, one, settings=settings, began_s=began_s)
        except (CopaError, BudgetExhausted) as error:
            note = f"canaries could not be asked: {error}"
    if drift is None:
        note = note or (
            "no canaries: no answer is older than this session, so there is nothing to find a drift in "
            "(--copa-against=merge-base asks those of the other commit)"
        )
    return Asked(drift, (PhaseRecord("canaries", scope.usage()),), note)


def _drift(task: Task, answered: Answered, *, settings: Settings, began_s: float) -> Drift | None:
    from copa_harness.evaluate.examples import example_ids
    from copa_harness.judge.flaky import drift_of
    from copa_harness.lm.call_context import Afresh

    if answered.evaluation is None:
        return None
    scored = {row.example_id for row in answered.evaluation.results if row.score is not None}
    examples = dict(zip(example_ids(task.testset), task.testset, strict=True))
    waiting = sorted(scored, key=lambda name: hashlib.sha256(name.encode()).digest())
    ask = partial(_results, task, answered, examples, settings=settings)
    found: list[Canary] = []
    oldest = math.inf
    while waiting and len(found) < settings.canaries:
        names, waiting = waiting[: settings.canaries - len(found)], waiting[settings.canaries - len(found) :]
        asked = {name: Afresh(began_s) for name in names}
        new = ask(asked)
        old = [name for name in names if asked[name].n_asked]
        found += _canaries(old, asked, new=new, stored=ask(dict.fromkeys(old)), ask=ask)
        oldest = min([oldest, *(asked[name].oldest for name in old)])
    if found and not any(one.is_scored for one in found):
        raise ProviderError(f"none of {len(found)} rows got a score; the first: {found[0].new.error}")
    if not found:
        return None
    since = "" if math.isinf(oldest) else datetime.date.fromtimestamp(oldest).isoformat()
    return drift_of(found, model=answered.lm.model, since=since)


def _canaries(
    names: Sequence[str],
    asked: Mapping[str, Afresh],
    *,
    new: Mapping[str, ExampleResult],
    stored: Mapping[str, ExampleResult],
    ask: partial[dict[str, ExampleResult]],
) -> list[Canary]:
    from copa_harness.judge.flaky import Canary
    from copa_harness.lm.call_context import Afresh

    newer = ask({name: Afresh(asked[name].before) for name in names if asked[name].varying})
    return [
        Canary(
            stored[name],
            new[name],
            newer.get(name, new[name]),
            can_vary=bool(asked[name].varying - {Phase.METRIC}),
            score_can_vary=Phase.METRIC in asked[name].varying,
        )
        for name in names
    ]


def _results(
    task: Task,
    answered: Answered,
    examples: Mapping[str, dspy.Example],
    asked: Mapping[str, Afresh | None],
    *,
    settings: Settings,
) -> dict[str, ExampleResult]:
    """Results by example id, each row in a context of its own; None replays it."""
    from copa_harness.evaluate.runner import results_of, run_examples
    from copa_harness.lm.call_context import in_context, in_threads

    def result(name: str) -> ExampleResult:
        with in_context(afresh=asked[name], label_scores=not settings.sequential):
            runs = run_examples(
                answered.program,
                [examples[name]],
                metric=task.metric,
                split="test",
                lm=answered.lm,
                threads=1,
                ids=[name],
            )
        return results_of(answered.program, runs)[0]

    results = in_threads([partial(result, name) for name in asked], threads=settings.threads) if asked else ()
    return dict(zip(asked, results, strict=True))
