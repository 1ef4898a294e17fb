"""The gates of a run: what it is compared with, found among the session's runs and the accepted baselines, and judged.

`RunHistory` keeps the complete evaluations of this process's session, keyed by what the task is and what answers, so
that two fixtures that make the same task share their runs. `GateContext` is one run before its gates.

Gates that name another run (`better_than`) must not depend on how many processes there are, and a test process knows
only its own runs, and of those only the earlier ones. So one rule holds everywhere: the last run of that strategy (same
task, same base model) before the test in collection order; else the accepted baseline; else the first such run after
it. A test process judges at once what it can know by that rule, and leaves the rest open for `settle`, which judges it
at the session's end.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from copa_harness.errors import ConfigurationError
from copa_harness.results import EvaluationResult, ExampleResult, GateResult, Interval, Usage, Verdict
from copa_harness.session.entries import ComparisonBasis, Entry
from copa_harness.session.optimizations import task_fingerprint
from copa_harness.session.options import COMPARING, DEFAULT_LM, Settings
from copa_harness.session.runs import DEFERRED, is_deferred

if TYPE_CHECKING:
    from copa_harness.judge.leakage import LeakageReport
    from copa_harness.judge.options import Gates
    from copa_harness.judge.paired_gates import JudgedRun, Reference
    from copa_harness.judge.sequential.stopping import SequentialAnswer, SequentialJudge
    from copa_harness.lm.metered import MeteredLM
    from copa_harness.report.records import RunRecord
    from copa_harness.session.runs import ScoredEvaluation
    from copa_harness.session.violations import FormMeter
    from copa_harness.store.baselines import Baseline
    from copa_harness.store.history import Anchor
    from copa_harness.tasks.task import Task

_EARLY = ("min_score", "max_regression", "better_than")
"""Gates that can be decided before all examples are evaluated."""

ON_SCORES = (*_EARLY, "min_pass_all", "max_violation_rate")
"""Gates that mean nothing once test examples were seen, or when only some were evaluated."""


def baseline_name(strategy: str, model: str) -> str:
    """What the baseline of a strategy is called: the model is named unless it is the default one."""
    return strategy if model == DEFAULT_LM else f"{strategy} on {model}"


def canonical(name: str) -> str:
    """A strategy's name as runs carry it; any other name as it is."""
    from copa_harness.strategy import parse_strategy

    try:
        return " -> ".join(str(step) for step in parse_strategy(name))
    except ConfigurationError:
        return name


def rules_of(gates: Mapping[str, Any], *, on_scores: bool = True) -> Gates:
    """Gates by name as `judge` wants them.

    Args:
        gates: Values by name.
        on_scores: False leaves out the gates on scores, which mean nothing once examples were seen.

    Raises:
        ConfigurationError: A value is out of range.
    """
    from copa_harness.judge.options import Gates

    kept = {name: value for name, value in gates.items() if on_scores or name not in ON_SCORES}
    return Gates(**kept)


def leakage_gate(report: LeakageReport) -> tuple[GateResult, ...]:
    """The leakage check's answer when test examples were seen; nothing otherwise."""
    from copa_harness.judge.leakage import no_leakage

    answer = no_leakage(report)
    return (answer,) if answer.verdict is Verdict.ERROR else ()


def too_many_errors(evaluation: EvaluationResult, gates: Mapping[str, Any]) -> tuple[GateResult, ...]:
    """The answer of `max_error_rate` where it is no pass: for an evaluation that is held to no other gate.

    Args:
        evaluation: Any.
        gates: Values by name.
    """
    from copa_harness.judge.gates import judge
    from copa_harness.judge.options import Gates
    from copa_harness.judge.paired_gates import JudgedRun

    answers = judge(JudgedRun(evaluation), Gates(max_error_rate=gates.get("max_error_rate") or 0.0))
    return tuple(answer for answer in answers if answer.verdict is not Verdict.PASS)


# -- what a run is compared with


@dataclass(frozen=True, slots=True)
class EarlierRun:
    """A run of this session that others can be compared with."""

    name: str
    scores: Mapping[str, float | None]
    fingerprints: Mapping[str, str]
    origin: str = "this session"


class RunHistory:
    """Evaluations of whole test splits by task, model and strategy.

    Attributes:
        began_s: When it was made, in Unix seconds.
    """

    def __init__(self) -> None:
        self.began_s = time.time()
        self._as_written: dict[tuple[str, str], ScoredEvaluation] = {}
        self._earlier: dict[tuple[str, str], dict[str, EarlierRun]] = {}

    def remember(
        self,
        task: Task,
        lm: MeteredLM,
        evaluation: ScoredEvaluation,
        *,
        fingerprints: Mapping[str, str],
        groups: Mapping[str, str] | None,
    ) -> ComparisonBasis:
        """Keep an evaluation of all examples; what other processes need to compare a run of theirs with it.

        Args:
            task: What was evaluated on.
            lm: The base model.
            evaluation: Of the whole test split.
            fingerprints: Of data, split, metric, program and lm.
            groups: Group by example id, where examples share one.
        """
        from copa_harness.judge.paired_tests import scores_by_id

        key = _key(task, lm)
        if evaluation.strategy == "none":
            self._as_written[key] = evaluation
        earlier = EarlierRun(evaluation.strategy, scores_by_id(evaluation), fingerprints)
        self._earlier.setdefault(key, {})[evaluation.strategy] = earlier
        return ComparisonBasis(key, dict(fingerprints), groups)

    def as_written(self, task: Task, lm: MeteredLM) -> ScoredEvaluation | None:
        """The program as written on the base model, if it was evaluated."""
        return self._as_written.get(_key(task, lm))

    def parses(self, task: Task, lm: MeteredLM) -> bool:
        """Whether at least half of the answers to the program as written parse, or nobody knows yet."""
        known = self.as_written(task, lm)
        return known is None or 2 * known.n_unparsed <= known.n

    def earlier(self, task: Task, lm: MeteredLM) -> Mapping[str, EarlierRun]:
        """Runs of the task on the base model, by strategy."""
        return self._earlier.get(_key(task, lm), {})


def _key(task: Task, lm: MeteredLM) -> tuple[str, str]:
    return (task_fingerprint(task), lm.fingerprint)


def accepted_opponent(name: str, *, task: str, model: str, settings: Settings) -> Baseline | None:
    """The accepted baseline that `better_than` names, if there is one.

    Raises:
        ArtifactError: Its file is damaged.
    """
    from copa_harness.store.baselines import load_baseline

    for known_as in dict.fromkeys((baseline_name(canonical(name), model), canonical(name), name)):
        baseline = load_baseline(settings.baseline_dir, task=task, name=known_as)
        if baseline is not None:
            return baseline
    return None


# -- one run


@dataclass(frozen=True, slots=True)
class GateContext:
    """What the gates of one run are judged on, apart from its scores.

    Attributes:
        task: The task's name.
        strategy: The run's strategy.
        model: The base model's name.
        fingerprints: Of data, split, metric, program and lm.
        calls: Distinct calls of the optimization.
        usage: What the optimization cost when it was made.
        n_expected: Examples of the split.
        groups: Group by example id, where examples share one.
        slices: Slice by example id; empty without slices.
        leakage: What of the split was seen.
        earlier: Runs of this session by strategy.
        settings: In force for this run.
        forms: Measures changed forms of the examples; None before they are evaluated.
    """

    task: str
    strategy: str
    model: str
    fingerprints: Mapping[str, str]
    calls: float
    usage: Usage
    n_expected: int
    groups: Mapping[str, str] | None
    slices: Mapping[str, str]
    leakage: LeakageReport
    earlier: Mapping[str, EarlierRun]
    settings: Settings
    forms: FormMeter | None = None

    def judged(
        self,
        evaluation: EvaluationResult,
        gates: Mapping[str, Any],
        *,
        repeats: Mapping[str, tuple[float | None, ...]],
        is_settled: bool = False,
        accepted: Baseline | None = None,
    ) -> tuple[GateResult, ...]:
        """The gates' answers, the leakage check's first if it has something to say.

        Args:
            evaluation: All examples of the split.
            gates: Values by name.
            repeats: Scores of every repeat by example id, if there are any.
            is_settled: Whether asking the same again can only answer the same.
            accepted: This run as the baseline it is about to become, when it is being blessed.

        Raises:
            ConfigurationError: A gate's value is out of range.
            ArtifactError: A baseline file is damaged.
        """
        from copa_harness.judge.gates import judge
        from copa_harness.judge.paired_gates import BLESS

        leaked = leakage_gate(self.leakage)
        rules = rules_of(gates, on_scores=not leaked)
        run = self._judged_run(rules, evaluation, is_settled=is_settled, accepted=accepted)
        if rules.max_violation_rate is not None and self.forms is not None:
            run = replace(run, violations=self.forms.measured())
        bless = BLESS if self.settings.against is None else "merge it: later changes are compared with it"
        run = replace(run, repeats=repeats or None)
        answers = self._required(judge(run, rules, bless=bless, seed=self.settings.seed))
        name = rules.better_than
        if name is None or run.opponent is not None:
            return leaked + answers
        open_until_the_end = _deferred(name, rules, family=run.families.get("better_than", 1))
        return leaked + tuple(
            open_until_the_end if answer.gate == open_until_the_end.gate else answer for answer in answers
        )

    def watch(self, ids: tuple[str, ...], gates: Mapping[str, Any]) -> SequentialJudge | None:
        """What decides how many examples are needed; None when no gate can be decided early."""
        from copa_harness.judge.sequential.stopping import SequentialJudge

        rules = rules_of(gates)
        if leakage_gate(self.leakage) or not any(gates.get(name) is not None for name in _EARLY):
            return None
        run = self._judged_run(rules, None)
        if rules.better_than is not None and run.opponent is None:
            return None  # judged when the session ends, on all examples
        return SequentialJudge(ids, rules, run=run, seed=self.settings.seed)

    def finished(
        self, watch: SequentialJudge, evaluation: EvaluationResult, gates: Mapping[str, Any]
    ) -> tuple[SequentialAnswer, tuple[GateResult, ...]]:
        """What a watched evaluation came to, with the gates on spending."""
        answer = watch.finish(evaluation)
        answers = self._required(answer.gates) + _left_out(gates)
        return answer, answers + self.spending(evaluation, gates)

    def spending(self, evaluation: EvaluationResult, gates: Mapping[str, Any]) -> tuple[GateResult, ...]:
        """The answers of the gates on what was spent."""
        from copa_harness.judge.gates import judge_spending
        from copa_harness.judge.paired_gates import JudgedRun

        run = JudgedRun(evaluation, calls=self.calls, usage=self.usage)
        return judge_spending(run, rules_of(gates))

    def _judged_run(
        self,
        rules: Gates,
        evaluation: EvaluationResult | None,
        *,
        is_settled: bool = False,
        accepted: Baseline | None = None,
    ) -> JudgedRun:
        from copa_harness.judge.paired_gates import JudgedRun

        is_blessed = accepted is not None
        accepted = accepted or self._baseline(rules)
        anchor = None if is_blessed or accepted is None else self._anchor()
        # As the baseline recorded them: the verdict of a test that runs alone is that of the whole suite.
        recorded = {} if accepted is None else accepted.families
        families = {name: max(recorded.get(name, 1), self.settings.families.get(name, 1)) for name in COMPARING}
        return JudgedRun(
            evaluation,
            n_expected=self.n_expected,
            fingerprints=self.fingerprints,
            groups=self.groups,
            slices=self.slices,
            baseline=accepted,
            anchor=None if anchor is None else anchor.baseline,
            n_looks=0 if anchor is None else anchor.n_looks,
            opponent=self._opponent(rules),
            calls=self.calls,
            usage=self.usage,
            is_identical=is_settled and evaluation is not None and _asks_the_same(evaluation, accepted),
            families=families,
        )

    def _required(self, answers: tuple[GateResult, ...]) -> tuple[GateResult, ...]:
        """The same, `max_regression` failed where it compares nothing and that must not pass unseen."""
        if not self.settings.needs_baselines:
            return answers
        why = "It fails here, for nothing was compared (copa_missing_baseline=pass lets it pass)."
        return tuple(
            replace(answer, verdict=Verdict.FAIL, message=f"{answer.message} {why}")
            if answer.verdict is Verdict.NOT_COMPARABLE and answer.gate.startswith("max_regression")
            else answer
            for answer in answers
        )

    def _baseline(self, rules: Gates) -> Baseline | None:
        """The accepted baseline of the same strategy on the same model, where a gate compares."""
        from copa_harness.store.baselines import load_baseline

        if not any(getattr(rules, name) is not None for name in COMPARING):
            return None
        name = baseline_name(self.strategy, self.model)
        return load_baseline(self.settings.baseline_dir, task=self.task, name=name)

    def _anchor(self) -> Anchor | None:
        from copa_harness.store.history import load_anchor

        return load_anchor(self.settings.baseline_dir, task=self.task, name=baseline_name(self.strategy, self.model))

    def _opponent(self, rules: Gates) -> Reference | None:
        """What `better_than` names: a strategy run earlier in this session, else an accepted baseline."""
        if rules.better_than is None:
            return None
        name = canonical(rules.better_than)
        if self.settings.one_of_many and name != "none":
            return None  # another process may have a run that goes first; the session's end knows them all
        if name in self.earlier:
            return self.earlier[name]
        return accepted_opponent(rules.better_than, task=self.task, model=self.model, settings=self.settings)


def _left_out(gates: Mapping[str, Any]) -> tuple[GateResult, ...]:
    """The gates that an evaluation in sequential mode cannot answer."""
    why = {
        "min_pass_all": "repeats are asked of a whole test split only. Next: run with --copa-repeat=3 instead of "
        "--copa-sequential.",
        "max_violation_rate": "changed forms are asked of a whole test split only. Next: run without "
        "--copa-sequential.",
    }
    return tuple(
        GateResult(f"{name}={gates[name]:g}", Verdict.UNDECIDED, message, {})
        for name, message in why.items()
        if gates.get(name) is not None
    )


def _asks_the_same(evaluation: EvaluationResult, accepted: Baseline | None) -> bool:
    """Whether every example's requests, weights and decoding settings are those of the baseline."""
    from copa_harness.judge.paired_tests import by_id

    now = by_id(evaluation, "requests")
    return accepted is not None and all(now.values()) and now == accepted.requests


def _deferred(name: str, rules: Gates, *, family: int) -> GateResult:
    """A `better_than` gate whose other side may still come, from a later test or from another process."""
    message = f"open until the session ends: no run of {name!r} is known here yet, another test may still bring one."
    details = {DEFERRED: True, "name": name, "alpha": rules.alpha, "family": family}
    return GateResult(f"better_than={name}", Verdict.UNDECIDED, message, details)


# -- the end of the session


def settle(entries: Sequence[Entry], *, settings: Settings) -> tuple[list[RunRecord], list[str]]:
    """Judge what was left open, and say which of it fails.

    Args:
        entries: Of all processes, in the order of their tests.
        settings: Where accepted baselines lie, and the seed.

    Returns:
        The records with every gate judged, and a remark for each that fails though its test could not say so.
    """
    from copa_harness.judge.gates import is_failure, overall

    settled, failed = [], []
    evaluated = [(entry, entry.record) for entry in entries if entry.record is not None]
    for index, (entry, record) in enumerate(evaluated):
        waiting = next((gate for gate in record.gates if is_deferred(gate)), None)
        if waiting is None:
            settled.append(record)
            continue
        answer = _settled(index, waiting, evaluated, settings=settings)
        gates = tuple(answer if gate is waiting else gate for gate in record.gates)
        settled.append(replace(record, gates=gates, verdict=overall(gates)))
        if entry.checked and is_failure(answer.verdict, undecided_fails=entry.undecided_fails):
            failed.append(
                f"{record.test}: {answer.gate} is judged now that all runs of the session are known: "
                f"{answer.verdict.value}. {answer.message}"
            )
    return settled, failed


Evaluated = Sequence[tuple[Entry, "RunRecord"]]


def _settled(index: int, waiting: GateResult, evaluated: Evaluated, *, settings: Settings) -> GateResult:
    from copa_harness.judge.paired_gates import JudgedRun, better_than

    entry, record = evaluated[index]
    assert entry.comparison is not None  # only a whole test split leaves a gate open
    name = waiting.details["name"]
    results = tuple(ExampleResult(example_id, score) for example_id, score in record.scores.items())
    evaluation = EvaluationResult(record.split, record.served_lm, results, record.interval or Interval(0.0, 1.0))
    run = JudgedRun(
        evaluation,
        fingerprints=entry.comparison.fingerprints,
        groups=entry.comparison.groups,
        opponent=_opponent_of(name, index, evaluated, settings=settings),
        families={"better_than": waiting.details["family"]},
    )
    return better_than(
        run,
        name=name,
        alpha=waiting.details["alpha"],
        seed=settings.seed if record.seed is None else record.seed,
    )


def _opponent_of(name: str, index: int, evaluated: Evaluated, *, settings: Settings) -> Reference | None:
    """What the run at `index` is compared with, by the rule above."""
    own, record = evaluated[index]
    found = [
        (position, EarlierRun(other.strategy, other.scores, entry.comparison.fingerprints))
        for position, (entry, other) in enumerate(evaluated)
        if position != index
        and entry.comparison is not None
        and own.comparison is not None
        and entry.comparison.key == own.comparison.key
        and other.strategy == canonical(name)
    ]
    before = [run for position, run in found if position < index]
    if before:
        return before[-1]
    baseline = accepted_opponent(name, task=record.task, model=record.lm, settings=settings)
    return baseline or next((run for _, run in found), None)
