"""What a training is charged to the budget of a run: all its steps, held before the first one is taken.

Steps that were taken before (by a training that was killed, or one that is finished and only read) count against the
scope's ceilings as they did then, so that a run begun again stops where an uninterrupted one does; the ledger of the
whole run counts only what is paid now. A scope is charged once for a recipe. Knows nothing of training.
"""

from __future__ import annotations

import threading
import weakref

from copa_harness.errors import BudgetExhausted
from copa_harness.lm.accounts import Cost
from copa_harness.lm.holds import Hold
from copa_harness.lm.scope import Scope

_charged: weakref.WeakKeyDictionary[Scope, set[str]] = weakref.WeakKeyDictionary()
_charged_lock = threading.Lock()


class Charge:
    """Holds the steps of one training in a scope, from now until `settle`.

    Args:
        scope: Whose budget pays.
        recipe: The training's content address.
        planned: Steps of the whole training, if it is not stopped early.
        taken_before: How many of them need not be paid any more.

    Raises:
        BudgetExhausted: They do not fit under a ceiling.
    """

    def __init__(self, scope: Scope, recipe: str, *, planned: int, taken_before: int) -> None:
        self._scope, self._recipe, self._before = scope, recipe, taken_before
        self._replayed: Hold | None = None
        self._paid: Hold | None = None
        with _charged_lock:
            free = recipe in _charged.get(scope, ())
        if taken_before and not free:
            self._replayed = scope.hold(Cost(train_steps=taken_before), replayed=True)
        if planned > taken_before:
            try:
                self._paid = scope.hold(Cost(train_steps=planned - taken_before))
            except BaseException:
                if self._replayed is not None:
                    self._replayed.release()
                raise

    def check_seconds(self) -> None:
        """To be called between steps.

        Raises:
            BudgetExhausted: The seconds of the scope, of one around it, or of the run are over.
        """
        if self._scope.remaining_s <= 0:
            self._scope.hold(Cost()).release()  # refuses in the scope's own words
            raise BudgetExhausted(f"the seconds of {self._scope.name!r} are over; raise --copa-budget to go further")

    def settle(self, taken: int) -> None:
        """Replace what is held by the steps the training has taken altogether."""
        if self._replayed is not None:
            self._replayed.settle(Cost(train_steps=min(taken, self._before)))
        if self._paid is not None:
            self._paid.settle(Cost(train_steps=max(0, taken - self._before)))
        with _charged_lock:
            _charged.setdefault(self._scope, set()).add(self._recipe)
