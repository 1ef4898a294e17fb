"""What weights and what prompts gained in a run that searched both: the two missing cells of the 2 x 2, measured.

The program as written on the base model and the optimized program on the tuned model are measured anyway; here the
optimized prompts are put on the base weights, and the program as written on the tuned ones. Knows nothing of records
or pytest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from copa_harness.results import Phase, PhaseRecord
from copa_harness.session.measuring import Measured, groups_of, measure
from copa_harness.session.optimizations import Optimized, program_fingerprint
from copa_harness.session.runs import ScoredEvaluation
from copa_harness.session.settings import Settings

if TYPE_CHECKING:
    import dspy

    from copa_harness.judge.attribution import Attribution
    from copa_harness.lm.metered import MeteredLM
    from copa_harness.tasks.task import Task


def searches_both(strategy: str) -> bool:
    """Whether a strategy trains weights and searches prompts."""
    from copa_harness.report.grouping import kind_of

    return kind_of(strategy) == "joint"


def attributed(
    task: Task,
    optimized: Optimized,
    *,
    base: MeteredLM,
    plain: ScoredEvaluation,
    final: ScoredEvaluation,
    settings: Settings,
) -> tuple[Attribution, tuple[PhaseRecord, ...]]:
    """The 2 x 2, and what measuring the two missing cells cost.

    Args:
        task: Program as written and test split.
        optimized: The optimized program and the model it runs on.
        base: The base model.
        plain: The program as written on the base model, all examples.
        final: The optimized program on the tuned model, all examples.
        settings: In force for this run.

    Raises:
        BudgetExhausted: The ceilings of the whole session refuse a call.
        CopaError: A cell cannot be measured at all.
        ValueError: No example has a score in all four cells.
    """
    from copa_harness.judge.attribution import attribute_gains
    from copa_harness.judge.paired import scores_by_id

    base_optimized = tuned_plain = None
    if optimized.lm.fingerprint == base.fingerprint and optimized.lm.model == base.model:
        base_optimized, tuned_plain = final, plain  # no weights were adopted
    elif program_fingerprint(optimized.program) == program_fingerprint(task.program):
        base_optimized, tuned_plain = plain, final  # no prompts were
    phases: list[PhaseRecord] = []

    def cell(program: dspy.Module, lm: MeteredLM, what: str) -> ScoredEvaluation:
        measured = measure(task, program, lm, split="test", strategy=what, settings=settings)
        phases.extend(_renamed(measured, what))
        return measured.evaluation

    base_optimized = base_optimized or cell(_on(optimized.program, base), base, "optimized prompts, base weights")
    tuned_plain = tuned_plain or cell(_on(task.program, optimized.lm), optimized.lm, "plain prompts, tuned weights")
    answer = attribute_gains(
        base_plain=scores_by_id(plain),
        base_optimized=scores_by_id(base_optimized),
        tuned_plain=scores_by_id(tuned_plain),
        tuned_optimized=scores_by_id(final),
        seed=settings.seed,
        groups=groups_of(task),
    )
    return answer, tuple(phases)


def _on(program: dspy.Module, lm: MeteredLM) -> dspy.Module:
    """A copy of the program with every predictor on one model."""
    copy = program.deepcopy()
    for predictor in copy.predictors():
        predictor.lm = lm
    return copy


def _renamed(measured: Measured, what: str) -> tuple[PhaseRecord, ...]:
    return tuple(
        PhaseRecord(f"{Phase.EVALUATE.value}: {what}" if index == 0 else phase.phase, phase.usage, note=phase.note)
        for index, phase in enumerate(measured.phases)
    )
