"""The rule that gives a model its own LoRA settings."""

from __future__ import annotations

import json

import pytest

from copa_harness.lm.embedded import embedded_model_path
from copa_harness.optimize.options import SearchOptions
from copa_harness.tune import LoraSettings
from copa_harness.tune.options import is_large, suited


@pytest.fixture
def large(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 576}))
    return tmp_path


def test_a_small_model_keeps_the_defaults():
    assert not is_large(embedded_model_path())
    assert suited(embedded_model_path(), n_rows=40) == {}


def test_a_large_model_takes_more_steps_in_fewer_passes(large):
    settings = LoraSettings().replaced(suited(large, n_rows=60))
    assert settings.batch_size < LoraSettings().batch_size
    assert settings.epochs < LoraSettings().epochs
    assert suited(large, n_rows=60, with_demos=True)["epochs"] < settings.epochs
    assert settings.held_out_share == 0
    assert suited(large, n_rows=10)["epochs"] > settings.epochs  # few rows are seen more often
    assert suited(large, n_rows=0)


def test_the_learning_rate_falls_with_the_hidden_size(tmp_path, large):
    wide = tmp_path / "wide"
    wide.mkdir()
    (wide / "config.json").write_text(json.dumps({"text_config": {"hidden_size": 4096}}))
    rates = [suited(folder, n_rows=40)["learning_rate"] for folder in (large, wide)]
    assert rates[1] < rates[0] <= LoraSettings().learning_rate


def test_rows_are_held_out_where_there_are_enough_of_them_and_each_comes_once_a_pass(large):
    held_out = [
        "held_out_share" in suited(large, n_rows=n, with_demos=demos)
        for n, demos in ((99, False), (100, False), (100, True))
    ]
    assert held_out == [False, True, False]


def test_what_a_person_says_goes_before_the_rule():
    own = {"epochs": 3, "learning_rate": 1e-3, "batch_size": 4}
    said = SearchOptions(lora={"epochs": 7, "batch_size": 5})
    settings = said.lora_settings(with_demos=False, seed=1, suited=own)
    assert (settings.epochs, settings.learning_rate, settings.batch_size) == (7, 1e-3, 5)
    assert SearchOptions().lora_settings(with_demos=False, seed=1, suited=own).epochs == 3
    assert [SearchOptions().lora_settings(with_demos=demos, seed=1).epochs for demos in (True, False)] == [4, 12]
    given = SearchOptions(lora=LoraSettings(epochs=9)).lora_settings(with_demos=False, seed=1, suited=own)
    assert given == LoraSettings(epochs=9)
