"""What a DSPy optimizer evaluates, seen through DSPy's callbacks: remembered, and held to what can be paid.

The programs of complete evaluations are remembered, so that the best of them outlives a spent budget. An evaluation on
validation that cannot be paid is refused before it starts; one that perhaps can is run row by row: which rows a
budget pays for then never depends on the timing of threads. Knows evaluations and allowances, not optimizers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback

from copa_harness.errors import BudgetExhausted
from copa_harness.optimize.allowance import Allowance
from copa_harness.optimize.candidate import Candidate


class Evaluations(BaseCallback):
    """Remembers the programs of the complete evaluations: those on the largest part of the validation split so far.

    Minibatches are left out that way, and an optimizer that takes a part of a large split for the whole (MIPROv2's
    `auto`) is understood.

    Args:
        valset: The validation split.
        allowance: What pays for an evaluation.
        calls_per_example: Upper estimate of what one row costs.
        known: Keys of the candidates whose answers on the whole split are paid for.
        settings_of: A program's settings as a candidate.
    """

    def __init__(
        self,
        valset: Sequence[dspy.Example],
        *,
        allowance: Allowance,
        calls_per_example: int,
        known: frozenset[str],
        settings_of: Callable[[dspy.Module], Candidate],
    ) -> None:
        self._allowance, self._calls_per_example, self._settings_of = allowance, calls_per_example, settings_of
        self._lock = threading.Lock()
        self._validation = frozenset(id(example) for example in valset)
        self._running: dict[str, tuple[Candidate, list[int], Callable[[], None]]] = {}
        self._paid: dict[str, set[int]] = {key: set(self._validation) for key in known}
        self._found: dict[str, tuple[float, Candidate]] = {}
        self._n = 0
        self.n_complete = 0

    @property
    def best_first(self) -> tuple[Candidate, ...]:
        """Different programs, the best first, of equals the earlier."""
        return tuple(candidate for _, candidate in sorted(self._found.values(), key=lambda one: -one[0]))

    @property
    def covers_all(self) -> bool:
        """Whether the complete evaluations are on every validation example."""
        return self._n == len(self._validation)

    def on_evaluate_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Refuse what cannot be paid, and see to it that what perhaps can is run in order.

        Raises:
            BudgetExhausted: Even one call per row that is new is more than there are.
        """
        program, devset = inputs.get("program"), inputs.get("devset") or instance.devset
        if not isinstance(program, dspy.Module) or not program.named_predictors():
            return
        with self._lock:
            candidate, rows = self._settings_of(program), [id(example) for example in devset]
            n_new = len(set(rows) - self._paid.get(candidate.key, set()))
            restore = _nothing
            if not self._allowance.can_afford(n_new * self._calls_per_example):
                restore = self._held_to_budget(rows, n_new, instance, fixed=inputs.get("num_threads") is not None)
            self._running[call_id] = (candidate, rows, restore)

    def _held_to_budget(self, rows: Sequence[int], n_new: int, instance: Any, *, fixed: bool) -> Callable[[], None]:
        """What to do when the evaluation is over: put the number of threads back."""
        # A new prompt is at least one new call per row, stages before it may be answered already; and training rows may
        # have been answered outside of evaluations.
        is_validation = self._validation.issuperset(rows)
        if is_validation and (fixed or not self._allowance.can_afford(n_new)):
            raise BudgetExhausted(
                f"evaluating another program on {n_new} new rows takes up to {n_new * self._calls_per_example} calls, "
                f"and {self._allowance.remaining:g} are left; raise --copa-budget to go further"
            )
        if fixed:
            return _nothing
        threads, instance.num_threads = instance.num_threads, 1
        return partial(setattr, instance, "num_threads", threads)

    def on_evaluate_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        """Remember a program that was evaluated in full."""
        with self._lock:
            if call_id not in self._running:
                return
            candidate, rows, restore = self._running.pop(call_id)
            restore()
            if outputs is None or exception is not None:
                return
            self._paid.setdefault(candidate.key, set()).update(rows)
            n = len(rows)
            if n < self._n or not self._validation.issuperset(rows):
                return
            if n > self._n:
                self._n, self.n_complete = n, 0
                self._found.clear()
            self.n_complete += 1
            score = float(outputs.score)
            if candidate.key not in self._found or score > self._found[candidate.key][0]:
                self._found[candidate.key] = (score, candidate)


def _nothing() -> None:
    """For an evaluation that was left as it was."""
