"""What answers one request: the base class of every engine, and what each may say of itself.

An engine gives exactly one attempt at one completion. Cache, budget, retries and candidate fan-out belong to the
gateway and to DSPy. Whatever an engine need not know has a default here: an engine in this process that is free,
answers at once or never, and only writes text has to say its name, its fingerprint and its answer.
`testing.engine_contract` has the tests every engine passes.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from dspy.lm15 import Request, Response

from copa_harness.lm.budget.cost import Bounds, Cost, Limits, worst_case
from copa_harness.lm.retry import AdaptiveConcurrency, RetryPolicy

if TYPE_CHECKING:
    from typing import Self  # Python 3.11


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a model's API can do beyond plain text; DSPy's prompt adapters ask."""

    function_calling: bool = False
    reasoning: bool = False
    response_schema: bool = False
    params: frozenset[str] = field(default_factory=frozenset)


class Engine(ABC):
    """Answers requests, one completion at a time, from any number of threads at once.

    How long an answer may take, if the budget has a ceiling on seconds, is `lm.call_context.time_left_s()` during the
    call; an engine that can should not wait longer.

    Attributes:
        name: Short human name: `embedded`, `hf:...`, `openai`, `scripted`.
        is_endpoint: Whether an API of somebody else answers. DSPy then reads abilities off the model's name, a saved
            program names the model without its weights, and even at temperature 0 an answer may come out differently.
        can_constrain: Whether it chooses answers by the log-probabilities of the allowed ones (see `lm.constrained`).
        takes_lora: Whether its weights can be tuned by LoRA here: it has `lora_dir`, `add_lora` and the rest of what
            `tune.dspy_provider` needs.
        retry_policy: When a failed attempt is tried again. One attempt by default: what runs in this process fails
            again if it fails once.
        concurrency: Bounds the attempts under way at once; None for no bound.
    """

    name: str
    is_endpoint: ClassVar[bool] = False
    can_constrain: ClassVar[bool] = False
    takes_lora: bool = False
    retry_policy: RetryPolicy = RetryPolicy()
    concurrency: AdaptiveConcurrency | None = None

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: DSPy deep-copies programs with their models; weights, connections and counters must stay shared."""
        return self

    @abstractmethod
    def fingerprint(self, model: str) -> str:
        """Hash or text naming what answers `model`: weights, tokenizer, template, dtype; or URL and parameters.

        It covers everything that could change an answer and is not in the request, and never contains a secret. Called
        for every request, cache hits included, so it must be cheap.
        """

    @abstractmethod
    def complete(self, request: Request, *, seed: int) -> Response:
        """Answer one request.

        Args:
            request: What is asked; `request.model` names the model.
            seed: Tells repeats of one request apart (0 for the plain one), for sampling only.

        Raises:
            ProviderError: No answer came (also `ContextOverflowError`, or any `dspy.lm15` error). Anything else is
                taken for a bug of the engine.
        """

    def complete_priced(self, request: Request, *, seed: int) -> tuple[Response, float | None]:
        """As `complete`, with the answer's price in dollars, None when it is unknown. Free by default."""
        return self.complete(request, seed=seed), 0.0

    def limits(self, model: str) -> Limits:
        """What is known of a model's prices and of its longest answer, without asking the network."""
        return Limits()

    def takes_stop(self, model: str) -> bool:
        """Whether requests to `model` may carry a stop string of ours. True by default: what runs here takes them."""
        return True

    def worst_case(self, request: Request, bounds: Bounds) -> Cost:
        """The most one answer to `request` can cost, as far as `bounds` ask.

        Raises:
            ConfigurationError: They ask, and nobody can know.
        """
        return worst_case(request, self.limits(request.model), bounds) if bounds.asked else Cost(calls=1)

    def capabilities(self, model: str) -> Capabilities:
        """What the API behind `model` can do. Plain text by default."""
        return Capabilities()

    @property
    def description(self) -> str | None:
        """One line on what is loaded here, None while nothing is."""
        return None


def seed_of(rollout_id: object, candidate: int) -> int:
    """The sampling seed of one repeat: 0 for the plain request, else a stable 31-bit number from 1 up.

    Args:
        rollout_id: DSPy's rollout id, or None.
        candidate: Index of the completion among the `n` of one call, from 0.
    """
    if rollout_id is None and candidate == 0:
        return 0
    digest = hashlib.sha256(json.dumps([rollout_id, candidate], default=str).encode()).digest()
    return int.from_bytes(digest[:4], "big") % (2**31 - 1) + 1
