"""The LM object DSPy programs hold: a `dspy.LM` whose every completion goes through the gateway.

    program -> MeteredLM.__call__ -> (DSPy's call path, or the fast path beside it) -> _DspyAdapter -> Gateway -> Engine

DSPy's request carries neither the rollout id nor the index of the n-th candidate, so `MeteredLM` puts both into the
`CallContext` of the call, and the adapter it hands to DSPy as `engine=` reads them there. Copies and deep copies share
engine and gateway. DSPy's own response cache is off and its history kept short.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import dspy
from dspy.lm15 import Request, Response, response_to_events
from dspy.utils.exceptions import LMUnexpectedError

from copa_harness.errors import ConfigurationError
from copa_harness.lm.answer_ceiling import answer_bounds
from copa_harness.lm.budget.cost import is_truncated
from copa_harness.lm.call_context import Completions, calling, current_call, current_context, is_counted
from copa_harness.lm.constrained import checked_constrain, constraint_of_call, with_constraint
from copa_harness.lm.dspy_internals import (
    RequestBuilder,
    count_truncations_instead,
    custom_engine_of,
    error_boundary,
    is_plain_call,
    outputs_of,
    use_custom_engine,
    warn_openai_messages,
)
from copa_harness.lm.engine import Engine
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.provider_errors import passed_through_dspy

logger = logging.getLogger("copa_harness")

HISTORY_LENGTH = 20
"""Calls an LM remembers for `inspect_history`; DSPy's 10,000 make every copy of a program slow."""


class _DspyAdapter:
    """What DSPy sees as the engine: passes each request to the gateway together with the call it belongs to."""

    def __init__(self, engine: Engine, gateway: Gateway) -> None:
        if not isinstance(engine, Engine):
            raise ConfigurationError(
                f"got {engine!r} as the engine of a language model; expected a copa_harness.lm.Engine: derive its "
                "class from it, and only `name`, `fingerprint` and `complete` are to be written"
            )
        self.engine = engine
        self.gateway = gateway
        self.requests = RequestBuilder()
        self._has_warned = False

    def __deepcopy__(self, memo: dict[int, object]) -> _DspyAdapter:
        return self

    def complete(self, request: Request) -> Response:
        context = current_call() or current_context()
        request = with_constraint(request, context.fields)
        completions = context.completions or Completions()
        response = self.gateway.call(self.engine, request, context=context, candidate=completions.n_arrived)
        completions.n_arrived += 1
        if is_truncated(response) and not self._has_warned and not is_counted(context):
            self._has_warned = True  # in a scope they are counted, and whoever opened it says how many
            logger.warning(
                "an answer of %s was cut off at its ceiling (%s tokens); further ones are not told of",
                request.model,
                request.config.max_tokens or "the model's",
            )
        return response

    def stream(self, request: Request) -> Iterator[Any]:
        return iter(response_to_events(self.complete(request)))

    def close(self) -> None:
        """Engines are borrowed; nothing to close."""


class _AsyncDspyAdapter:
    """The same for `acall`: the gateway blocks, so it is entered on a worker thread."""

    def __init__(self, adapter: _DspyAdapter) -> None:
        self.adapter = adapter

    def __deepcopy__(self, memo: dict[int, object]) -> _AsyncDspyAdapter:
        return self

    async def complete(self, request: Request) -> Response:
        return await asyncio.to_thread(self.adapter.complete, request)

    async def stream(self, request: Request) -> AsyncIterator[Any]:
        for event in response_to_events(await self.complete(request)):
            yield event

    async def aclose(self) -> None:
        """Engines are borrowed; nothing to close."""


class MeteredLM(dspy.LM):
    """A DSPy language model whose completions are cached, metered and bounded by the current scope's budget.

    `copy`, `deepcopy` and fine-tuning (`copy(model=...)`) share engine and gateway.

    Args:
        model: Name of the model, as the engine knows it.
        engine: What answers. Client settings (keys, URLs, timeouts) belong to it.
        gateway: The cache and meter calls go through.
        temperature: 0 by default; None leaves it to the provider.
        max_tokens: Ceiling of output tokens per completion; None leaves it to the engine.
        num_retries: How often DSPy repeats a transient failure. 0: the gateway repeats, as the engine's
            `retry_policy` says.
        constrain: Fields typed `Literal`, enum or bool get the likeliest allowed value (see `constrained`).
        answer_tokens: Ceiling of output tokens of calls without `max_tokens`: a number, "derived" from the output
            fields of the predictor that calls (see `answer_ceiling`), or None to add none.
        **kwargs: DSPy's fine-tuning `provider` (inferred from the name by default), and further defaults of every call
            (`top_p`, `stop`, ...), as in `dspy.LM`.
    """

    def __init__(
        self,
        model: str,
        *,
        engine: Engine,
        gateway: Gateway,
        temperature: float | None = 0.0,
        max_tokens: int | None = None,
        num_retries: int = 0,
        constrain: bool = False,
        answer_tokens: int | str | None = None,
        **kwargs: Any,
    ) -> None:
        self.answer_tokens = answer_tokens
        adapter = _DspyAdapter(engine, gateway)
        count_truncations_instead(lambda: current_call() is not None)
        self.constrain = checked_constrain(constrain, engine, model=model)
        super().__init__(
            model,
            temperature=temperature,
            max_tokens=max_tokens,
            cache=False,
            num_retries=num_retries,
            engine=adapter,
            async_engine=_AsyncDspyAdapter(adapter),
            **kwargs,
        )

    history: list[Any]

    def _get_initial_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        # DSPy reads OpenAI's reasoning models off the name; a local folder may be called the same.
        owner = dspy.LM if self.engine.is_endpoint else dspy.BaseLM
        defaults: dict[str, Any] = owner._get_initial_kwargs(self, **kwargs)
        if defaults.get("rollout_id") is None:
            defaults.pop("rollout_id", None)
        return defaults

    # -- identity

    @property
    def _adapter(self) -> _DspyAdapter:
        adapter: _DspyAdapter = custom_engine_of(self)
        return adapter

    @property
    def engine(self) -> Engine:
        """What answers: the engine itself, not the adapter DSPy holds."""
        return self._adapter.engine

    @property
    def gateway(self) -> Gateway:
        """The cache and meter this LM's calls go through."""
        return self._adapter.gateway

    @property
    def fingerprint(self) -> str:
        """Names everything behind this LM's model name that can change an answer."""
        return self.engine.fingerprint(self.model) + ("+constrained" if self.constrain else "")

    # -- calls

    def __call__(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        """As `dspy.LM.__call__`.

        Raises:
            BudgetExhausted: The current scope's budget refuses the call.
            ProviderError: The engine gave no answer.
        """
        with self._noted(kwargs, messages):
            if prompt is None and is_plain_call(self):
                adapter = self._adapter
                settings = {**self.kwargs, **kwargs}
                request = adapter.requests.request(self.model, messages, settings)
                if request is not None:
                    self._warn_zero_temp_rollout(settings.get("temperature"), settings.get("rollout_id"))
                    warn_openai_messages(self, messages)
                    with error_boundary(self.model, unexpected=True):
                        return outputs_of(self, adapter.complete(request))
            return super().__call__(prompt, messages=messages, **kwargs)

    async def acall(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        """Async equivalent of `__call__`."""
        with self._noted(kwargs, messages):
            return await super().acall(prompt, messages=messages, **kwargs)

    @contextmanager
    def _noted(self, kwargs: dict[str, Any], messages: Any) -> Iterator[None]:
        kwargs["cache"] = False  # whatever was set on the way: DSPy's own cache knows nothing of weights
        rollout_id = kwargs["rollout_id"] if "rollout_id" in kwargs else self.kwargs.get("rollout_id")
        context = current_context()
        if context.repeat:
            rollout_id = {"repeat": context.repeat, "rollout": rollout_id}
        fields = None
        if self.constrain:
            fields = constraint_of_call(messages, kwargs, label_scores=context.label_scores)
        bounds: dict[str, Any] = {}
        if self.answer_tokens is not None:
            bounds = answer_bounds(
                self.engine,
                self.model,
                answer_tokens=self.answer_tokens,
                settings={**self.kwargs, **kwargs},
                messages=messages,
                constrained=fields is not None,
            )
            kwargs.update(bounds)
        with calling(context.for_call(rollout_id, fields, gives_way="max_tokens" in bounds)):
            try:
                yield
            except LMUnexpectedError as error:
                hidden = passed_through_dspy(error)
                if hidden is None:
                    raise
                raise hidden from None

    def update_history(self, entry: Any) -> None:
        """Remember the last few calls, in this LM only; copies of programs stay cheap."""
        remembered: list[Any] = self.history[1 - HISTORY_LENGTH :]
        self.history = [*remembered, entry]

    # -- copies

    def copy(self, **kwargs: Any) -> MeteredLM:
        """As `dspy.LM.copy`; `engine=` and `gateway=` replace those, everything else keeps them."""
        engine = kwargs.pop("engine", self.engine)
        gateway = kwargs.pop("gateway", self.gateway)
        copied: MeteredLM = super().copy(**kwargs)
        if engine is not self.engine or gateway is not self.gateway:
            adapter = _DspyAdapter(engine, gateway)
            use_custom_engine(copied, adapter, _AsyncDspyAdapter(adapter))
        return copied

    def __deepcopy__(self, memo: dict[int, object]) -> MeteredLM:
        copied: MeteredLM = copy.copy(self)
        copied.history = []
        copied.callbacks = list(self.callbacks)
        copied.kwargs = copy.deepcopy(self.kwargs, memo)
        memo[id(self)] = copied
        return copied

    # -- what the API behind the engine can do

    @property
    def supports_function_calling(self) -> bool:
        """Whether the model takes tools natively."""
        return self.engine.capabilities(self.model).function_calling

    @property
    def supports_reasoning(self) -> bool:
        """Whether the model has native reasoning."""
        return self.engine.capabilities(self.model).reasoning

    @property
    def supports_response_schema(self) -> bool:
        """Whether the model takes a response schema."""
        return self.engine.capabilities(self.model).response_schema

    @property
    def supported_params(self) -> set[str]:
        """Names of the OpenAI-style parameters the model takes."""
        return set(self.engine.capabilities(self.model).params)

    # -- saving

    def dump_state(self) -> dict[str, Any]:
        """What DSPy writes into a saved program: the model's name and call defaults, and no secret.

        A model behind an endpoint is saved as the plain `dspy.LM` it is, so the program runs without this package.
        """
        if self.engine.is_endpoint:
            n_retries = self.engine.retry_policy.n_retries
            plain = dspy.LM(self.model, model_type=self.model_type, num_retries=n_retries)
            plain.kwargs = dict(self.kwargs)
            endpoint_state: dict[str, Any] = plain.dump_state()
            return endpoint_state
        state: dict[str, Any] = dspy.BaseLM.dump_state(self)
        state["fingerprint"] = self.fingerprint
        return state

    @classmethod
    def load_state(cls, state: dict[str, Any], *, allow_custom_lm_class: bool = False) -> MeteredLM:
        """Refused: a program file holds neither weights nor cache.

        Raises:
            ConfigurationError: Always, saying how to load such a program.
        """
        raise ConfigurationError(
            f"a saved program names the model {state.get('model')!r} but does not contain it; save the program "
            "without its LM (program.set_lm(None) on a deep copy), load it, and give it one with program.set_lm(...)"
        )
