"""The one gateway every model call goes through: cache, single-flight, reserve, call, settle, store.

    gateway.call(engine, request)
        known?      from memory, then from disk: counted in the scope like a bought one, and given back
        wait        for whoever asks the same thing now, in this process or another (single-flight), and look again
        charge      refused here if the budget does not allow the worst case (see `budget.scope`)
        ask         one attempt of the engine at a time, tried again as its retry policy says
        settle      what it came to; refunded if it failed and cannot have been billed
        store       unless the weights were exchanged meanwhile, or a stored answer was asked for afresh

The same request asked by many threads or processes at once is paid once; the others wait and get the answer. An answer
found counts against the budget like one bought (see `Budget`), so a resumed run stops where an uninterrupted one does.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from dspy.lm15 import RefusalPart, Request, Response

from copa_harness.credentials import mask_text
from copa_harness.errors import ConfigurationError, ProviderError, RateLimitError
from copa_harness.lm.budget.cost import Bounds, Cost, actual_cost, is_truncated
from copa_harness.lm.budget.scope import Scope
from copa_harness.lm.cache.answers import AnswerStore, MemoryCache
from copa_harness.lm.cache.keys import (
    recorded_bill,
    recorded_seconds,
    replayed_response,
    request_key,
    response_record,
    stored_at,
)
from copa_harness.lm.call_context import (
    CallContext,
    NotCachedError,
    Observed,
    calling,
    current_context,
    is_counted,
    scope_of,
)
from copa_harness.lm.engine import Engine, seed_of
from copa_harness.lm.provider_errors import Refused, engine_failure, lets_nobody_in
from copa_harness.tracing import span

RECENT_ANSWERS = 4096
"""Answers a gateway keeps decoded in memory."""

_ANYTHING = Bounds(tokens=True, usd=True, budget="plan")


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


class SingleFlight:
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


@dataclass(frozen=True, slots=True)
class _Call:
    """One call on its way: what is asked of whom, under which key the answer is kept, and who pays."""

    engine: Engine
    request: Request
    context: CallContext
    scope: Scope
    fingerprint: str
    key: str
    candidate: int

    def known_cost(self, record: dict[str, object] | None) -> Cost:
        """What a stored answer cost when it was bought, calls left out; the worst case if it was lost since."""
        worst = self.engine.worst_case(self.request, self.scope.bounds)
        if record is None:
            return worst - Cost(calls=1)
        response, usd = recorded_bill(record)
        cost, _ = actual_cost(response, usd, worst=worst)
        return cost - Cost(calls=1)

    def bound(self) -> Cost | None:
        """The most it can cost, None when nobody can know."""
        try:
            return self.engine.worst_case(self.request, _ANYTHING)
        except ConfigurationError:
            return None

    def attempt(self) -> tuple[Response, float | None]:
        """One try: the answer and its price in dollars, None when nobody knows it.

        Raises:
            ProviderError: It failed; it is counted, and refunded unless it may have been billed.
            BudgetExhausted: It does not fit under a ceiling.
        """
        with span(f"chat {self.request.model}", **self._attributes()) as note:
            response, usd = self._charged()
            note(
                gen_ai__usage__input_tokens=response.usage.input_tokens,
                gen_ai__usage__output_tokens=response.usage.output_tokens,
                copa__usd=usd,
            )
        return response, usd

    def _attributes(self) -> dict[str, object]:
        phase = self.context.phase
        return {
            "gen_ai__operation__name": "chat",
            "gen_ai__provider__name": self.engine.name,
            "gen_ai__request__model": self.request.model,
            "copa__phase": None if phase is None else phase.value,
        }

    def _charged(self) -> tuple[Response, float | None]:
        engine, scope = self.engine, self.scope
        worst = engine.worst_case(self.request, scope.bounds)
        place = nullcontext() if engine.concurrency is None else engine.concurrency.turn()
        with place, scope.charge(self.key, worst=worst, phase=self.context.phase) as charge:
            if (closed := scope.shut_out(engine)) is not None:
                charge.refund(failed=False)
                raise type(closed)(f"not asked, since the provider lets nobody in: {closed}", model=self.request.model)
            try:
                response, usd = self._ask()
            except Exception as error:
                failure = engine_failure(error, model=self.request.model)
                if isinstance(failure, ProviderError):
                    scope.note_failure(failure.kind, mask_text("".join(traceback.format_exception(error))))
                if getattr(failure, "billed", False) is not False:
                    charge.lose()
                if is_counted(self.context) and lets_nobody_in(failure):
                    scope.let_in(engine, failure)
                if failure is error:
                    raise
                raise failure from error
            charge.settle(*actual_cost(response, usd, worst=worst))
            scope.let_in(engine)
        return response, usd

    def _ask(self) -> tuple[Response, float | None]:
        seed, left_s = seed_of(self.context.rollout_id, self.candidate), self.scope.remaining_s
        context = self.context if left_s == self.context.time_left_s else replace(self.context, time_left_s=left_s)
        with calling(context):
            return self.engine.complete_priced(self.request, seed=seed)


class Gateway:
    """Caches, meters and bounds model calls. Thread-safe; shared by copies of the LMs that use it.

    Args:
        cache: Where answers are kept; None keeps them in the memory of this process.
    """

    def __init__(self, *, cache: AnswerStore | None) -> None:
        self.cache = cache
        self._store: AnswerStore = MemoryCache() if cache is None else cache
        self._single_flight = SingleFlight()
        self._recent = RecentAnswers()
        self._new_of_late = False

    def __deepcopy__(self, memo: dict[int, object]) -> Gateway:
        return self

    def call(
        self, engine: Engine, request: Request, *, context: CallContext | None = None, candidate: int = 0
    ) -> Response:
        """One completion, replayed if it is known, bought if it is not.

        Args:
            engine: What answers when the answer is not known.
            request: The canonical request.
            context: What travels with the call; the one here and now by default.
            candidate: Index of the completion among the `n` of one call, from 0.

        Returns:
            The answer; a replayed one has empty usage.

        Raises:
            BudgetExhausted: A budget is spent: the current scope's, that of a scope around it, or the whole run's.
            ConfigurationError: A ceiling on tokens or dollars is set and the call's worst case cannot be known.
            NotCachedError: Only a plan is being made (see `call_context.dry_run`).
            ProviderError: The engine gave no answer (also a DSPy `LMError`, so DSPy handles it as one).
        """
        if context is None:
            context = current_context()
        model, dry_run = request.model, context.dry_run
        fingerprint = engine.fingerprint(model)
        key = request_key(request, rollout_id=context.rollout_id, candidate=candidate, fingerprint=fingerprint)
        if context.requests is not None:
            context.requests.append(key)
        call = _Call(engine, request, context, scope_of(context), fingerprint, key, candidate)
        if context.afresh is not None and (record := self._store.get(key)) is not None:
            varies = engine.is_endpoint or request.config.temperature != 0
            if context.afresh.takes(context.phase, stored_s=stored_at(record), varies=varies):
                return _accepted(self._call_provider(call, is_stored=False), call)
        # What follows a new request is likely new as well: it is looked up once, when nobody else can buy it.
        found = self._replay(call, on_disk=dry_run is not None or not self._new_of_late)
        if dry_run is not None:
            if found is None:
                dry_run.add_missing(key, call.bound())
                raise NotCachedError("not paid: only a plan is being made, and the answer is not stored", model=model)
            dry_run.add_known(key, call.bound())
        if found is None:
            with self._single_flight.alone(key), self._store.locked(key):
                found = self._replay(call)
                self._new_of_late = found is None
                if found is None:
                    found = self._call_provider(call, is_stored=context.afresh is None)
        if context.observer is not None:
            context.observer.add(_observed(self._store.get(key)))
        return _accepted(found, call)

    def _replay(self, call: _Call, *, on_disk: bool = True) -> Response | None:
        key = call.key
        response = self._recent.get(key)
        if response is None:
            record = self._store.get(key) if on_disk else None
            if record is None:
                return None
            response = replayed_response(record)
            self._recent.put(key, response)
        call.scope.replay(
            key,
            cost=lambda: call.known_cost(self._store.get(key)),
            phase=call.context.phase,
            truncated=is_truncated(response),
        )
        return response

    def _call_provider(self, call: _Call, *, is_stored: bool = True) -> Response:
        policy, concurrency = call.engine.retry_policy, call.engine.concurrency
        n_failed, n_slowed, waited_s = 0, 0, 0.0
        failed_first_s = float("inf")
        while True:
            started = time.perf_counter()
            try:
                response, usd = call.attempt()
                seconds = time.perf_counter() - started
                break
            except ProviderError as failure:
                if isinstance(failure, RateLimitError):
                    n_slowed += 1
                else:
                    n_failed += 1
                failed_first_s = min(failed_first_s, time.monotonic())
                waited_s = max(waited_s, time.monotonic() - failed_first_s)
                if concurrency is not None and policy.gives_up(failure, refused_s=concurrency.refused_s):
                    raise
                pause_s = policy.pause_s(failure, n_failed=n_failed, n_slowed=n_slowed, waited_s=waited_s)
                if pause_s is None or pause_s >= call.scope.remaining_s:
                    raise
            time.sleep(pause_s)
            waited_s += pause_s
        if is_stored and call.engine.fingerprint(call.request.model) == call.fingerprint:
            others = self._store.set(call.key, response_record(response, usd=usd, seconds=seconds))
            response = response if others is None else replayed_response(others)
        # else: the model was exchanged while it answered, and nobody can say which one did
        return response


def _observed(record: dict[str, Any] | None) -> Observed:
    if record is None:  # not stored: the model was exchanged while it answered
        return Observed(None, None, None, None)
    response, usd = recorded_bill(record)
    return Observed(response.usage.input_tokens, response.usage.output_tokens, usd, recorded_seconds(record))


def _accepted(response: Response, call: _Call) -> Response:
    """The answer, unless it is a refusal, which is raised."""
    refusal = _refusal(response, model=call.request.model)
    if refusal is not None:
        call.scope.note_failure(refusal.kind, str(refusal))
        raise refusal
    return response


def _refusal(response: Response, *, model: str) -> Refused | None:
    said = [part.text for part in response.message.parts if isinstance(part, RefusalPart)]
    if not said and response.finish_reason != "content_filter":
        return None
    reason = mask_text(" ".join(text for text in said if text) or response.message.text or "no reason given")
    return Refused(
        f"the model refused to answer ({'content filter' if not said else 'refusal'}): {reason[:300]}; it would again, "
        "so the refusal is kept and not paid for twice",
        model=model,
    )
