"""One session: from settings to models, optimizations, evaluations, gates and records.

Optimizations are found by content or made once (`optimizations.py`). An evaluation is never stored as such: it always
runs, and its calls replay from the cache. The test split is given to final evaluations only. Knows nothing of pytest.
"""

from __future__ import annotations

from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from copa_harness.errors import ConfigurationError
from copa_harness.judge.gates import is_failure, overall
from copa_harness.results import Phase, PhaseRecord, Usage
from copa_harness.session.gating import judged
from copa_harness.session.models import Models
from copa_harness.session.optimizations import Optimizations, Optimized, task_fingerprint
from copa_harness.session.runs import CopaRun, ScoredEvaluation
from copa_harness.session.settings import MarkerArguments, Settings
from copa_harness.tasks.task import Task

if TYPE_CHECKING:
    import dspy

    from copa_harness.lm.metered import MeteredLM
    from copa_harness.report.records import RunRecord

SPLITS = {"train": "trainset", "val": "valset", "test": "testset"}
"""Names an evaluation may be asked for, and where a task keeps them."""


class CopaSession:
    """Runs tasks and remembers what came out. A context manager; closing it closes the cache.

    Args:
        settings: Shared by all runs; a marker may change what nobody forced.

    Attributes:
        settings: As given.
        entries: One record per evaluation in the order they were made, each with the run it belongs to, if any.

    Raises:
        ConfigurationError: The cache directory cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.models = Models(settings)
        self._optimizations = Optimizations(settings.cache_dir)
        self.entries: list[tuple[RunRecord, CopaRun | None]] = []
        self._tuned: dict[int, tuple[MeteredLM, MeteredLM, Optimized]] = {}
        self._baselines: dict[tuple[str, str], ScoredEvaluation] = {}

    def __enter__(self) -> CopaSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the response cache; records stay readable."""
        self.models.close()

    # -- models

    def base_lm(self, marker: MarkerArguments | None = None) -> MeteredLM:
        """The base model that settings and marker name.

        Raises:
            ConfigurationError: There is no such model; the message names the choices.
        """
        return self.models.named(self._merged(marker).lm)

    def prompt_lm(self, marker: MarkerArguments | None = None) -> MeteredLM | None:
        """The model that proposes instructions, if settings or marker name one."""
        name = self._merged(marker).prompt_lm
        return None if name is None else self.models.named(name)

    def finetuned_lm(
        self, task: Task, *, lm: MeteredLM | None = None, marker: MarkerArguments | None = None
    ) -> MeteredLM:
        """The model that the strategy `w` ends with on this task."""
        marker = replace(marker or MarkerArguments(), strategy="w", optimizer_kwargs=None)
        base = self._metered(lm, marker)
        optimized = self._optimized(_checked(task), base, None, marker)
        tuned = optimized.lm.copy()
        self._tuned[id(tuned)] = (tuned, base, optimized)  # keeps `tuned` alive, so the id stays its own
        return tuned

    def _merged(self, marker: MarkerArguments | None) -> Settings:
        return self.settings if marker is None else self.settings.merged(marker)

    def _metered(self, lm: MeteredLM | None, marker: MarkerArguments) -> MeteredLM:
        return self.base_lm(marker) if lm is None else self.models.metered(lm)

    def _optimized(self, task: Task, lm: MeteredLM, prompt_lm: MeteredLM | None, marker: MarkerArguments) -> Optimized:
        settings = self.settings.merged(marker)
        return self._optimizations.get(task, lm=lm, prompt_lm=prompt_lm, settings=settings, marker=marker)

    # -- runs

    def evaluate(
        self,
        task: Task,
        *,
        program: dspy.Module | None = None,
        lm: MeteredLM | None = None,
        split: str = "test",
        marker: MarkerArguments | None = None,
        test: str = "",
    ) -> ScoredEvaluation:
        """Scores of a program on a split.

        Args:
            task: The task.
            program: What to run, default the task's program as written. Models of its own predictors are used.
            lm: Model of every predictor without one; default the base model.
            split: `"train"`, `"val"` or `"test"`.
            marker: Marker arguments of the test.
            test: Id of the test that asks, for the record.
        """
        marker = marker or MarkerArguments()
        lm = self._metered(lm, marker)
        _, base, optimized = self._tuned.get(id(lm), (lm, lm, None))
        strategy = "given program" if program is not None else "w" if optimized else "none"
        evaluation = self._evaluation(
            _checked(task), program or task.program, lm, split=split, strategy=strategy, marker=marker
        )
        if strategy == "none" and split == "test":
            self._baselines[_baseline_key(task, lm)] = evaluation
        self._record(evaluation, test=test, base=base, marker=marker, optimized=optimized)
        return evaluation

    def run(
        self,
        task: Task,
        *,
        lm: MeteredLM | None = None,
        prompt_lm: MeteredLM | None = None,
        marker: MarkerArguments | None = None,
        test: str = "",
    ) -> CopaRun:
        """Optimizes the task's program, scores it once on the test split, and holds it to the marker's gates.

        Args:
            task: The task.
            lm: Base model; default the one settings and marker name.
            prompt_lm: Model that proposes instructions.
            marker: Strategy, budget and gates.
            test: Id of the test that asks, for the record.
        """
        marker = marker or MarkerArguments()
        settings = self.settings.merged(marker)
        base = self._metered(lm, marker)
        key = _baseline_key(_checked(task), base)
        if key not in self._baselines and marker.strategy != "none":
            # First of all: a broken metric or model shows here, before anything is spent on searching.
            self.evaluate(task, lm=base, marker=marker, test=test)
        optimized = self._optimized(task, base, prompt_lm, marker)
        result = optimized.result
        evaluation = self._evaluation(
            task, optimized.program, optimized.lm, split="test", strategy=result.strategy, marker=marker
        )
        if result.strategy == "none":
            self._baselines[key] = evaluation
        baseline = self._baselines[key]
        phases = optimized.phases()
        gates = judged(task, evaluation, optimized, base=base, marker=marker, settings=settings)
        run = CopaRun(
            task=task.name,
            strategy=result.strategy,
            evaluation=evaluation,
            baseline=baseline,
            usage=sum((phase.usage for phase in phases), Usage()),
            budget=settings.budget,
            phases=(*phases, _evaluation_phase(evaluation)),
            gates=gates,
            verdict=overall(gates),
            program=optimized.program,
            lm=optimized.lm,
            artifact=optimized.artifact,
            exhausted=result.exhausted,
            stopped=result.stopped,
            from_disk=optimized.from_disk,
            undecided_fails=bool(marker.undecided_fails),
        )
        self._record(evaluation, test=test, base=base, marker=marker, optimized=optimized, run=run)
        return run

    def rows(self) -> list[dict[str, Any]]:
        """The records as JSON, each with whether its gates failed without the test asking for them."""
        return [
            {
                "record": record.to_json(),
                "unchecked": run is not None
                and not run.checked
                and is_failure(run.verdict, undecided_fails=run.undecided_fails),
            }
            for record, run in self.entries
        ]

    # -- steps

    def _evaluation(
        self,
        task: Task,
        program: dspy.Module,
        lm: MeteredLM,
        *,
        split: str,
        strategy: str,
        marker: MarkerArguments,
    ) -> ScoredEvaluation:
        """Runs the program over a split; nothing bounds it but the split."""
        from copa_harness.evaluate.runner import evaluate
        from copa_harness.lm.scope import open_scope

        if split not in SPLITS:
            raise ConfigurationError(f"split: got {split!r}, expected one of {', '.join(map(repr, SPLITS))}.")
        phase = Phase.BASELINE if strategy == "none" else Phase.EVALUATE
        with open_scope(f"{task.name}, {strategy}: {phase.value}"):
            result = evaluate(
                program,
                getattr(task, SPLITS[split]),
                metric=task.metric,
                split=split,
                lm=lm,
                phase=phase,
                threads=self.settings.merged(marker).threads,
            )
        return ScoredEvaluation.of(result, task=task.name, strategy=strategy)

    def _record(
        self,
        evaluation: ScoredEvaluation,
        *,
        test: str,
        base: MeteredLM,
        marker: MarkerArguments,
        optimized: Optimized | None = None,
        run: CopaRun | None = None,
    ) -> None:
        """Notes an evaluation for the report, with the optimization that led to it."""
        from copa_harness.report.records import RunRecord

        phases = (*(optimized.phases() if optimized else ()), _evaluation_phase(evaluation))
        settings = self.settings.merged(marker)
        more: dict[str, Any] = {"phases": phases, "seed": settings.seed}
        if optimized is not None:
            optimized.told = True
            more |= {
                "artifact": str(optimized.artifact.absolute()),
                "budget": settings.budget,
                "validation_before": optimized.result.score_before,
                "validation_after": optimized.result.score_after,
                "stopped": optimized.result.stopped,
                "exhausted": optimized.result.exhausted,
            }
        record = RunRecord.from_evaluation(
            evaluation,
            test=test,
            task=evaluation.task,
            strategy=evaluation.strategy,
            lm=base.model,
            split=evaluation.split,
            gates=run.gates if run is not None else (),
            usage=sum((phase.usage for phase in phases), Usage()),
            **more,
        )
        self.entries.append((record, run))


def _checked(task: object) -> Task:
    if not isinstance(task, Task):
        raise ConfigurationError(
            f"copa_task: got a {type(task).__name__}, expected a copa_harness.Task (a program, a metric, three splits)."
        )
    return task


def _baseline_key(task: Task, lm: MeteredLM) -> tuple[str, str]:
    return (task_fingerprint(task), lm.fingerprint)


def _evaluation_phase(evaluation: ScoredEvaluation) -> PhaseRecord:
    return PhaseRecord(f"{evaluation.split} evaluation", evaluation.usage, score_after=float(evaluation.score))
