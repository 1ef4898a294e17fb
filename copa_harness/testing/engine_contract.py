"""What every engine keeps: tests to inherit, for the engines of this package and for one of your own.

    class TestMyEngine(EngineContract):
        @pytest.fixture
        def engine(self):
            return MyEngine(...)

        @pytest.fixture
        def broken_engine(self):              # one whose next answer fails
            return MyEngine(..., url="http://localhost:9")

Each test is about one promise of `copa_harness.lm.engine.Engine`; a promise that is broken makes wrong scores, not
errors, which is why they are tested and not only written down.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dspy
import pytest
from dspy.lm15 import Config, Message, Request, Response, TextPart

from copa_harness.errors import ProviderError
from copa_harness.lm.budget.cost import Bounds, Cost, Limits, actual_cost
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.engine import Capabilities, Engine
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.metered import MeteredLM
from copa_harness.lm.retry import AdaptiveConcurrency, RetryPolicy

N_THREADS = 8


class EngineContract:
    """Tests of one engine; override the fixtures.

    Attributes:
        max_tokens: Of the answers asked for.
        secrets: Texts that must not stand in a fingerprint.
    """

    max_tokens = 8
    secrets: tuple[str, ...] = ()

    @pytest.fixture
    def engine(self) -> Engine:
        """The engine under test; made anew for each test."""
        raise NotImplementedError("override the fixture `engine`")

    @pytest.fixture
    def broken_engine(self) -> Engine:
        """An engine of the same kind that cannot answer the next request."""
        raise NotImplementedError("override the fixture `broken_engine`")

    @pytest.fixture
    def model(self, engine: Engine) -> str:
        """A model it answers as; its name by default."""
        return engine.name

    def request_of(self, model: str, text: str = "What is 3 + 4?") -> Request:
        """A request for a short answer at temperature 0."""
        config = Config(max_tokens=self.max_tokens, temperature=0.0)
        return Request(model=model, messages=(Message.user(text),), config=config)

    def lm_of(self, engine: Engine, model: str, gateway: Gateway | None = None) -> MeteredLM:
        """What a program would hold."""
        gateway = Gateway(cache=None) if gateway is None else gateway
        return MeteredLM(model, engine=engine, gateway=gateway, max_tokens=self.max_tokens)

    def test_it_is_an_engine_with_a_name(self, engine: Engine) -> None:
        assert isinstance(engine, Engine)
        assert isinstance(engine.name, str)
        assert engine.name

    def test_a_copy_is_the_engine_itself(self, engine: Engine) -> None:
        assert copy.copy(engine) is copy.deepcopy(engine) is engine

    def test_what_answers_has_one_fingerprint_without_a_secret(self, engine: Engine, model: str) -> None:
        fingerprint = engine.fingerprint(model)
        assert isinstance(fingerprint, str)
        assert fingerprint
        assert engine.fingerprint(model) == fingerprint
        assert not [secret for secret in self.secrets if secret in fingerprint]

    def test_an_answer_names_its_model_and_counts_its_tokens(self, engine: Engine, model: str) -> None:
        response = engine.complete(self.request_of(model), seed=0)
        assert isinstance(response, Response)
        assert response.message.role == "assistant"
        assert any(isinstance(part, TextPart) for part in response.message.parts)
        assert response.finish_reason in ("stop", "length")
        for n_tokens in (response.usage.input_tokens, response.usage.output_tokens):
            assert n_tokens is None or n_tokens >= 0

    def test_its_price_is_known_or_said_to_be_unknown(self, engine: Engine, model: str) -> None:
        _, usd = engine.complete_priced(self.request_of(model), seed=0)
        assert usd is None or usd >= 0

    def test_the_plain_request_is_answered_the_same_way_twice(self, engine: Engine, model: str) -> None:
        texts = {engine.complete(self.request_of(model), seed=0).message.text for _ in range(2)}
        assert len(texts) == 1

    def test_threads_at_once_get_the_answers_they_would_get_alone(self, engine: Engine, model: str) -> None:
        requests = [self.request_of(model, f"What is {i} + 4?") for i in range(N_THREADS)]
        alone = [engine.complete(request, seed=0).message.text for request in requests]
        with ThreadPoolExecutor(N_THREADS) as pool:
            together = list(pool.map(lambda request: engine.complete(request, seed=0).message.text, requests))
        assert together == alone

    def test_limits_are_prices_and_lengths_or_unknown(self, engine: Engine, model: str) -> None:
        limits = engine.limits(model)
        assert isinstance(limits, Limits)
        assert limits.max_output_tokens is None or limits.max_output_tokens > 0
        assert (limits.input_usd or 0) >= 0
        assert (limits.output_usd or 0) >= 0

    def test_nothing_costs_more_than_its_worst_case(self, engine: Engine, model: str) -> None:
        limits, request = engine.limits(model), self.request_of(model)
        is_priced = limits.input_usd is not None and limits.output_usd is not None
        worst = engine.worst_case(request, Bounds(tokens=True, usd=is_priced, budget="contract"))
        cost, _ = actual_cost(*engine.complete_priced(request, seed=0), worst=worst)
        assert cost.calls == worst.calls == 1
        assert cost.input_tokens <= worst.input_tokens
        assert cost.output_tokens <= worst.output_tokens
        assert not is_priced or cost.picodollars <= worst.picodollars

    def test_without_a_ceiling_only_the_call_counts(self, engine: Engine, model: str) -> None:
        nothing = Bounds(tokens=False, usd=False, budget="contract")
        assert engine.worst_case(self.request_of(model), nothing) == Cost(calls=1)

    def test_it_says_what_it_can_and_how_it_is_to_be_treated(self, engine: Engine, model: str) -> None:
        assert isinstance(engine.capabilities(model), Capabilities)
        assert isinstance(engine.retry_policy, RetryPolicy)
        assert engine.concurrency is None or isinstance(engine.concurrency, AdaptiveConcurrency)
        assert {type(flag) for flag in (engine.is_endpoint, engine.can_constrain, engine.takes_lora)} == {bool}
        assert engine.description is None or isinstance(engine.description, str)

    def test_a_request_is_paid_once_and_replayed_word_for_word(self, engine: Engine, model: str) -> None:
        gateway = Gateway(cache=None)
        with open_scope("contract") as scope:
            answers = [self.lm_of(engine, model, gateway)("What is 3 + 4?") for _ in range(3)]
        assert answers[0] == answers[1] == answers[2]
        usage = scope.usage()
        assert (usage.paid_calls, usage.cached_calls) == (1, 2)

    def test_dspy_can_hold_copy_and_save_its_model(self, engine: Engine, model: str) -> None:
        program: Any = dspy.Predict("question -> answer")
        program.set_lm(self.lm_of(engine, model))
        copied = program.deepcopy()
        assert copied.lm.engine is engine
        assert copied.lm.dump_state()["model"] == model

    def test_a_failure_is_a_providers_and_one_dspy_knows(self, broken_engine: Engine, model: str) -> None:
        lm = self.lm_of(broken_engine, model)
        with open_scope("contract") as scope, pytest.raises(ProviderError) as caught:
            lm("What is 3 + 4?")
        assert isinstance(caught.value, dspy.LMError)
        assert sum(scope.failures.values()) >= 1
        assert scope.usage().failed_calls >= 1
