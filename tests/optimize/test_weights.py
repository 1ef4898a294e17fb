"""Weights steps on a real (tiny, random) local model with real LoRA training."""

import json
from dataclasses import replace
from pathlib import Path

import dspy
import pytest

from copa_harness.errors import TrainingDivergedError
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.local.engine import TransformersEngine
from copa_harness.lm.metered import MeteredLM
from copa_harness.optimize import COPA
from copa_harness.optimize.dspy_optimizers.finetune import finetunable
from copa_harness.optimize.options import SearchOptions
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.weights import WeightsJob, refit, train_weights, wants_refit
from copa_harness.testing.tiny_models import write_tiny_model
from copa_harness.tune import options
from copa_harness.tune.options import LoraSettings, suited
from tests.optimize.conftest import context_of


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def tiny_lm(tiny_folder, tmp_path):
    def make():
        engine = TransformersEngine(tiny_folder, name="hf:tiny", lora_dir=tmp_path / "loras")
        return MeteredLM("hf:tiny", engine=engine, gateway=Gateway(cache=None), max_tokens=4)

    return make


def optimized(toy, lm, strategy, **settings):
    given = {"budget": 60, "max_demos": 2, "lora": LoraSettings(epochs=2, rank=2, alpha=4), **settings}
    optimizer = COPA(metric=toy.metric, strategy=strategy, lm=lm, **given)
    return optimizer.compile(toy.program(), trainset=toy.train[:8], valset=toy.val[:4])


def manifests(folder: Path):
    """Of finished trainings; the checkpoints of their epochs lie beside them."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*/manifest.json"))]
    return [manifest for manifest in found if manifest["kind"] == "lora"]


def served_with(folder: Path):
    return sorted(manifest["served_with"] for manifest in manifests(folder))


def test_a_small_model_is_trained_bare_and_behind_demonstrations_to_come(toy, tiny_lm, tmp_path):
    result = optimized(toy, tiny_lm(), "w -> p").copa_result
    assert served_with(tmp_path / "loras") == ["none", "resample:2 + none:0.2"]
    assert result.usage.train_steps > 0
    assert result.phases[1].usage.train_steps == result.usage.train_steps


def test_weights_alone_are_trained_on_bare_prompts(toy, tiny_lm, tmp_path):
    program = optimized(toy, tiny_lm(), "w", adoption_p=1.0)
    (manifest,) = manifests(tmp_path / "loras")
    assert '"served_with": "none"' in json.dumps(manifest)
    assert program.lm.model.startswith("hf:tiny@")


@pytest.mark.parametrize("strategy", ["joint", "p -> w", "w -> p", "p -> w -> p"])
def test_every_strategy_that_tunes_weights_makes_the_training_of_weights_alone(strategy, toy, tiny_lm, tmp_path):
    alone = optimized(toy, tiny_lm(), "w", adoption_p=1.0).lm.model
    before = set((tmp_path / "loras").glob("*"))
    lm = tiny_lm()
    asked = []
    real = lm.engine.complete
    lm.engine.complete = lambda request, *rest, **more: (asked.append(request), real(request, *rest, **more))[1]
    optimized(toy, lm, strategy)
    served = [request for request in asked if request.model == alone]
    assert len([request for request in served if len(request.messages) == 1]) >= 4, "not scored under the plain prompt"
    trained = {folder.name for folder in set((tmp_path / "loras").glob("*")) - before}
    assert alone.split("@")[1] not in "".join(trained)


def test_a_large_model_is_trained_behind_demonstrations_once_the_best_program_shows_some(
    toy, tiny_lm, tmp_path, monkeypatch
):
    monkeypatch.setattr(options, "LARGE_FROM", 1)
    optimized(toy, tiny_lm(), "w -> p")
    assert served_with(tmp_path / "loras") == ["none"]
    shown = toy.program()
    shown.demos = toy.train[:2]
    COPA(metric=toy.metric, strategy="w", lm=tiny_lm(), budget=60, lora={"epochs": 2, "rank": 2}).compile(
        shown, trainset=toy.train[:8], valset=toy.val[:4]
    )
    assert served_with(tmp_path / "loras") == ["none", "none", "resample:2 + none:0.2"]


def test_the_same_training_is_never_done_twice(toy, tiny_lm):
    first = optimized(toy, tiny_lm(), "w").copa_result
    second = optimized(toy, tiny_lm(), "w").copa_result
    assert first.usage.train_steps > 0
    assert second.usage.train_steps == 0
    assert second.model == first.model


def test_rows_can_be_held_out_for_early_stopping(toy, tiny_lm, tmp_path):
    optimized(toy, tiny_lm(), "w", held_out_share=0.25)
    (manifest,) = manifests(tmp_path / "loras")
    assert '"n_held_out": 2' in json.dumps(manifest)
    assert '"n_rows": 6' in json.dumps(manifest)


def test_a_local_model_gets_a_provider_for_dspys_own_finetuning(tiny_lm):
    lm = tiny_lm()
    assert not lm.provider.finetunable
    tuned = finetunable(lm)
    assert tuned.provider.finetunable
    assert tuned.engine is lm.engine


def test_lora_settings_given_by_name_change_those_and_no_others(toy, tiny_lm, tmp_path):
    optimized(toy, tiny_lm(), "w", lora={"rank": 2, "held_out_share": 0.25, "epochs": 3}, seed=5)
    (manifest,) = manifests(tmp_path / "loras")
    made = manifest["settings"]
    assert (made["rank"], made["alpha"], made["epochs"], made["seed"]) == (2, 32, 3, 5)
    assert manifest["n_held_out"] == 2


def test_a_large_model_gets_settings_of_its_own_and_the_notes_say_what_it_forgot(toy, tiny_lm, tmp_path, monkeypatch):
    monkeypatch.setattr(options, "LARGE_FROM", 1)
    result = optimized(toy, tiny_lm(), "w", lora={"rank": 2}).copa_result
    (manifest,) = manifests(tmp_path / "loras")
    assert {**suited(tiny_lm().engine.directory, n_rows=8), "rank": 2}.items() <= manifest["settings"].items()
    assert any("nats a token on general answers" in note for note in result.notes)


@pytest.mark.parametrize(
    ("demonstrations", "trained"),
    [
        ("mix", [("none", 8), ("resample:2 + none:0.2", 20)]),
        ("keep", [("resample:2", 16)]),
        ("drop", [("none", 8)]),
    ],
)
def test_demonstrations_are_mixed_into_the_rows_kept_or_dropped(demonstrations, trained, toy, tiny_lm, tmp_path):
    optimized(toy, tiny_lm(), "w -> p", lora={"rank": 2, "epochs": 2, "demonstrations": demonstrations})
    found = [(manifest["served_with"], manifest["n_rows"]) for manifest in manifests(tmp_path / "loras")]
    assert sorted(found) == trained


def test_rows_left_out_for_their_length_are_told_in_the_notes(toy, tiny_lm):
    texts = [("question 1", "big"), ("question 2", "small"), ("zebra " * 80, "big")]
    data = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in texts
    ]
    lora = LoraSettings(epochs=1, rank=2, max_length=60)
    result = optimized(toy, tiny_lm(), "w", lora=lora, finetune_data=data).copa_result
    told = "1 of 3 rows were longer than the 60 tokens a row may have and were left out"
    assert any(note.endswith(told) for note in result.notes)


def test_a_ceiling_on_training_steps_ends_the_step_with_the_program_so_far(toy, tiny_lm, tmp_path):
    program = optimized(toy, tiny_lm(), "w", budget="calls=60,train_steps=1")
    assert program.copa_result.exhausted
    assert program.copa_result.usage.train_steps == 0
    assert program.copa_result.model == "hf:tiny"
    assert not manifests(tmp_path / "loras")


class TwoStages(dspy.Module):
    def __init__(self):
        super().__init__()
        self.first = dspy.Predict("size -> half")
        self.second = dspy.Predict("half, weight -> kind")

    def forward(self, size, weight):
        return self.second(half=self.first(size=size).half, weight=weight)


def test_a_program_of_two_stages_is_trained_on_gold_labels_where_the_rows_hold_them_all(toy):
    rows = [dspy.Example(**row, half="upper").with_inputs("size", "weight") for row in toy.train[:6]]
    lm = toy.lm(provider=toy.provider)
    optimizer = COPA(metric=toy.metric, strategy="w", lm=lm, budget=60)
    optimizer.compile(TwoStages(), trainset=rows, valset=toy.val[:4])
    (trained,) = toy.provider.trained
    answers = [row["messages"][-1]["content"] for row in trained]
    assert len(answers) == 12
    assert sum("upper" in answer for answer in answers) == 6


def test_a_training_that_goes_astray_leaves_the_rest_of_the_search(toy, tiny_lm, monkeypatch):
    from copa_harness.tune.batches import BatchLoss

    real = BatchLoss.sum
    monkeypatch.setattr(BatchLoss, "sum", lambda self, rows: real(self, rows) * float("nan"))
    result = optimized(toy, tiny_lm(), "joint").copa_result
    assert any("no weights were trained" in note and "loss is nan" in note for note in result.notes)
    assert result.n_trials > 0
    with pytest.raises(TrainingDivergedError, match="remedy"):
        optimized(toy, tiny_lm(), "w")


def test_returned_weights_are_trained_once_more_on_validation_rows_too(toy, tiny_lm, tmp_path):
    program = optimized(toy, tiny_lm(), "w", adoption_p=1.0, refit=True)
    result, made = program.copa_result, manifests(tmp_path / "loras")
    assert len(made) == 2
    alone = optimized(toy, tiny_lm(), "w", adoption_p=1.0).copa_result
    assert result.score_after == alone.score_after  # of the weights before
    assert result.charged_calls == alone.charged_calls
    assert program.lm.model == result.model != alone.model
    assert result.state["predictors"]["self"]["model"] == result.model
    assert any("refit, with the validation rows: 12 rows" in note for note in result.notes)
    assert optimized(toy, tiny_lm(), "w", adoption_p=1.0, refit=True).copa_result.usage.train_steps == 0


def test_a_ceiling_on_training_steps_leaves_the_weights_that_were_scored(toy, tiny_lm):
    alone = optimized(toy, tiny_lm(), "w", adoption_p=1.0).copa_result
    given = {"adoption_p": 1.0, "refit": True, "budget": "calls=60,train_steps=2", "seed": 0}
    result = optimized(toy, tiny_lm(), "w", **given).copa_result
    assert result.model == alone.model
    assert any("were not trained on validation rows too" in note for note in result.notes)


def test_rows_of_which_only_some_hold_every_output_are_not_mixed(toy):
    student = Candidate.of(TwoStages(), lm=toy.lm(provider=toy.provider))
    rows = [dspy.Example(**row, half="upper").with_inputs("size", "weight") for row in toy.train[:6]]
    context = replace(context_of(toy, student), trainset=rows)
    with open_scope("test"):
        first = train_weights(WeightsJob(context, student), best=student)
        assert refit(first.prompts, [first], toy.val) is None


def test_large_models_are_refitted_unless_it_is_said_otherwise(toy, tiny_lm, monkeypatch):
    lms, scripted = [tiny_lm()], [toy.lm(provider=toy.provider)]
    assert not wants_refit(SearchOptions(), lms)
    assert wants_refit(SearchOptions(refit=True), lms)
    monkeypatch.setattr(options, "LARGE_FROM", 1)
    assert wants_refit(SearchOptions(), lms)
    assert not wants_refit(SearchOptions(refit=False), lms)
    assert not wants_refit(SearchOptions(), scripted)  # a provider's training costs money
