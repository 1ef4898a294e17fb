"""The one door every model call goes through: cache, single-flight, reserve, call, settle, store.

The same request asked by many threads or processes at once is paid once; the others wait and get the answer. An
answer found counts against the budget like one bought (see `Budget`), so a resumed run stops where an uninterrupted
one does. A failed call is refunded. Knows nothing of DSPy programs, and of engines only the seam.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dspy.lm15 import Request, Response

from copa_harness.lm.answers import AnswerStore, MemoryCache
from copa_harness.lm.cache import ResponseCache
from copa_harness.lm.engines import Engine, PricedEngine, seed_of
from copa_harness.lm.failures import engine_failure
from copa_harness.lm.request_key import replayed_response, request_key, response_record
from copa_harness.lm.scope import Scope, current_scope
from copa_harness.results import Usage


class Door:
    """Caches, meters and bounds model calls. Thread-safe; shared by copies of the LMs that use it.

    Args:
        cache: Where answers are kept; None keeps them in the memory of this process.
    """

    def __init__(self, *, cache: ResponseCache | None) -> None:
        self.cache = cache
        self._store: AnswerStore = MemoryCache() if cache is None else cache
        self._flights = _Flights()

    def __deepcopy__(self, memo: dict[int, object]) -> Door:
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
            BudgetExhausted: The current scope's budget is spent.
            ProviderError: The engine gave no answer (also a DSPy `LMError`, so DSPy handles it as one).
        """
        key = request_key(
            request, rollout_id=rollout_id, candidate=candidate, fingerprint=engine.fingerprint(model)
        )
        scope = current_scope()
        found = self._replay(key, scope)
        if found is not None:
            return found
        with self._flights.alone(key), self._store.claimed(key):
            found = self._replay(key, scope)
            if found is not None:
                return found
            reservation = scope.reserve(key, paying=True)
            try:
                response, usd = _ask(engine, request, seed=seed_of(rollout_id, candidate))
            except Exception as error:
                scope.refund(reservation)
                failure = engine_failure(error, model=model)
                if failure is error:
                    raise
                raise failure from error
            except BaseException:
                scope.refund(reservation, failed=False)
                raise
            scope.settle(reservation, _paid(response, usd))
            self._store.set(key, response_record(response))
            return response

    def _replay(self, key: str, scope: Scope) -> Response | None:
        record = self._store.get(key)
        if record is None:
            return None
        response = replayed_response(record)
        scope.settle(scope.reserve(key), Usage(cached_calls=1))
        return response


def _ask(engine: Engine, request: Request, *, seed: int) -> tuple[Response, float | None]:
    if isinstance(engine, PricedEngine):
        return engine.complete_priced(request, seed=seed)
    return engine.complete(request, seed=seed), 0.0


def _paid(response: Response, usd: float | None) -> Usage:
    return Usage(
        paid_calls=1,
        input_tokens=response.usage.input_tokens or 0,
        output_tokens=response.usage.output_tokens or 0,
        usd=usd or 0.0,
    )


class _Flights:
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
