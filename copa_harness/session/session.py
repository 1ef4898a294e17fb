"""One session: from settings to models, optimizations, evaluations, gates and records.

Optimizations are found by content or made once (`optimizations`). An evaluation is never stored as such: it always
runs, and its calls replay from the cache. The test split is given to final evaluations only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from copa_harness.errors import BudgetExhausted, ConfigurationError, TaskError
from copa_harness.evaluate.progress import lines_to
from copa_harness.results import PhaseRecord
from copa_harness.session.comparisons import ON_SCORES, RunHistory, canonical, leakage_gate, too_many_errors
from copa_harness.session.entries import Entry, to_row
from copa_harness.session.evaluation import groups_of, leakage_of, measure, phases_of
from copa_harness.session.machines import ledger_of, opened_database, opened_files
from copa_harness.session.models import Models
from copa_harness.session.optimizations import Optimizations, Optimized, fingerprints_of, task_fingerprint
from copa_harness.session.options import Settings
from copa_harness.session.plan import plan_run
from copa_harness.session.recording import cut_short_entry, details_of, finish_run, notes_of, record_of
from copa_harness.session.runs import CopaRun, ScoredEvaluation
from copa_harness.session.violations import forms_of
from copa_harness.shared_files import sharing_files
from copa_harness.tasks.task import Task

if TYPE_CHECKING:
    import dspy

    from copa_harness.lm.budget.scope import Scope
    from copa_harness.lm.metered import MeteredLM


@dataclass(slots=True)
class _Spent:
    """What a block pays for: whatever was asked in its scopes, and a finished optimization, which tells by itself."""

    scopes: list[Scope]
    optimized: Optimized | None = None

    def find(self, optimized: Optimized) -> None:
        self.optimized = optimized
        self.scopes.clear()  # its own

    def phases(self) -> tuple[PhaseRecord, ...]:
        found = () if self.optimized is None else self.optimized.tell_phases()
        return (*found, *phases_of(self.scopes))


class CopaSession:
    """Runs tasks and remembers what came out. A context manager; closing it closes the cache.

    Args:
        settings: Shared by all runs; a test may have its own (`settings.merged(...)`).
        on_progress: Takes a line of text while an optimization or an evaluation runs.

    Attributes:
        settings: As given.

    Raises:
        ConfigurationError: The cache directory cannot be used.
        CacheError: There is a ceiling for the whole session, and its ledger cannot be written; or the database of
            several machines cannot be used.
    """

    def __init__(self, settings: Settings, *, on_progress: Callable[[str], None] | None = None) -> None:
        self.settings = settings
        self._open = ExitStack()
        database = opened_database(settings)
        if database is not None:
            self._open.callback(database.close)
        if (files := opened_files(settings, database)) is not None:
            self._open.enter_context(sharing_files(files))
        self.models = Models(settings, database=database)
        self._optimizations = Optimizations(settings.cache_dir, database=database, on_progress=on_progress)
        self._on_progress = on_progress
        self._kept: list[tuple[Entry, CopaRun | None]] = []
        self._tuned: dict[int, tuple[MeteredLM, MeteredLM, Optimized]] = {}
        self._history = RunHistory()
        self._open.callback(self.models.close)
        if settings.total_budget is not None:
            from copa_harness.lm.budget.ledger import paid_by

            with ExitStack() as undo:
                undo.callback(self._open.close)
                self._open.enter_context(paid_by(ledger_of(settings, database)))
                undo.pop_all()

    def __enter__(self) -> CopaSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the response cache and the ledger; records stay readable."""
        self._open.close()

    # -- models

    def base_lm(self, settings: Settings | None = None) -> MeteredLM:
        """The base model that the settings name.

        Args:
            settings: Those of a test, here and below; the session's by default.

        Raises:
            ConfigurationError: There is no such model; the message names the choices.
        """
        settings = settings or self.settings
        return self.models.named(
            settings.lm, is_base=True, constrain=settings.constrain, answer_tokens=settings.answer_tokens
        )

    def prompt_lm(self, settings: Settings | None = None) -> MeteredLM | None:
        """The model that proposes instructions, if the settings name one."""
        name = (settings or self.settings).prompt_lm
        return None if name is None else self.models.named(name)

    def finetuned_lm(self, task: Task, *, lm: MeteredLM | None = None, settings: Settings | None = None) -> MeteredLM:
        """The model that the strategy `w` ends with on this task."""
        settings = settings or self.settings
        search = {name: value for name, value in settings.search.items() if name != "optimizer_kwargs"}
        settings = replace(settings, strategy="w", search=search)
        base = self._metered(lm, settings)
        optimized = self._optimizations.get(_checked(task), lm=base, prompt_lm=None, settings=settings)
        tuned = optimized.lm.copy()
        self._tuned[id(tuned)] = (tuned, base, optimized)  # keeps `tuned` alive, so the id stays its own
        return tuned

    def _metered(self, lm: MeteredLM | None, settings: Settings) -> MeteredLM:
        if lm is None:
            return self.base_lm(settings)
        return self.models.metered(lm, constrain=settings.constrain, answer_tokens=settings.answer_tokens)

    # -- runs

    def evaluate(
        self,
        task: Task,
        *,
        program: dspy.Module | None = None,
        lm: MeteredLM | None = None,
        split: str = "test",
        settings: Settings | None = None,
        test: str = "",
    ) -> ScoredEvaluation:
        """Scores of a program on a split.

        Args:
            task: The task.
            program: What to run, default the task's program as written. Models of its own predictors are used.
            lm: Model of every predictor without one; default the base model.
            split: `"train"`, `"val"` or `"test"`.
            settings: Those of the test; the session's by default.
            test: Id of the test that asks, for the record.
        """
        settings = settings or self.settings
        lm = self._metered(lm, settings)
        _, base, optimized = self._tuned.get(id(lm), (lm, lm, None))
        strategy = "given program" if program is not None else "w" if optimized else "none"
        task = _checked(task)
        cut_short = self._kept_if_cut_short(
            task, strategy=strategy, base=base, split=split, settings=settings, test=test
        )
        with cut_short, lines_to(self._on_progress):
            measured = measure(
                task,
                program or task.program,
                lm,
                split=split,
                strategy=strategy,
                settings=settings,
                warns=self._history.parses(task, base),
            )
        groups, comparison = groups_of(task, split), None
        fingerprints = fingerprints_of(task, program or task.program, lm) if split == "test" else {}
        before = self._history.as_written(task, base) if split == "test" and strategy != "none" else None
        if strategy == "none" and split == "test":
            comparison = self._history.remember(task, lm, measured.evaluation, fingerprints=fingerprints, groups=groups)
        record = record_of(
            measured,
            test=test,
            base=base,
            settings=settings,
            optimized=optimized,
            groups=groups or {},
            source=task.source,
            gates=too_many_errors(measured.evaluation, settings.gates),
        )
        notes = notes_of(measured)
        details = details_of(
            measured, task=task, program=program or task.program, before=before, fingerprints=fingerprints
        )
        entry = Entry(
            test=test,
            record=record,
            failures=measured.failures,
            notes=notes,
            comparison=comparison,
            details=details,
        )
        self._keep(entry)
        return measured.evaluation

    def run(
        self,
        task: Task,
        *,
        lm: MeteredLM | None = None,
        prompt_lm: MeteredLM | None = None,
        settings: Settings | None = None,
        test: str = "",
    ) -> CopaRun:
        """Optimizes the task's program, scores it once on the test split, and holds it to the marker's gates.

        Args:
            task: The task.
            lm: Base model; default the one the settings name.
            prompt_lm: Model that proposes instructions.
            settings: Strategy, budget, gates and search options.
            test: Id of the test that asks, for the record.

        Raises:
            TaskError: The test split was seen in training or validation, and there are gates on its score.
            BudgetExhausted: The ceilings of the whole session cut the evaluation short; that is recorded.
        """
        settings = settings or self.settings
        base = self._metered(lm, settings)
        strategy = canonical(settings.strategy)
        _refuse_what_was_seen(_checked(task), settings.gates)
        if settings.gates.get("max_violation_rate") is not None:
            forms_of(settings, prompt_lm)  # who is to write paraphrases is asked before anything is spent
        if self._history.as_written(task, base) is None and strategy != "none":
            # First of all: a broken metric or model shows here, before anything is spent on searching.
            self.evaluate(task, lm=base, settings=settings, test=test)
        with self._kept_if_cut_short(
            task, strategy=strategy, base=base, split="test", settings=settings, test=test
        ) as spent:
            optimized = self._optimizations.get(task, lm=base, prompt_lm=prompt_lm, settings=settings)
            spent.find(optimized)
            if optimized.cut_short:
                raise BudgetExhausted(
                    f"the search of {strategy!r} was cut short after {optimized.result.charged_calls:,} of "
                    f"{settings.budget.calls:,.0f} calls of its own"
                )
            with lines_to(self._on_progress):
                entry, run = finish_run(
                    task,
                    optimized,
                    base=base,
                    prompt_lm=prompt_lm,
                    settings=settings,
                    history=self._history,
                    test=test,
                )
        self._keep(entry, run)
        return run

    def plan(
        self,
        task: Task,
        *,
        lm: MeteredLM | None = None,
        prompt_lm: MeteredLM | None = None,
        settings: Settings | None = None,
        test: str = "",
    ) -> None:
        """Notes what `run` would pay, from the cache alone: no call is made.

        Arguments as for `run`.
        """
        settings = settings or self.settings
        base = self._metered(lm, settings)
        strategy = canonical(settings.strategy)
        finished = None
        if strategy != "none":
            finished = self._optimizations.finished(_checked(task), lm=base, prompt_lm=prompt_lm, settings=settings)
        key = f"{task_fingerprint(_checked(task))} {base.fingerprint}"
        for line in plan_run(task, finished, base, strategy=strategy, settings=settings, key=key):
            self._keep(Entry(test=test, plan=line))

    # -- what is kept for the end

    @property
    def entries(self) -> list[Entry]:
        """One per evaluation or planned step in the order they were made, each as its run stands now."""
        return [
            entry
            if run is None
            else replace(entry, record=run.record, checked=run.checked, undecided_fails=run.undecided_fails)
            for entry, run in self._kept
        ]

    def rows(self) -> list[dict[str, Any]]:
        """The entries as plain JSON types; which models were loaded is told with the first evaluation."""
        entries = self.entries
        if entries and entries[0].record is not None:
            notes, asides = (self.models.served(at_endpoints=at_endpoints) for at_endpoints in (True, False))
            entries[0] = replace(entries[0], notes=(*entries[0].notes, *notes), asides=(*entries[0].asides, *asides))
        return [to_row(entry) for entry in entries]

    def _keep(self, entry: Entry, run: CopaRun | None = None) -> None:
        self._kept.append((entry, run))

    @contextmanager
    def _kept_if_cut_short(
        self, task: Task, *, strategy: str, base: MeteredLM, split: str, settings: Settings, test: str
    ) -> Iterator[_Spent]:
        """Records what the session's ceilings end in the block with what it paid for, and lets it end."""
        from copa_harness.lm.call_context import scopes_opened

        try:
            with scopes_opened() as scopes:
                spent = _Spent(scopes)
                yield spent
        except BudgetExhausted as error:
            entry = cut_short_entry(
                str(error),
                test=test,
                task=task,
                strategy=strategy,
                base=base,
                split=split,
                settings=settings,
                phases=spent.phases(),
            )
            self._keep(entry)
            raise


def _checked(task: object) -> Task:
    if not isinstance(task, Task):
        raise ConfigurationError(
            f"copa_task: got a {type(task).__name__}, expected a copa_harness.Task (a program, a metric, three splits)."
        )
    return task


def _refuse_what_was_seen(task: Task, gates: Mapping[str, Any]) -> None:
    """Before anything is spent: gates on scores are no use once test examples were trained or chosen on.

    Raises:
        TaskError: Test examples were seen, and there are such gates.
    """
    if any(gates.get(name) is not None for name in ON_SCORES):
        for answer in leakage_gate(leakage_of(task)):
            raise TaskError(f"task {task.name!r}: {answer.message}")
