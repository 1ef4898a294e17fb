"""One measurement of a program on a split: once, several times over, or until its gates are decided.

What the metric asked a model on the way is told apart from what the program asked, and failed calls are kept by kind
with the first traceback. Nothing bounds a measurement but the split and the ceilings of the whole session.

What goes with a measurement is found here too: which examples share a group, what of the test split was seen before
(`leakage_of`), and, for a run that searched both, what weights and what prompts gained (`attributed`): the program as
written on the base model and the optimized program on the tuned model are measured anyway; the two missing cells of the
2 x 2 are the optimized prompts on the base weights, and the program as written on the tuned ones.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from statistics import fmean
from typing import TYPE_CHECKING, Any

from copa_harness.errors import ConfigurationError
from copa_harness.results import EvaluationResult, ExampleResult, Phase, PhaseRecord, Usage
from copa_harness.session.optimizations import Optimized, program_fingerprint
from copa_harness.session.options import Settings
from copa_harness.session.runs import ScoredEvaluation
from copa_harness.tracing import span

if TYPE_CHECKING:
    import dspy

    from copa_harness.judge.attribution import Attribution
    from copa_harness.judge.leakage import LeakageReport
    from copa_harness.judge.sequential.stopping import SequentialJudge
    from copa_harness.lm.budget.scope import Scope
    from copa_harness.lm.metered import MeteredLM
    from copa_harness.tasks.task import Task

SPLITS = {"train": "trainset", "val": "valset", "test": "testset"}
"""Names an evaluation may be asked for, and where a task keeps them."""


@dataclass(frozen=True, slots=True)
class FailedCalls:
    """Attempts at a call that failed in one way: how many (those a retry mended included), and the first traceback."""

    count: int
    first: str


@dataclass(frozen=True, slots=True)
class Measured:
    """What came out.

    Attributes:
        evaluation: The scores; with repeats, each example's mean over them. Its usage is the program's own.
        repeats: Scores of every repeat by example id; empty without repeats.
        phases: What was spent: by the program, and by the metric if it asked a model.
        failures: Attempts at a call that failed, by kind.
        human: What people said of answers, by example id.
        is_settled: Whether asking the same again can only answer the same: the models are deterministic, or every
            answer was replayed.
    """

    evaluation: ScoredEvaluation
    repeats: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    phases: tuple[PhaseRecord, ...] = ()
    failures: Mapping[str, FailedCalls] = field(default_factory=dict)
    human: Mapping[str, float] = field(default_factory=dict)
    is_settled: bool = False

    @property
    def n_metric_calls(self) -> int:
        """Calls of a model that the metric made, paid or replayed."""
        return sum(phase.usage.paid_calls + phase.usage.cached_calls for phase in self.phases[1:])


def split_of(task: Task, split: str) -> Sequence[dspy.Example]:
    """The examples of a split.

    Raises:
        ConfigurationError: There is no such split.
    """
    if split not in SPLITS:
        raise ConfigurationError(f"split: got {split!r}, expected one of {', '.join(map(repr, SPLITS))}.")
    examples: Sequence[dspy.Example] = getattr(task, SPLITS[split])
    return examples


def groups_of(task: Task, split: str = "test") -> dict[str, str] | None:
    """The group of each example that shares one, by example id: the task's own groups, and repeated examples."""
    from copa_harness.evaluate.examples import example_id, example_ids

    examples = split_of(task, split)
    names = example_ids(examples)
    if task.group is not None and split == "test":
        return {name: str(_label(example, task.group)) for name, example in zip(names, examples, strict=True)}
    contents = [example_id(example) for example in examples]
    repeated = {content for content, count in Counter(contents).items() if count > 1}
    if not repeated:
        return None
    return {name: content for name, content in zip(names, contents, strict=True) if content in repeated}


def slices_of(task: Task) -> dict[str, str]:
    """The slice of each test example, by example id; empty without slices."""
    from copa_harness.evaluate.examples import example_ids

    if task.slices is None:
        return {}
    names = example_ids(task.testset)
    return {name: str(_label(example, task.slices)) for name, example in zip(names, task.testset, strict=True)}


def _label(example: dspy.Example, given: Any) -> Any:
    return given(example) if callable(given) else example[given]


def measure(
    task: Task,
    program: dspy.Module,
    lm: MeteredLM,
    *,
    split: str,
    strategy: str,
    settings: Settings,
    watch: SequentialJudge | None = None,
    warns: bool = True,
) -> Measured:
    """Run a program over a split.

    Args:
        task: Where split and metric come from.
        program: What to run; models of its own predictors are used.
        lm: Model of every predictor without one.
        split: `"train"`, `"val"` or `"test"`.
        strategy: What made the program; `"none"` is booked as baseline.
        settings: Threads, repeats and seed in force.
        watch: Decides after every block of examples whether to go on; None runs them all. Then there are no repeats.
        warns: Whether it is said early when most of the first answers do not parse.

    Raises:
        BudgetExhausted: The ceilings of the whole session refuse a call.
    """
    from copa_harness.evaluate.progress import EvaluationProgress
    from copa_harness.judge.flaky import merge_repeats, repeats_of
    from copa_harness.lm.call_context import in_context, open_scope, repeated

    examples = split_of(task, split)
    groups = groups_of(task, split)
    phase = Phase.BASELINE if strategy == "none" else Phase.EVALUATE
    title, n = f"{task.name}, {strategy}", len(examples) * settings.repeat
    said: dict[str, list[float]] = {}
    once = partial(_once, program, examples, metric=_rated(task, examples, said), split=split, lm=lm, phase=phase)
    with (
        span("copa.evaluate", copa__task=task.name, copa__strategy=strategy, copa__split=split, copa__n=n) as note,
        open_scope(f"{title}: {phase.value}") as scope,
        in_context(json_fallback=settings.json_fallback),
        EvaluationProgress(title, n, split=split, scope=scope, warns=warns).following(),
    ):
        repeats: dict[str, tuple[float | None, ...]] = {}
        if watch is not None:
            result = _watched(watch, program, examples, task=task, split=split, lm=lm, phase=phase, settings=settings)
        elif settings.repeat > 1:
            results = []
            for number in range(settings.repeat):
                with repeated(number if _varies(program, lm) else 0):
                    results.append(once(settings=settings))
            result, repeats = merge_repeats(results, seed=settings.seed, groups=groups), repeats_of(results)
        else:
            result = _clustered(once(settings=settings), groups, seed=settings.seed)
        note(copa__score=result.score, copa__calls=result.usage.paid_calls)
    hidden = scope.phase_usages().get(Phase.METRIC.value)
    if hidden is not None:
        result = replace(result, usage=result.usage - hidden)
    evaluation = ScoredEvaluation.of(result, task=task.name, strategy=strategy)
    is_settled = not (hidden and hidden.paid_calls) and not (evaluation.usage.paid_calls and _varies(program, lm))
    human = {name: fmean(several) for name, several in said.items() if len(several) == settings.repeat}
    return Measured(evaluation, repeats, _phases(evaluation, hidden), _failures(scope), human, is_settled)


def _rated(task: Task, examples: Sequence[dspy.Example], said: dict[str, list[float]]) -> Callable[..., Any]:
    """The metric, which on its way notes what people said of the answers."""
    from copa_harness.evaluate.examples import example_ids
    from copa_harness.evaluate.metrics import score_of

    human = task.human
    if human is None:
        return task.metric
    names = dict(zip(map(id, examples), example_ids(examples), strict=True))

    @wraps(task.metric)
    def metric(example: dspy.Example, prediction: Any, *more: Any) -> Any:
        if (score := human(example, prediction)) is not None:
            said.setdefault(names[id(example)], []).append(score_of(score, name="human"))
        return task.metric(example, prediction, *more)

    return metric


def evaluation_phase(evaluation: ScoredEvaluation) -> PhaseRecord:
    """An evaluation as a phase of a run."""
    return PhaseRecord(f"{evaluation.split} evaluation", evaluation.usage, score_after=float(evaluation.score))


def _phases(evaluation: ScoredEvaluation, hidden: Usage | None) -> tuple[PhaseRecord, ...]:
    own = evaluation_phase(evaluation)
    if hidden is None:
        return (own,)
    return (own, PhaseRecord(f"{evaluation.split} metric", hidden, note="calls that the metric made"))


def phases_of(scopes: Iterable[Scope]) -> tuple[PhaseRecord, ...]:
    """What was spent in scopes whose work was not finished, as phases of a run."""
    return tuple(
        PhaseRecord(name, usage, note="not finished")
        for scope in scopes
        for name, usage in scope.phase_usages().items()
    )


def _failures(scope: Scope) -> dict[str, FailedCalls]:
    first = scope.first_failures
    return {kind: FailedCalls(count, first.get(kind, "")) for kind, count in scope.failures.items()}


def _once(
    program: dspy.Module,
    examples: Sequence[dspy.Example],
    *,
    metric: Callable[..., Any],
    split: str,
    lm: MeteredLM,
    phase: Phase,
    settings: Settings,
) -> EvaluationResult:
    from copa_harness.evaluate.runner import evaluate

    return evaluate(program, examples, metric=metric, split=split, lm=lm, phase=phase, threads=settings.threads)


def _watched(
    watch: SequentialJudge,
    program: dspy.Module,
    examples: Sequence[dspy.Example],
    *,
    task: Task,
    split: str,
    lm: MeteredLM,
    phase: Phase,
    settings: Settings,
) -> EvaluationResult:
    """Block after block in the judge's order, until it has seen enough."""
    from copa_harness.evaluate.examples import example_ids
    from copa_harness.evaluate.runner import raise_if_nothing_worked, results_of, run_examples
    from copa_harness.judge.intervals import mean_interval
    from copa_harness.lm.call_context import current_scope

    by_id = dict(zip(example_ids(examples), examples, strict=True))
    found: dict[str, ExampleResult] = {}
    started_s = time.perf_counter()
    for block in watch.blocks(size=settings.threads):
        runs = run_examples(
            program,
            [by_id[name] for name in block],
            metric=task.metric,
            split=split,
            lm=lm,
            phase=phase,
            threads=settings.threads,
            ids=block,
        )
        if not found:  # a broken metric or model shows in the first block
            raise_if_nothing_worked(runs, split=split)
        found |= {result.example_id: result for result in results_of(program, runs)}
        watch.add({run.result.example_id: run.result.score for run in runs})
    results = tuple(found[name] for name in by_id if name in found)
    usage = replace(current_scope().usage(), wall_s=time.perf_counter() - started_s)
    scores = [result.score for result in results if result.score is not None]
    result = EvaluationResult(
        split=split, lm=lm.model, results=results, interval=mean_interval(scores, seed=settings.seed), usage=usage
    )
    return _clustered(result, groups_of(task, split), seed=settings.seed)


def _clustered(result: EvaluationResult, groups: Mapping[str, str] | None, *, seed: int) -> EvaluationResult:
    """The same scores with an interval that knows which examples belong together."""
    from copa_harness.judge.intervals import group_labels, mean_interval

    scored = [row for row in result.results if row.score is not None]
    labels = group_labels([row.example_id for row in scored], groups)
    if labels is None:
        return result
    scores = [row.score for row in scored if row.score is not None]
    return replace(result, interval=mean_interval(scores, seed=seed, groups=labels))


def _varies(program: dspy.Module, lm: MeteredLM) -> bool:
    """Whether a model of the program may answer differently when it is asked again.

    A local model at temperature 0 has one answer only and is not asked again; an endpoint may have several even then.
    """
    return is_drawn(program, lm) or any(model.engine.is_endpoint for model in _models(program, lm))


def is_drawn(program: dspy.Module, lm: MeteredLM) -> bool:
    """Whether a model is asked at a temperature that is not 0, so that an answer is one draw of many."""
    return any(model.kwargs.get("temperature") != 0 for model in _models(program, lm))


def _models(program: dspy.Module, lm: MeteredLM) -> list[MeteredLM]:
    return [lm, *(predictor.lm for predictor in program.predictors() if predictor.lm is not None)]


def leakage_of(task: Task, program: dspy.Module | None = None) -> LeakageReport:
    """What of the task's test split was seen: in training and validation, or in a program's demonstrations.

    Args:
        task: The splits.
        program: The program about to be evaluated; its demonstrations count as seen.
    """
    from copa_harness.evaluate.examples import example_ids, input_values
    from copa_harness.judge.leakage import find_leakage

    def inputs(examples: Any) -> dict[str, dict[str, Any]]:
        return dict(zip(example_ids(examples), map(input_values, examples), strict=True))

    test = inputs(task.testset)
    fields = {name for values in test.values() for name in values}
    seen: dict[str, Mapping[str, Mapping[str, Any]]] = {
        "train": inputs(task.trainset),
        "validation": inputs(task.valset),
    }
    if program is not None:
        seen["demonstrations"] = {
            f"{name}[{position}]": shown
            for name, predictor in program.named_predictors()
            for position, demo in enumerate(predictor.demos)
            if (shown := {key: value for key, value in dict(demo).items() if key in fields})
        }
    return find_leakage(test, seen=seen)


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

    `plain` and `final` are the two cells that are measured anyway, on all examples.

    Raises:
        BudgetExhausted: The ceilings of the whole session refuse a call.
        CopaError: A cell cannot be measured at all.
        ValueError: No example has a score in all four cells.
    """
    from copa_harness.judge.attribution import attribute_gains
    from copa_harness.judge.paired_tests import scores_by_id

    base_optimized = tuned_plain = None
    if optimized.lm.fingerprint == base.fingerprint and optimized.lm.model == base.model:
        base_optimized, tuned_plain = final, plain  # no weights were adopted
    elif program_fingerprint(optimized.program) == program_fingerprint(task.program):
        base_optimized, tuned_plain = plain, final  # no prompts were
    phases: list[PhaseRecord] = []

    def cell(program: dspy.Module, lm: MeteredLM, what: str) -> ScoredEvaluation:
        measured = measure(task, program, lm, split="test", strategy=what, settings=settings, warns=False)
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
