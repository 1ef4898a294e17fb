"""A whole run in sequential mode: which examples next, whether to stop, and what was found, saved and lost by it.

    watch = SequentialJudge(ids, gates, run=JudgedRun(None, baseline=accepted, fingerprints=fingerprints), seed=0)
    for block in watch.blocks(size=16):             # example ids to evaluate now, together
        watch.add(scores of the block by example id)
    answer = watch.finish(evaluation of the examples used)

All gates on scores are watched at once by the monitors of `monitors`; the run ends when each has its verdict or one has
failed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from copa_harness.formatting import counted, number, probability
from copa_harness.judge.gates import cost_per_answer, judge, overall
from copa_harness.judge.options import Gates
from copa_harness.judge.paired_gates import JudgedRun, better_than, changed_parts, max_regression
from copa_harness.judge.sequential.monitors import RegressionMonitor, ThresholdMonitor, random_order
from copa_harness.results import EvaluationResult, GateResult, Verdict


@dataclass(frozen=True, slots=True)
class SequentialAnswer:
    """What a sequential run found, and what it saved and cost.

    Attributes:
        gates: the answers of the gates on scores; spending gates are judged apart.
        n_used: examples evaluated.
        n_total: examples in the split.
        usd_saved: dollars the examples not evaluated would have cost; None when no price was seen.
    """

    gates: tuple[GateResult, ...]
    n_used: int
    n_total: int
    usd_saved: float | None = None

    @property
    def verdict(self) -> Verdict:
        """All gates together."""
        return overall(self.gates)

    @property
    def n_saved(self) -> int:
        """Examples that were not needed."""
        return self.n_total - self.n_used

    def text(self) -> str:
        """`stopped after 131 of 300 examples: 169 saved (56 %), about $0.34`."""
        if not self.n_saved:
            return f"all {counted(self.n_total, 'example')} were needed, nothing saved"
        saved = f"stopped after {self.n_used:,} of {counted(self.n_total, 'example')}: {self.n_saved:,} saved"
        cost = f", about ${self.usd_saved:,.2g}" if self.usd_saved else ""
        return f"{saved} ({100 * self.n_saved / self.n_total:.0f} %){cost}"

    def numbers(self) -> dict[str, Any]:
        """What a report says of it, as plain JSON types."""
        return {
            "n_used": self.n_used,
            "n_total": self.n_total,
            "usd_saved": self.usd_saved,
        }


def stopped_early(answer: GateResult, monitor: RegressionMonitor, *, n_used: int, n_total: int) -> GateResult:
    """The answer of a paired gate that was decided while looking."""
    assert monitor.verdict is not None
    rose, fell = monitor.p_values
    failed = monitor.verdict is Verdict.FAIL
    p_value = fell if failed else rose
    details = without_p_values(answer.details) | {"n_used": n_used, "n_total": n_total, "p_sequential": p_value}
    looked = "exact sign test with error spending" if monitor.is_exact else "betting e-process"
    so_far = number(details.get("difference"), signed=True)
    message = (
        f"{'a drop' if failed else 'a gain'} is shown after {n_used:,} of {counted(n_total, 'example')} ({looked}, "
        f"{probability(p_value)}, valid however often it looks). "
    )
    if n_used == n_total:
        message += f"The difference is {so_far}."
    else:
        # A run is stopped by a streak, so what it shows then is too extreme on average.
        message += f"The difference so far is {so_far}; runs are stopped when it looks large, so it tends to shrink."
    if failed:
        message += " Next: look at the worst examples; for the exact size of the drop run without --copa-sequential."
    return GateResult(answer.gate, monitor.verdict, message, details)


def without_p_values(details: Mapping[str, Any]) -> dict[str, Any]:
    """The details of a paired gate that was looked at: p-values of a single look hold for no moment one chose."""
    return {name: value for name, value in details.items() if not name.startswith("p_")}


class SequentialJudge:
    """Watches the gates on scores of one run while its examples are evaluated.

    Args:
        ids: ids of all examples of the split, each once.
        gates: the rules; `min_score`, `max_regression`, `better_than` and `max_error_rate` are watched.
        run: the run before its evaluation: what it is compared with (a reference that is not comparable is not
            watched), and which examples share a group.
        seed: of the random order.

    Raises:
        ValueError: for repeated ids.
    """

    def __init__(self, ids: tuple[str, ...], gates: Gates, *, run: JudgedRun, seed: int) -> None:
        self.units = random_order(ids, seed=seed, groups=run.groups)
        self.n_total, self.n_used = len(ids), 0
        self._gates, self._run, self._seed = gates, run, seed
        self._alpha = gates.alpha
        self._next_unit = self._n_failed = 0
        sizes = [len(unit) for unit in self.units]
        self._threshold: ThresholdMonitor | None = None
        if gates.min_score is not None and ids:
            self._threshold = ThresholdMonitor(gates.min_score, sizes=sizes, alpha=gates.alpha)
        self._paired: dict[str, tuple[RegressionMonitor, Mapping[str, float | None]]] = {}
        for kind, reference, margin in (
            ("regression", run.baseline, gates.max_regression),
            ("opponent", run.opponent, None if gates.better_than is None else 0.0),
        ):
            comparable = reference is not None and not changed_parts(reference, run.fingerprints)
            if margin is not None and reference is not None and comparable:
                is_binary = all(score in (None, 0, 1) for score in reference.scores.values())
                monitor = RegressionMonitor(
                    margin,
                    largest=max(sizes, default=1),
                    alpha=self._alpha,
                    alpha_fail=self._alpha_fail(kind),
                    n_units=len(sizes) if is_binary and ids else None,
                )
                self._paired[kind] = (monitor, reference.scores)

    def blocks(self, *, size: int) -> Iterator[tuple[str, ...]]:
        """Example ids to evaluate next, about `size` at a time and whole groups, until decided or none is left."""
        while not self.decided and self._next_unit < len(self.units):
            block: list[str] = []
            position = self._next_unit
            while position < len(self.units) and (not block or len(block) + len(self.units[position]) <= size):
                block += self.units[position]
                position += 1
            yield tuple(block)

    def add(self, scores: Mapping[str, float | None]) -> None:
        """See the scores of the next block; None for an example that failed.

        Raises:
            ValueError: the examples are not the next ones of the order, or a group came in part.
        """
        waiting = dict(scores)
        while waiting:
            if self._next_unit >= len(self.units) or not waiting.keys() >= set(self.units[self._next_unit]):
                raise ValueError(f"got scores of {sorted(waiting)[:3]}; expected those of the next block, all of them")
            unit = self.units[self._next_unit]
            self._next_unit += 1
            values = [waiting.pop(example_id) for example_id in unit]
            self.n_used += len(unit)
            self._n_failed += sum(value is None for value in values)
            # A block may hold more rows than the decision took; they are seen all the same, no verdict is taken back.
            if self._threshold is not None:
                self._threshold.add(values)
            for monitor, before in self._paired.values():
                pairs = [(before.get(example_id), value) for example_id, value in zip(unit, values, strict=True)]
                monitor.add([new - old for old, new in pairs if old is not None and new is not None])

    @property
    def verdicts(self) -> tuple[Verdict | None, ...]:
        """Of every watched gate so far."""
        threshold = () if self._threshold is None else (self._threshold.verdict,)
        return (*threshold, *(monitor.verdict for monitor, _ in self._paired.values()))

    @property
    def decided(self) -> bool:
        """Whether more examples cannot change the outcome: all verdicts are in, one failed, or too many are lost."""
        if self._n_failed > self._gates.max_error_rate * self.n_total + 1e-9:
            return True
        verdicts = self.verdicts
        return bool(verdicts) and (Verdict.FAIL in verdicts or None not in verdicts)

    def finish(self, evaluation: EvaluationResult) -> SequentialAnswer:
        """The gates' answers.

        Args:
            evaluation: of exactly the examples whose scores were added.

        Raises:
            ValueError: the evaluation has another number of examples.
        """
        if evaluation.n != self.n_used:
            raise ValueError(f"got an evaluation of {evaluation.n} examples; expected the {self.n_used} added")
        answers = list(judge(JudgedRun(evaluation), Gates(max_error_rate=self._gates.max_error_rate)))
        if self._threshold is not None:
            answers.append(self._min_score(self._threshold, evaluation))
        if self._gates.max_regression is not None:
            answers.append(self._compared("regression", evaluation))
        if self._gates.better_than is not None:
            answers.append(self._compared("opponent", evaluation))
        each = cost_per_answer(evaluation)
        saved = None if each is None else each * (self.n_total - self.n_used)
        return SequentialAnswer(tuple(answers), self.n_used, self.n_total, saved)

    def _min_score(self, monitor: ThresholdMonitor, evaluation: EvaluationResult) -> GateResult:
        if self.n_used == self.n_total:
            return next(
                answer
                for answer in judge(JudgedRun(evaluation), Gates(min_score=monitor.threshold))
                if answer.gate.startswith("min_score")
            )
        gate = f"min_score={monitor.threshold:g}"
        p_misses, p_reaches = monitor.p_values
        so_far = f"{number(evaluation.score)} on the first {self.n_used:,} of {counted(self.n_total, 'example')}"
        details = {"score": evaluation.score, "n": self.n_used, "n_total": self.n_total, "alpha": monitor.alpha}
        details |= {"p_misses": p_misses, "p_reaches": p_reaches}
        if monitor.verdict is None:
            return GateResult(gate, Verdict.UNDECIDED, f"{so_far}; {_NOT_NEEDED}", details)
        sure = (
            "the rest cannot change it" if monitor.is_certain else f"wrong in at most {100 * monitor.alpha:g} % of runs"
        )
        if monitor.verdict is Verdict.PASS:
            message = f"all {self.n_total:,} examples would reach {monitor.threshold:g} ({sure}): {so_far}."
        else:
            message = (
                f"all {self.n_total:,} examples would fall short of {monitor.threshold:g} ({sure}): {so_far}. Next: "
                f"look at the worst examples, give the optimizer more budget, or lower the threshold."
            )
        return GateResult(gate, monitor.verdict, message, details)

    def _alpha_fail(self, kind: str) -> float:
        return self._alpha / self._run.families.get("max_regression" if kind == "regression" else "better_than", 1)

    def _compared(self, kind: str, evaluation: EvaluationResult) -> GateResult:
        """The verdict the monitor reached while looking, else that of the test of all rows."""
        monitor = self._paired[kind][0] if kind in self._paired else None
        margin = (self._gates.max_regression or 0.0) if kind == "regression" else 0.0
        alpha, failing = self._alpha, self._alpha_fail(kind)
        decides_alone = monitor is not None and monitor.is_exact and not monitor.is_graded
        if monitor is not None and not decides_alone:
            alpha, failing = monitor.left
        run = replace(self._run, evaluation=evaluation)
        if kind == "regression":
            answer = max_regression(run, margin=margin, alpha=alpha, alpha_fail=failing, bless=_BLESS, seed=self._seed)
        else:
            name = self._gates.better_than or ""
            answer = better_than(run, name=name, alpha=alpha, alpha_fail=failing, seed=self._seed)
        if monitor is None:
            return answer
        if monitor.verdict is not None:
            return stopped_early(answer, monitor, n_used=self.n_used, n_total=self.n_total)
        if self.n_used < self.n_total:
            return GateResult(answer.gate, Verdict.UNDECIDED, _NOT_NEEDED, without_p_values(answer.details))
        is_looked_for = answer.verdict is Verdict.FAIL or (answer.verdict is Verdict.PASS and margin == 0)
        if decides_alone and is_looked_for:
            return GateResult(answer.gate, Verdict.UNDECIDED, _SPENT, without_p_values(answer.details))
        return answer


_BLESS = "run all examples with --copa-bless (without --copa-sequential) and commit the file it writes"

_NOT_NEEDED = "left open, because another gate ended the run first. Next: mend that one and run again."

_SPENT = (
    "a single look at all rows would decide it; looking after every row has left too little of the error rate for the "
    "last one. Next: run without --copa-sequential."
)
