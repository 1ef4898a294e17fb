"""A plan pays nothing, counts what is missing with its worst case, and what is stored apart."""

import dspy
import pytest

from copa_harness.errors import ProviderError
from copa_harness.lm.cache.store import ResponseCache
from copa_harness.lm.call_context import DryRun, NotCachedError, dry_run
from copa_harness.lm.factory import build_lm
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.scripted import ScriptedLM


@pytest.fixture
def gateway(tmp_path):
    return Gateway(cache=ResponseCache(tmp_path / "responses"))


def test_a_plan_asks_nothing_and_tells_missing_from_stored(gateway):
    lm = ScriptedLM("x", gateway=gateway, fingerprint="w", max_tokens=20)
    lm("a")
    with dry_run() as plan:
        assert lm("a") == ["x"]
        for name in "bcb":
            with pytest.raises(NotCachedError, match="only a plan is being made"):
                lm(name)
    assert lm.calls == 1
    usage = plan.usage
    assert (usage.paid_calls, usage.cached_calls, usage.output_tokens) == (2, 1, 40)
    lm("b")
    assert lm.calls == 2


@pytest.mark.usefixtures("no_gateways")
def test_a_plan_prices_an_evaluation_from_the_shipped_list(gateway, stub, tmp_path):
    lm = build_lm(
        "openai/gpt-4o-mini", gateway=gateway, cache_dir=tmp_path, api_base=stub.url, api_key="k", max_tokens=100
    )
    program = dspy.Predict("question -> answer")
    program.set_lm(lm)
    program(question="0")
    with dry_run() as plan, dspy.context(adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
        program(question="0")
        for index in range(1, 5):
            with pytest.raises(ProviderError, match="not stored") as caught:
                program(question=str(index))
            assert caught.value.kind == "not cached"
    assert stub.n_requests == 1
    assert (plan.usage.paid_calls, plan.usage.cached_calls) == (4, 1)
    assert 4 * 100 * 6e-7 < plan.usage.usd < 0.01


@pytest.mark.usefixtures("no_gateways")
def test_what_a_call_may_cost_is_known_from_those_that_are_stored_already(gateway, stub, tmp_path):
    lm = build_lm(
        "openai/gpt-4o-mini", gateway=gateway, cache_dir=tmp_path, api_base=stub.url, api_key="k", max_tokens=100
    )
    lm("a question")
    with dry_run() as stored:
        lm("a question")
    with dry_run() as missing, pytest.raises(NotCachedError):
        lm("a question", temperature=0.5)
    assert stored.usage.paid_calls == 0
    assert stored.each == missing.each
    assert stored.each.output_tokens == 100
    assert DryRun().each is None


def test_calls_nobody_can_bound_are_said(gateway):
    lm = ScriptedLM("x", gateway=gateway, fingerprint="w")
    with dry_run() as plan, pytest.raises(NotCachedError):
        lm("a")
    assert plan.usage.estimated_calls == 1
    assert plan.each is None
    assert plan.usage.estimated_calls == 1
