"""The session's models by name: one engine for all that share a name, ceilings by who asks."""

import dspy
import pytest

from copa_harness.lm.scripted import ScriptedLM
from copa_harness.session.models import Models
from copa_harness.session.options import Settings


@pytest.fixture
def models(tmp_path):
    found = Models(Settings(root=tmp_path, cache_dir=tmp_path / "cache", lm="openai/gpt-4o-mini"))
    yield found
    found.close()


def test_models_of_one_name_share_the_engine_whatever_their_ceiling(models):
    base = models.named("openai/gpt-4o-mini", is_base=True)
    short = models.named("openai/gpt-4o-mini", is_base=True, answer_tokens=20)
    writer = models.named("openai/gpt-4o-mini")
    assert (base.answer_tokens, short.answer_tokens, writer.answer_tokens) == ("derived", 20, None)
    assert base.engine is short.engine is writer.engine
    assert models.named("openai/gpt-4o-mini", is_base=True) is base


def test_a_model_somebody_made_gets_the_ceiling_that_is_asked_for(models):
    plain = models.metered(dspy.LM("openai/gpt-4o-mini"))
    assert plain.answer_tokens == "derived"
    scripted = ScriptedLM("x")
    assert models.metered(scripted) is scripted
    assert models.metered(scripted, answer_tokens=30).answer_tokens == 30
    assert scripted.answer_tokens is None
