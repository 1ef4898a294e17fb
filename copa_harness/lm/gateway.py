"""The one gateway every model call goes through: cache, single-flight, reserve, call, settle, store.

The same request asked by many threads or processes at once is paid once; the others wait and get the answer. An answer
found counts against the budget like one bought (see `Budget`), so a resumed run stops where an uninterrupted one does.
Every try at a call is reserved, and settled or refunded, on its own; a failed one is refunded unless the provider may
have billed it.

What the threads of one process share on their way through the gateway: answers seen lately, and who asks for what now.
"""

from __future__ import annotations

import itertools
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dspy.lm15 import RefusalPart, Request, Response

from copa_harness.documents import mask_text
from copa_harness.errors import ConfigurationError, ProviderError, RateLimitError
from copa_harness.lm.budget.cost import Cost, actual_cost, limits_of, lost_cost, worst_case
from copa_harness.lm.budget.scope import Scope, current_scope
from copa_harness.lm.cache.answers import AnswerStore, MemoryCache
from copa_harness.lm.cache.keys import recorded_bill, recorded_seconds, replayed_response, request_key, response_record
from copa_harness.lm.cache.store import ResponseCache
from copa_harness.lm.context import NotCachedError, Observed, current_observer, current_plan
from copa_harness.lm.engine import Engine, complete_priced, seed_of, time_left_s
from copa_harness.lm.provider_errors import Refused, engine_failure
from copa_harness.lm.retry import Patience, patience_of
from copa_harness.results import Usage

RECENT_ANSWERS = 4096
"""Answers a gateway keeps decoded in memory."""


class RecentAnswers:
    """The answers this process read or bought last, already checked and decoded."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._responses: dict[str, Response] = {}

    def get(self, key: str) -> Response | None:
        """The answer, with empty usage, or None."""
        return self._responses.get(key)

    def put(self, key: str, response: Response) -> None:
        """Remember an answer, and forget the one remembered longest."""
        with self._lock:
            self._responses[key] = response
            if len(self._responses) > RECENT_ANSWERS:
                del self._responses[next(iter(self._responses))]


class Flights:
    """One lock per key in use, within this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks: dict[str, tuple[threading.Lock, int]] = {}

    @contextmanager
    def alone(self, key: str) -> Iterator[None]:
        """While the block runs, no other thread is in a block for `key`."""
        with self._lock:
            lock, n_users = self._locks.get(key, (threading.Lock(), 0))
            self._locks[key] = (lock, n_users + 1)
        try:
            with lock:
                yield
        finally:
            with self._lock:
                lock, n_users = self._locks[key]
                if n_users == 1:
                    del self._locks[key]
                else:
                    self._locks[key] = (lock, n_users - 1)


class Gateway:
    """Caches, meters and bounds model calls. Thread-safe; shared by copies of the LMs that use it.

    Args:
        cache: Where answers are kept; None keeps them in the memory of this process.
    """

    def __init__(self, *, cache: ResponseCache | None) -> None:
        self.cache = cache
        self._store: AnswerStore = MemoryCache() if cache is None else cache
        self._flights = Flights()
        self._recent = RecentAnswers()
        self._new_of_late = False

    def __deepcopy__(self, memo: dict[int, object]) -> Gateway:
        return self

    def call(self, engine: Engine, request: Request, *, model: str, rollout_id: object, candidate: int) -> Response:
        """One completion, replayed if it is known, bought if it is not.

        Args:
            engine: What answers when the answer is not known.
            request: The canonical request.
            model: The model's name.
            rollout_id: DSPy's rollout id, or None.
            candidate: Index of the completion among the `n` of one call, from 0.

        Returns:
            The answer; a replayed one has empty usage.

        Raises:
            BudgetExhausted: A budget is spent: the current scope's, that of a scope around it, or the whole run's.
            ConfigurationError: A ceiling on tokens or dollars is set and the call's worst case cannot be known.
            NotCachedError: Only a plan is being made (see `planning`).
            ProviderError: The engine gave no answer (also a DSPy `LMError`, so DSPy handles it as one).
        """
        fingerprint = engine.fingerprint(model)
        key = request_key(request, rollout_id=rollout_id, candidate=candidate, fingerprint=fingerprint)
        call = _Call(engine, request, model, fingerprint, key, seed_of(rollout_id, candidate), current_scope())
        plan = current_plan()
        # What follows a new request is likely new as well: it is looked up once, when nobody else can buy it.
        found = self._replay(call, on_disk=plan is not None or not self._new_of_late)
        if plan is not None:
            if found is None:
                plan.add_missing(key, call.bound())
                raise NotCachedError("not paid: only a plan is being made, and the answer is not stored", model=model)
            plan.add_known(key, call.bound())
        if found is None:
            with self._flights.alone(key), self._store.locked(key):
                found = self._replay(call)
                self._new_of_late = found is None
                if found is None:
                    found = self._buy(call)
        if (observer := current_observer()) is not None:
            observer.add(_observed(self._store.get(key)))
        refusal = _refusal(found, model=model)
        if refusal is not None:
            call.scope.note_failure(refusal.kind, str(refusal))
            raise refusal
        return found

    def _replay(self, call: _Call, *, on_disk: bool = True) -> Response | None:
        response = self._recent.get(call.key)
        if response is None:
            if not on_disk:
                return None
            record = self._store.get(call.key)
            if record is None:
                return None
            response = replayed_response(record)
            self._recent.put(call.key, response)
        reservation = call.scope.reserve(call.key)
        try:
            if reservation.first:
                bounds = call.scope.bounds
                if bounds.tokens or bounds.usd:
                    cost = _recorded_cost(self._store.get(call.key), call.worst_case())
                    call.scope.hold(cost, replayed=True).settle(cost)
        except BaseException:
            call.scope.refund(reservation, failed=False)
            raise
        call.scope.settle(reservation, Usage(cached_calls=1))
        return response

    def _buy(self, call: _Call) -> Response:
        patience = patience_of(call.engine)
        n_failed, n_slowed, waited_s = 0, 0, 0.0
        failed_first_s = float("inf")
        for _ in itertools.count():
            started = time.perf_counter()
            try:
                response, usd = call.attempt(patience)
                seconds = time.perf_counter() - started
                break
            except ProviderError as failure:
                if isinstance(failure, RateLimitError):
                    n_slowed += 1
                else:
                    n_failed += 1
                failed_first_s = min(failed_first_s, time.monotonic())
                waited_s = max(waited_s, time.monotonic() - failed_first_s)
                pause_s = patience.pause_s(failure, n_failed=n_failed, n_slowed=n_slowed, waited_s=waited_s)
                if pause_s is None or pause_s >= call.scope.remaining_s:
                    raise
            time.sleep(pause_s)
            waited_s += pause_s
        if call.engine.fingerprint(call.model) == call.fingerprint:
            self._store.set(call.key, response_record(response, usd=usd, seconds=seconds))
        # else: the model was exchanged while it answered, and nobody can say which one did
        return response


class _Call:
    """One call that is not known yet, and the scope that pays for it."""

    def __init__(
        self, engine: Engine, request: Request, model: str, fingerprint: str, key: str, seed: int, scope: Scope
    ) -> None:
        self.engine, self.request, self.model, self.fingerprint = engine, request, model, fingerprint
        self.key, self.seed, self.scope = key, seed, scope

    def worst_case(self) -> Cost:
        """The most it can cost, as far as the ceilings in force ask.

        Raises:
            ConfigurationError: They ask, and nobody can know.
        """
        bounds = self.scope.bounds
        if not (bounds.tokens or bounds.usd):
            return Cost(calls=1)
        limits = limits_of(self.engine, self.model)
        return worst_case(self.request, limits, budget=bounds.budget, tokens=bounds.tokens, usd=bounds.usd)

    def bound(self) -> Cost | None:
        """The most it can cost, None when nobody can know."""
        limits = limits_of(self.engine, self.model)
        try:
            return worst_case(self.request, limits, budget="plan", tokens=True, usd=True)
        except ConfigurationError:
            return None

    def attempt(self, patience: Patience) -> tuple[Response, float | None]:
        """One try: the answer and its price in dollars, None when nobody knows it.

        Raises:
            ProviderError: It failed; it is counted, and refunded unless it may have been billed.
            BudgetExhausted: It does not fit under a ceiling.
        """
        scope, worst = self.scope, self.worst_case()
        with patience.turn():
            reservation = scope.reserve(self.key, paying=True)
            try:
                hold = scope.hold(worst)
            except BaseException:
                scope.refund(reservation, failed=False)
                raise
            try:
                response, usd = self._ask()
            except Exception as error:
                failure = engine_failure(error, model=self.model)
                if isinstance(failure, ProviderError):
                    scope.note_failure(failure.kind, mask_text("".join(traceback.format_exception(error))))
                    free = failure.billed is False
                else:
                    free = True
                if free:
                    hold.release()
                    scope.refund(reservation)
                else:
                    hold.settle(worst)
                    scope.settle(reservation, lost_cost(worst))
                if failure is error:
                    raise
                raise failure from error
            except BaseException:
                hold.settle(worst)  # interrupted in the middle: whether it is billed nobody will know
                scope.refund(reservation, failed=False)
                raise
            cost, usage = actual_cost(response, usd, worst=worst)
            hold.settle(cost)
            scope.settle(reservation, usage)
            return response, usd

    def _ask(self) -> tuple[Response, float | None]:
        token = time_left_s.set(self.scope.remaining_s)
        try:
            return complete_priced(self.engine, self.request, seed=self.seed)
        finally:
            time_left_s.reset(token)


def _recorded_cost(record: dict[str, object] | None, worst: Cost) -> Cost:
    if record is None:  # lost from the disk since it was read
        return worst - Cost(calls=1)
    response, usd = recorded_bill(record)
    cost, _ = actual_cost(response, usd, worst=worst)
    return cost - Cost(calls=1)


def _observed(record: dict[str, Any] | None) -> Observed:
    if record is None:  # not stored: the model was exchanged while it answered
        return Observed(None, None, None, None)
    response, usd = recorded_bill(record)
    return Observed(response.usage.input_tokens, response.usage.output_tokens, usd, recorded_seconds(record))


def _refusal(response: Response, *, model: str) -> Refused | None:
    said = [part.text for part in response.message.parts if isinstance(part, RefusalPart)]
    if not said and response.finish_reason != "content_filter":
        return None
    reason = " ".join(text for text in said if text) or response.message.text or "no reason given"
    return Refused(
        f"the model refused to answer ({'content filter' if not said else 'refusal'}): {reason[:300]}; it would again, "
        "so the refusal is kept and not paid for twice",
        model=model,
    )
