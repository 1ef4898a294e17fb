"""The guard: another task that tuned weights must not get worse at by more than a margin.

    @pytest.mark.copa(guard=tasks.iris, guard_margin=0.05)

A training makes a model better at one thing and may make it worse at others. So each of the weights that could be
returned is asked the guard's validation rows, with the guard's own program as written, and so are the weights as given;
weights that lose more than the margin are left out like a program that breaks a limit. These calls count like others,
and weights are asked once. What is compared is the observed difference of means; its interval is told beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from copa_harness.errors import BudgetExhausted, ConfigurationError
from copa_harness.optimize.search.candidate import Candidate, model_name
from copa_harness.optimize.search.scoring import Validation
from copa_harness.optimize.step_budget import CallBudget, OutOfCalls
from copa_harness.results import Phase

if TYPE_CHECKING:
    from copa_harness.lm.budget.scope import Scope
    from copa_harness.tasks.task import Task


def guard_task(given: Task | Callable[[], Task]) -> Task:
    """The task of the option `guard`.

    Raises:
        ConfigurationError: It is none, nor makes one.
    """
    from copa_harness.tasks.task import Task

    task = given if isinstance(given, Task) else given()
    if not isinstance(task, Task):
        raise ConfigurationError(
            f"got guard={given!r}, which makes a {type(task).__name__}; expected a Task or a function without "
            "arguments that makes one, for instance tasks.iris"
        )
    return task


@dataclass(slots=True)
class Guard:
    """What weights score on the guard's task.

    Attributes:
        task: The other task.
        margin: What may be lost, 0..1.
        own: The models as given.
        validation: Its scores on the guard's rows.
    """

    task: Task
    margin: float
    own: Sequence[Any]
    validation: Validation
    _found: dict[str, str | None] = field(default_factory=dict)

    def broken_by(self, candidate: Candidate, *, scope: Scope, say: Callable[..., None]) -> str | None:
        """What a candidate's weights lose; None where they keep the margin or are the model's own.

        Args:
            candidate: Whose weights.
            scope: Pays for asking. Where it cannot, the weights count as losing, for nobody knows.
            say: Takes a sentence about every weights asked, `headline=True` with one about a loss.

        Raises:
            ProviderError: The model answers none of the rows.
        """
        own = set(map(model_name, self.own))
        for old, new in zip(self.own, candidate.lms, strict=True):
            name = model_name(new)
            if name in own:
                continue
            if name not in self._found:
                try:
                    self._found[name] = self._asked(old, new, scope, say)
                except (OutOfCalls, BudgetExhausted):
                    return f"the calls left do not pay for asking the guard {self.task.name}"
            if (broken := self._found[name]) is not None:
                return broken
        return None

    def _asked(self, old: Any, new: Any, scope: Scope, say: Callable[..., None]) -> str | None:
        before, after = Candidate.of(self.task.program, lm=old), Candidate.of(self.task.program, lm=new)
        for candidate in (before, after):
            self.validation.complete(candidate, allowance=CallBudget(scope, math.inf), phase=Phase.WEIGHTS)
        found = self.validation.compared(before, after)
        text = (
            f"guard {self.task.name}: {self.validation.mean(before):.3f} -> {self.validation.mean(after):.3f} on "
            f"{found.n} rows ({found.difference:+.3f} [{found.interval.low:+.3f}, {found.interval.high:+.3f}])"
        )
        is_kept = found.difference >= -self.margin - 1e-9
        text += "" if is_kept else f", more than {self.margin:g} lost"
        say(text, headline=not is_kept)
        return None if is_kept else text
