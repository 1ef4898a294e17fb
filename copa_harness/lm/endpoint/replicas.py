"""One model behind several addresses: each request goes to the replica with the fewest under way.

The first address names them all: what is known of one server stays known when replicas join or leave. Before they
answer in a model's name each answers the *handshake*, a fixed request; who answers it otherwise than the others serves
something else. One that cannot be reached is left out for a while, and what it was asked is asked of another within the
same attempt, so it is paid once: who is gone sends no bill. Where all are gone, the gateway waits for them as for one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspy.lm15 import Config, Message, Request, Response

from copa_harness.errors import ConfigurationError, ConnectionFailedError, ProviderError, ProviderTimeoutError
from copa_harness.lm.budget.cost import Limits, actual_cost
from copa_harness.lm.budget.scope import Scope
from copa_harness.lm.endpoint.engine import public_url
from copa_harness.lm.endpoint.transport import is_there
from copa_harness.lm.engine import Capabilities, Engine
from copa_harness.lm.retry import AdaptiveConcurrency

if TYPE_CHECKING:
    from copa_harness.lm.local.engine import TransformersEngine

OUT_S = 30.0
"""Seconds after which one that was gone is tried again."""

_GONE = (ConnectionFailedError, ProviderTimeoutError)


@dataclass(slots=True, eq=False)
class _Replica:
    url: str
    engine: Any
    examined: set[str] = field(default_factory=set)
    examining: threading.Lock = field(default_factory=threading.Lock)
    n_under_way: int = 0
    n_asked: int = 0
    out_until_s: float = 0.0
    gone: str = ""


class ReplicaEngine(Engine):
    """Several engines that answer alike.

    Args:
        engines: Endpoint engines, or vLLM engines with the same copy of the weights, one per address.
        urls: Their addresses, in the same order.
    """

    is_endpoint = True

    def __init__(self, engines: Sequence[Engine], *, urls: Sequence[str]) -> None:
        self._replicas = [_Replica(url, engine) for url, engine in zip(urls, engines, strict=True)]
        self._first: Any = engines[0]
        self.name, self.retry_policy = self._first.name, self._first.retry_policy
        self.takes_lora = self._first.takes_lora
        self.concurrency = AdaptiveConcurrency(start=8 * len(engines))
        self._lock, self._examining = threading.Lock(), threading.Lock()
        self._handshakes: dict[str, tuple[_Replica, str]] = {}
        self._refused: dict[str, str] = {}

    # -- an endpoint engine

    def fingerprint(self, model: str) -> str:
        """As of the first one."""
        return str(self._first.fingerprint(model))

    def limits(self, model: str) -> Limits:
        """As of the first one."""
        limits: Limits = self._first.limits(model)
        return limits

    def takes_stop(self, model: str) -> bool:
        """As of all of them."""
        return all(replica.engine.takes_stop(model) for replica in self._replicas)

    def capabilities(self, model: str) -> Capabilities:
        """As of the first one."""
        capabilities: Capabilities = self._first.capabilities(model)
        return capabilities

    @property
    def description(self) -> str | None:
        """How many answers were asked of each, and which are gone."""
        if not any(replica.n_asked for replica in self._replicas):
            return None
        asked = ", ".join(
            f"{public_url(replica.url)} {replica.n_asked:,}" + (f" (gone: {replica.gone})" if replica.gone else "")
            for replica in self._replicas
        )
        return f"requests by replica, a handshake of {HANDSHAKE_TOKENS} tokens before them: {asked}"

    def complete(self, request: Request, *, seed: int) -> Response:
        """One attempt at one completion."""
        return self.complete_priced(request, seed=seed)[0]

    def complete_priced(self, request: Request, *, seed: int) -> tuple[Response, float | None]:
        """The completion and its price.

        Raises:
            ConfigurationError: Two replicas answer the handshake differently.
            ProviderError: None of them gave an answer.
        """
        self._examine_all(request.model)
        tried: list[_Replica] = []
        while True:
            with self._lent(tried) as replica:
                try:
                    self._examine(replica, request.model)
                    replica.n_asked += 1
                    priced: tuple[Response, float | None] = replica.engine.complete_priced(request, seed=seed)
                    return priced
                except _GONE as error:
                    if is_there(replica.url):
                        raise
                    self._leave_out(replica, error)
                    if len(tried) == len(self._replicas):
                        raise

    @contextmanager
    def _lent(self, tried: list[_Replica]) -> Iterator[_Replica]:
        """The replica with the fewest under way, of those that were not tried; rather one that is not gone."""
        with self._lock:
            left, now_s = [replica for replica in self._replicas if replica not in tried], time.monotonic()
            there = [replica for replica in left if replica.out_until_s <= now_s] or left
            replica = min(there, key=lambda one: (one.n_under_way, one.n_asked))
            replica.n_under_way += 1
            tried.append(replica)
        try:
            yield replica
        finally:
            with self._lock:
                replica.n_under_way -= 1

    def _leave_out(self, replica: _Replica, error: Exception) -> None:
        replica.out_until_s, replica.gone = time.monotonic() + OUT_S, str(error).splitlines()[0][:200]
        replica.examined.clear()  # another may stand there when it comes back

    def _examine_all(self, model: str) -> None:
        """Before any of them answers in a model's name: what another model answered would be kept as this one's."""
        with self._examining:
            if model in self._refused:
                raise ConfigurationError(self._refused[model])
            if model in self._handshakes:
                return
            said = self._each(lambda engine: _handshake(engine, model))
            for one in said:
                self._check_alike(model, one, said[0])
            self._handshakes[model] = said[0]
            for replica, _ in said:
                replica.examined.add(model)

    def _examine(self, replica: _Replica, model: str) -> None:
        with replica.examining:
            if model not in replica.examined:
                self._check_alike(model, (replica, _handshake(replica.engine, model)), self._handshakes[model])
                replica.examined.add(model)
                replica.gone = ""

    def _check_alike(self, model: str, one: tuple[_Replica, str], expected: tuple[_Replica, str]) -> None:
        if one[1] != expected[1]:
            self._refused[model] = (
                f"got {one[1]!r} from {public_url(one[0].url)} as {model!r} and {expected[1]!r} from "
                f"{public_url(expected[0].url)}, both at temperature 0; expected the same model behind every "
                "--copa-api-base: the same weights, quantization, chat template and server; remedy: serve it alike, or "
                "leave one out"
            )
            raise ConfigurationError(self._refused[model])

    # -- LoRA adapters, where the replicas are vLLM's

    @property
    def weights(self) -> TransformersEngine:
        """The copy of the served weights that is trained."""
        weights: TransformersEngine = self._first.weights
        return weights

    @property
    def weights_fingerprint(self) -> str:
        """Names the weights that adapters are trained on."""
        return str(self._first.weights_fingerprint)

    @property
    def lora_dir(self) -> Path:
        """Where trained adapters lie."""
        return self.weights.lora_dir

    def check_training(self) -> None:
        """As `VllmEngine.check_training`, of each."""
        self._each(lambda engine: engine.check_training())

    def add_lora(self, directory: Path) -> str:
        """Have every replica serve a trained adapter; one that is gone gets it when it comes back."""
        return str(self._each(lambda engine: engine.add_lora(directory))[0][1])

    def unload(self, model: str) -> None:
        """Take a tuned model's adapter off every server."""
        self._each(lambda engine: engine.unload(model))

    def _each(self, act: Callable[[Any], Any]) -> list[tuple[_Replica, Any]]:
        """What acting on all replicas at once gave, for those that are there."""
        done: list[tuple[_Replica, Any]] = []
        failures: list[ProviderError] = []

        def one(replica: _Replica) -> None:
            try:
                done.append((replica, act(replica.engine)))
            except _GONE as error:
                self._leave_out(replica, error)
                failures.append(error)

        with ThreadPoolExecutor(len(self._replicas)) as pool:
            list(pool.map(one, self._replicas))
        if not done:
            raise failures[0]
        return sorted(done, key=lambda one: self._replicas.index(one[0]))


HANDSHAKE_TOKENS = 16


def _handshake(engine: Engine, model: str) -> str:
    """What an engine answers to a fixed request; how it fails, if that is no matter of another try.

    A payment like others to the ledger of the whole run; no call of any test's own budget, which counts what a rerun
    would ask again.
    """
    config = Config(max_tokens=HANDSHAKE_TOKENS, temperature=0.0)
    request = Request(model, (Message.user("Write one sentence about the sea."),), config=config)
    scope = Scope("handshake answers")
    worst = engine.worst_case(request, scope.bounds)
    with scope.charge(model, worst=worst) as charge:
        try:
            response, usd = engine.complete_priced(request, seed=0)
        except ProviderError as error:
            if error.billed is not False:
                charge.lose()
            if error.transient:
                raise
            return f"{type(error).__name__} {getattr(error, 'status', '')}"
        charge.settle(*actual_cost(response, usd, worst=worst))
    return response.message.text or ""
