"""A local model on many devices: one engine per device in a Ray cluster, asked like one engine here.

The gateway, and with it cache, budget, order and randomness, stays in this process; a request goes to the device with
the fewest under way. An engine's answer is that of the request alone, so scores are those of one process, bit for bit.
A worker that dies is made again by Ray and its requests are asked again: they are paid here, once. Weights and LoRA
adapters are read where this process reads them, so every node must see them there; what it read is checked with every
request.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

from copa_harness.errors import ConfigurationError, ProviderTimeoutError
from copa_harness.lm.call_context import time_left_s
from copa_harness.lm.local.engine import TransformersEngine

if TYPE_CHECKING:
    from dspy.lm15 import Request, Response

AT_ONCE = 64
"""Requests a worker takes at once, to batch them."""

N_RETRIES = 3
"""How often a request is asked again whose worker died: one that kills every worker must end."""


class RayEngine(TransformersEngine):
    """A `TransformersEngine` whose requests are answered by workers; training still happens here.

    Args:
        source: As there, also on every node.
        address: Of the cluster; `auto` for the one RAY_ADDRESS names, or one on this machine.
        **settings: As there.
    """

    def __init__(self, source: Any, *, address: str, **settings: Any) -> None:
        super().__init__(source, **settings)
        self._address, self._settings = address, settings
        self._workers: list[Any] = []
        self._under_way: Counter[int] = Counter()
        self._starting = threading.Lock()

    def complete(self, request: Request, *, seed: int) -> Response:
        """As there."""
        import ray

        lora = self._lora(request.model)
        with self._starting:
            self._workers = self._workers or self._started()
            number = min(range(len(self._workers)), key=lambda number: self._under_way[number])
            self._under_way[number] += 1
        try:
            left_s = time_left_s()
            asked = self._workers[number].complete.remote(
                request, seed, self.fingerprint(request.model), lora and lora.directory
            )
            return ray.get(asked, timeout=None if math.isinf(left_s) else max(0.0, left_s))
        except ray.exceptions.GetTimeoutError as error:
            raise ProviderTimeoutError(f"{self.name} gave no answer in the seconds the budget left") from error
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        finally:
            with self._starting:
                self._under_way[number] -= 1

    def _started(self) -> list[Any]:
        import ray

        if not ray.is_initialized():
            ray.init(address=None if self._address == "auto" else self._address, log_to_driver=False)
        n_gpus = int(ray.cluster_resources().get("GPU", 0))
        actor = ray.remote(num_gpus=min(n_gpus, 1), num_cpus=0, max_restarts=-1, max_task_retries=N_RETRIES)(_Worker)
        n_workers = n_gpus or sum(node["Alive"] for node in ray.nodes())
        one = actor.options(max_concurrency=AT_ONCE, scheduling_strategy="SPREAD")
        return [one.remote(self._source, self._settings) for _ in range(n_workers)]


class _Worker:
    """An engine in a process of its own."""

    def __init__(self, source: Any, settings: dict[str, Any]) -> None:
        self._engine = TransformersEngine(source, **settings)

    def complete(self, request: Request, seed: int, fingerprint: str, lora: Any) -> Response:
        if lora is not None:
            self._engine.add_lora(lora)
        if (got := self._engine.fingerprint(request.model)) != fingerprint:
            raise ConfigurationError(f"a Ray worker has {request.model} as {got[:12]}, expected {fingerprint[:12]}")
        return self._engine.complete(request, seed=seed)
