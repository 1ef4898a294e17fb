"""Constrained answers: the likeliest allowed value, with a score for each, and no parse failure ever."""

from __future__ import annotations

import enum
import json
import math
import random
from typing import Literal

import dspy
import pytest

from copa_harness.documents import from_json, to_json
from copa_harness.errors import ConfigurationError
from copa_harness.evaluate import evaluate
from copa_harness.evaluate.runner import run_examples
from copa_harness.lm.cache.store import ResponseCache
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.constrained import choices_of
from copa_harness.lm.factory import build_lm
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.report.records import RunRecord
from copa_harness.testing.tiny_models import write_tiny_model


class Colour(enum.Enum):
    RED = "dark red"
    BLUE = "blue"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("constrained") / "tiny", seed=4)


@pytest.fixture
def make_lm(folder, tmp_path):
    def make(constrain=True, architecture=None, **kwargs):
        path = write_tiny_model(tmp_path / architecture, architecture=architecture) if architecture else folder
        gateway = Gateway(cache=ResponseCache(tmp_path / "cache"))
        settings = {"max_tokens": 12, "constrain": constrain, **kwargs}
        return build_lm(f"hf:{path}", gateway=gateway, cache_dir=tmp_path, **settings)

    return make


def answers(program, lm, n=12, adapter=None, **kwargs):
    with dspy.context(lm=lm, adapter=adapter or dspy.ChatAdapter(use_json_adapter_fallback=False)):
        batch = [dspy.Example(question=f"zebra {i} " * (1 + i % 5)).with_inputs("question") for i in range(n)]
        return dspy.Parallel(num_threads=8, disable_progress_bar=True)([(program, x) for x in batch])


def test_every_answer_is_an_allowed_value_where_free_ones_do_not_even_parse(make_lm):
    program = dspy.Predict(dspy.Signature("question -> label: Literal['red', 'blue', 'dark red']"))
    with pytest.raises(dspy.utils.exceptions.AdapterParseError):
        program(question="zebra", lm=make_lm(constrain=False))
    labels = [prediction.label for prediction in answers(program, make_lm())]
    assert set(labels) <= {"red", "blue", "dark red"}


@pytest.mark.parametrize("architecture", ["llama", "mistral", "lfm2"])
def test_the_choice_and_its_scores_are_those_of_a_plain_forward(architecture, make_lm):
    import torch

    lm = make_lm(architecture=architecture, logprobs=True)
    program = dspy.Predict(dspy.Signature("question -> label: Literal['red', 'blue', 'dark red']"))
    got = answers(program, lm, n=5)[3]
    messages = dspy.ChatAdapter().format(program.signature, [], {"question": "zebra 3 " * 4})
    text = lm.engine.chat.text(messages, answer_next=True) + "[[ ## label ## ]]\n"
    sums = {}
    whole = {c: lm.engine.chat.ids(f"{text}{c}\n\n[[ ## completed ## ]]") for c in ("red", "blue", "dark red")}
    n_common = next(n for n in range(10**6) if len({ids[n] for ids in whole.values()}) > 1)
    for choice, ids in whole.items():
        with torch.inference_mode():
            logprobs = lm.engine.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        sums[choice] = sum(float(logprobs[n - 1, ids[n]]) for n in range(n_common, len(ids)))
    assert got.label == max(sums, key=sums.get)
    entry = got.logprobs["content"][0]
    assert entry["token"] == got.label
    assert {one["token"]: pytest.approx(one["logprob"], abs=1e-3) for one in entry["top_logprobs"]} == sums


@pytest.mark.parametrize("architecture", ["llama", "lfm2"])
def test_a_long_list_of_values_needs_little_more_memory_than_a_short_one(architecture, make_lm, monkeypatch):
    values = tuple(f"{a} {b}" for a in ("red", "blue", "dark", "light", "pale") for b in range(10))
    lm = make_lm(architecture=architecture, logprobs=True)
    scheduler = lm.engine.generator
    needed = []
    whole = scheduler._bytes
    monkeypatch.setattr(scheduler, "_bytes", lambda *a, **kw: needed.append(whole(*a, **kw)) or needed[-1])
    labels = {}
    for n in (2, 50):
        program = dspy.Predict(
            dspy.Signature("question -> label: str").with_updated_fields("label", Literal[values[:n]])
        )
        labels[n] = answers(program, lm, n=3)
        assert {prediction.label for prediction in labels[n]} <= set(values)
    assert max(needed) < 3 * min(needed)
    for prediction in labels[50]:
        scored = {one["token"]: one["logprob"] for one in prediction.logprobs["content"][0]["top_logprobs"]}
        assert prediction.label == max(scored, key=scored.get)


def test_free_reasoning_comes_before_the_chosen_label(make_lm):
    lm = make_lm()
    program = dspy.ChainOfThought(dspy.Signature("question -> label: Literal['red', 'blue']"))
    predictions = answers(program, lm, n=6)
    assert {prediction.label for prediction in predictions} <= {"red", "blue"}
    assert len({prediction.reasoning for prediction in predictions}) > 1
    free = lm.engine.generator.n_rows
    assert free >= 12  # six pieces of reasoning, six choices


def test_several_fields_in_any_order_and_types(make_lm):
    class Many(dspy.Signature):
        question: str = dspy.InputField()
        colour: Colour = dspy.OutputField()
        why: str = dspy.OutputField()
        sure: bool = dspy.OutputField()
        count: Literal[1, 2, 30] = dspy.OutputField()

    for prediction in answers(dspy.Predict(Many), make_lm(), n=4):
        assert isinstance(prediction.colour, Colour)
        assert isinstance(prediction.sure, bool)
        assert prediction.count in (1, 2, 30)


def test_constrained_answers_are_cached_apart_and_replayed_with_their_scores(make_lm):
    program = dspy.Predict(dspy.Signature("question -> label: Literal['red', 'blue']"))
    first = answers(program, make_lm(logprobs=True), n=3)
    with open_scope("again") as scope:
        again = answers(program, make_lm(logprobs=True), n=3)
    assert (scope.usage().paid_calls, scope.usage().cached_calls) == (0, 3)
    assert [p.toDict() for p in again] == [p.toDict() for p in first]
    assert make_lm().fingerprint != make_lm(constrain=False).fingerprint


def test_the_order_and_company_of_requests_do_not_change_a_choice(make_lm):
    program = dspy.Predict(dspy.Signature("question -> label: Literal['red', 'blue', 'dark red', 'b']"))
    lm = make_lm()
    together = [p.label for p in answers(program, lm.copy(gateway=Gateway(cache=None)))]
    alone = []
    with dspy.context(lm=lm.copy(gateway=Gateway(cache=None)), adapter=dspy.ChatAdapter()):
        order = random.Random(0).sample(range(12), 12)
        found = {i: program(question=f"zebra {i} " * (1 + i % 5)).label for i in order}
        alone = [found[i] for i in range(12)]
    assert together == alone


def test_at_a_temperature_the_value_is_drawn_in_proportion_and_by_seed():
    from copa_harness.lm.local.constrained import _chosen
    from copa_harness.lm.local.decoding import DecodingRules

    def drawn(temperature, seed):
        rules = DecodingRules(1, temperature=temperature, seed=seed)
        return _chosen(["a", "b"], [math.log(0.2), math.log(0.6)], rules=rules, position=0).value

    assert {drawn(0.0, seed) for seed in range(9)} == {"b"}
    share = sum(drawn(1.0, seed) == "a" for seed in range(2000)) / 2000
    assert share == pytest.approx(0.25, abs=0.04)
    assert [drawn(1.0, seed) for seed in range(50)] == [drawn(1.0, seed) for seed in range(50)]


def test_several_candidates_of_one_call_are_all_allowed_values(make_lm):
    program = dspy.Predict(dspy.Signature("question -> label: Literal['red', 'blue']"))
    with dspy.context(lm=make_lm(), adapter=dspy.ChatAdapter()):
        assert set(program(question="zebra", config={"n": 5}).completions.label) <= {"red", "blue"}


def test_a_bare_call_is_answered_freely(make_lm):
    lm, free = make_lm(), make_lm(constrain=False)
    assert lm("zebra") == free("zebra")


def test_free_texts_share_the_tokens_of_an_answer_and_parse_as_their_layout_is_given(make_lm):
    program = dspy.ChainOfThought("question -> answer")
    with pytest.raises(dspy.utils.exceptions.AdapterParseError):
        program(question="zebra", lm=make_lm(constrain=False))
    predictions = answers(program, make_lm())
    assert all(prediction.reasoning and prediction.answer for prediction in predictions)
    assert len({prediction.answer for prediction in predictions}) > 1


def test_another_prompt_layout_is_refused(make_lm):
    program = dspy.Predict(dspy.Signature("question -> label: Literal['red', 'blue']"))
    with dspy.context(lm=make_lm(), adapter=dspy.JSONAdapter()), pytest.raises(ConfigurationError, match="ChatAdapter"):
        program(question="zebra")


def test_only_local_models_can_constrain(tmp_path):
    with pytest.raises(ConfigurationError, match="constrain=True"):
        build_lm("openai/gpt-4o-mini", gateway=Gateway(cache=None), cache_dir=tmp_path, constrain=True)
    with pytest.raises(ConfigurationError, match="constrain=True"):
        ScriptedLM("x", constrain=True)


def test_choices_are_written_as_prompts_write_them():
    assert choices_of(Literal[1, "1", "two"]) == ("1", "two")
    assert choices_of(Colour) == ("dark red", "blue")
    assert choices_of(bool) == ("True", "False")
    assert choices_of(str) is None


def test_an_evaluation_has_a_score_for_every_label_and_pays_nothing_more_for_them(make_lm):
    program = dspy.ChainOfThought(dspy.Signature("question -> label: Literal['red', 'blue'], sure: bool"))
    rows = [dspy.Example(question=f"zebra {i}", label="red").with_inputs("question") for i in range(4)]
    lm = make_lm()
    with open_scope("search") as scope:
        searched = run_examples(program, rows, metric=is_red, split="validation", lm=lm)
    assert scope.usage().paid_calls == 4
    assert all(run.result.label_scores == {} and "logprobs" not in run.prediction for run in searched)
    with open_scope("test") as scope:
        evaluation = evaluate(program, rows, metric=is_red, split="test", lm=lm)
    assert (scope.usage().paid_calls, scope.usage().cached_calls) == (0, 4)
    for result in evaluation.results:
        assert list(result.label_scores) == ["label", "sure"]
        scores = result.label_scores["label"]
        assert result.predicted["label"] == max(scores, key=scores.get)
        assert set(scores) == {"red", "blue"}
        assert "logprobs" not in result.predicted
    record = RunRecord.from_evaluation(evaluation, test="t", task="colour", strategy="none", lm="hf:tiny", split="test")
    told = from_json(RunRecord, json.loads(json.dumps(to_json(record)))).label_scores
    assert told[evaluation.results[0].example_id] == evaluation.results[0].label_scores


class TwoStages(dspy.Module):
    def __init__(self):
        super().__init__()
        self.first = dspy.Predict(dspy.Signature("question -> state: Literal['on', 'off']"))
        self.second = dspy.Predict(dspy.Signature("state -> label: Literal['red', 'blue']"))

    def forward(self, question):
        return self.second(state=self.first(question=question).state)


def test_every_stage_of_a_program_has_its_scores(make_lm):
    rows = [dspy.Example(question="zebra", label="red").with_inputs("question")]
    result = evaluate(TwoStages(), rows, metric=is_red, split="test", lm=make_lm()).results[0]
    assert {name: set(scores) for name, scores in result.label_scores.items()} == {
        "state": {"on", "off"},
        "label": {"red", "blue"},
    }


def is_red(example, prediction, trace=None):
    return prediction.label == "red"
