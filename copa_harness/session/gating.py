"""A run and its gates: everything it is compared with, found and handed to `judge`.

The statistics are `judge`'s; nothing here decides. Knows nothing of records or pytest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from copa_harness.errors import ConfigurationError
from copa_harness.results import EvaluationResult, GateResult, Usage, Verdict
from copa_harness.session.blessing import baseline_name
from copa_harness.session.memory import Earlier
from copa_harness.session.settings import Settings

if TYPE_CHECKING:
    from copa_harness.judge.early import SequentialJudge
    from copa_harness.judge.early_answers import SequentialAnswer
    from copa_harness.judge.gates import Gates
    from copa_harness.judge.leakage import LeakageReport
    from copa_harness.judge.regression import Reference
    from copa_harness.store.baselines import Baseline


@dataclass(frozen=True, slots=True)
class Case:
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
        leakage: What of the split was seen.
        earlier: Runs of this session by strategy.
        settings: In force for this run.
    """

    task: str
    strategy: str
    model: str
    fingerprints: Mapping[str, str]
    calls: float
    usage: Usage
    n_expected: int
    groups: Mapping[str, str] | None
    leakage: LeakageReport
    earlier: Mapping[str, Earlier]
    settings: Settings

    def judged(
        self,
        evaluation: EvaluationResult,
        gates: Mapping[str, Any],
        *,
        repeats: Mapping[str, tuple[float | None, ...]],
        accepted: Baseline | None = None,
    ) -> tuple[GateResult, ...]:
        """The gates' answers, the leakage guard's first if it has something to say.

        Args:
            evaluation: All examples of the split.
            gates: Values by name.
            repeats: Scores of every repeat by example id, if there are any.
            accepted: This run as the baseline it is about to become, when it is being blessed.

        Raises:
            ConfigurationError: A gate's value is out of range.
            ArtifactError: A baseline file is damaged.
        """
        from copa_harness.judge.gates import judge

        leaked = guarded(self.leakage)
        rules = rules_of(gates, self.settings, on_scores=not leaked)
        return leaked + judge(
            evaluation,
            rules,
            calls=self.calls,
            baseline=accepted or self._baseline(rules),
            rival=self._rival(rules),
            fingerprints=self.fingerprints,
            n_expected=self.n_expected,
            usage=self.usage,
            groups=self.groups,
            repeats=repeats or None,
            seed=self.settings.seed,
        )

    def watch(self, ids: tuple[str, ...], gates: Mapping[str, Any]) -> SequentialJudge | None:
        """What decides how many examples are needed; None when no gate can be decided early."""
        from copa_harness.judge.early import SequentialJudge

        rules = rules_of(gates, self.settings)
        if guarded(self.leakage) or not any(gates.get(name) is not None for name in _EARLY):
            return None
        return SequentialJudge(
            ids,
            rules,
            seed=self.settings.seed,
            baseline=self._baseline(rules),
            rival=self._rival(rules),
            fingerprints=self.fingerprints,
            groups=self.groups,
        )

    def finished(
        self, watch: SequentialJudge, evaluation: EvaluationResult, gates: Mapping[str, Any]
    ) -> tuple[SequentialAnswer, tuple[GateResult, ...]]:
        """What a watched evaluation came to, with the gates on spending."""
        answer = watch.finish(evaluation)
        return answer, answer.gates + self.spending(evaluation, gates)

    def spending(self, evaluation: EvaluationResult, gates: Mapping[str, Any]) -> tuple[GateResult, ...]:
        """The answers of the gates on what was spent."""
        from copa_harness.judge.spending import judge_spending

        rules = rules_of(gates, self.settings)
        return judge_spending(rules, calls=self.calls, usage=self.usage, evaluation=evaluation)

    def _baseline(self, rules: Gates) -> Reference | None:
        """The accepted baseline of the same strategy on the same model."""
        from copa_harness.store.baselines import load_baseline

        if rules.max_regression is None:
            return None
        name = baseline_name(self.strategy, self.model)
        return load_baseline(self.settings.baseline_dir, task=self.task, name=name)

    def _rival(self, rules: Gates) -> Reference | None:
        """What `better_than` names: a strategy run earlier in this session, else an accepted baseline."""
        from copa_harness.store.baselines import load_baseline

        if rules.better_than is None:
            return None
        name = canonical(rules.better_than)
        if name in self.earlier:
            return self.earlier[name]
        for known_as in dict.fromkeys((baseline_name(name, self.model), name, rules.better_than)):
            baseline = load_baseline(self.settings.baseline_dir, task=self.task, name=known_as)
            if baseline is not None:
                return baseline
        return None


_EARLY = ("min_score", "max_regression", "better_than")


def guarded(report: LeakageReport) -> tuple[GateResult, ...]:
    """The leakage guard's answer when test examples were seen; nothing otherwise."""
    from copa_harness.judge.leakage import no_leakage

    answer = no_leakage(report)
    return (answer,) if answer.verdict is Verdict.ERROR else ()


ON_SCORES = (*_EARLY, "min_pass_all")
"""Gates that mean nothing once test examples were seen, or when only some were evaluated."""


def rules_of(gates: Mapping[str, Any], settings: Settings, *, on_scores: bool = True) -> Gates:
    """Gates by name as `judge` wants them.

    Args:
        gates: Values by name.
        settings: How many comparisons share the error rate.
        on_scores: False leaves out the gates on scores, which mean nothing once examples were seen.

    Raises:
        ConfigurationError: A value is out of range.
    """
    from copa_harness.judge.gates import Gates

    kept = {name: value for name, value in gates.items() if on_scores or name not in ON_SCORES}
    return Gates(**kept, n_comparisons=max(1, settings.n_comparisons))


def canonical(name: str) -> str:
    """A strategy's name as runs carry it; any other name as it is."""
    from copa_harness.optimize.strategy import parse_strategy

    try:
        return " -> ".join(str(step) for step in parse_strategy(name))
    except ConfigurationError:
        return name
