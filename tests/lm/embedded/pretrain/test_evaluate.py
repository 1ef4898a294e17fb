from __future__ import annotations

import json

import pytest

from copa_harness.lm.embedded.pretrain.card import FOUNDATION_WEIGHTS, median_rule, write_card
from copa_harness.lm.embedded.pretrain.development_tasks import development_tasks
from copa_harness.lm.embedded.pretrain.evaluate import paired_interval, read_cells, table, targets


def cell(task: str, seed: int, *, both: float = 0.9, rule: bool = False) -> dict:
    accuracies = {"zero_shot": 0.3, "demos": 0.8, "lora_short": 0.7, "lora_long": 0.85, "both_short": both}
    if rule:
        accuracies["rule"] = 0.75
    results = {name: {"accuracy": value, "unparsed": 0.0, "seconds": 1.0} for name, value in accuracies.items()}
    settings = {
        "form": "fields",
        "learning_rate": 3e-3,
        "batch_size": 16,
        "short_epochs": 6,
        "long_epochs": 20,
        "n_demos": 9,
        "n_sets": 10,
    }
    return {
        "schema": 1,
        "task": task,
        "seed": seed,
        "n_labelled": 75,
        "n_test": 75,
        "settings": settings,
        "results": results,
    }


@pytest.fixture
def cells() -> list[dict]:
    return [cell("iris", 0, rule=True), cell("iris", 1, both=0.96, rule=True), cell("wine", 0)]


def test_the_table_shows_means_pairs_and_the_rule(cells):
    text = table(cells)
    assert "| iris | 2 | 0.300 (0.30-0.30) |" in text
    assert "both, short minus LoRA, short: +0.220" in text
    assert "Iris with the rule in the instruction, zero-shot: 0.750" in text


def test_a_target_is_met_or_missed_by_a_figure(cells):
    text = targets(cells)
    assert "| Iris, the rule in the instruction | 0.750 | >= 0.80 | missed by 0.050 |" in text
    assert "| Iris, LoRA long | 0.850 | >= 0.94 | missed by 0.090 |" in text
    assert "| zero-shot answers parse, worst cell | 1.000 | >= 0.95 | met |" in text


def test_an_interval_holds_the_mean_and_shrinks_to_it_without_spread():
    low, high = paired_interval([0.1, 0.2, 0.3, 0.2])
    assert low < 0.2 < high
    assert paired_interval([0.1] * 5) == pytest.approx((0.1, 0.1))


def test_the_card_tells_the_run_and_the_results(tmp_path, cells):
    from copa_harness.lm.embedded.pretrain.recipe import FOUNDATION

    (tmp_path / "export").mkdir()
    config = {
        "vocab_size": 5354,
        "num_hidden_layers": 6,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "intermediate_size": 320,
    }
    (tmp_path / "export" / "config.json").write_text(json.dumps(config))
    run = {
        "recipe": FOUNDATION.to_json(),
        "steps": 4800,
        "tokens": 19_000_000,
        "wall_s": 3000.0,
        "n_parameters": 1_800_000,
        "machine": "a processor",
        "python": "3.11",
        "torch": "2.13",
        "commits": ["abc"],
        "started_from": {"model.safetensors": FOUNDATION_WEIGHTS},
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 50, "stage": "bare", "loss": 7.0}) + "\n")
    for i, one in enumerate(cells):
        (tmp_path / f"x{i}-rows75.json").write_text(json.dumps(one))
    assert len(read_cells(tmp_path)) == 3
    card = write_card(tmp_path, tmp_path, None)
    assert "4,800 steps, 19,000,000 tokens, 50 minutes on a processor" in card
    assert "What it never saw" in card
    assert "two runs, one after the other" in card
    assert "| bare | 300 | 40 x 96 |" in card
    assert "### 75 labelled rows" in card


def test_the_median_rule_answers_every_test_row_with_a_label():
    task = development_tasks(0)[2]
    text, answers = median_rule(task)
    assert text.startswith(f"If {task.fields[0]} is below ")
    assert len(answers) == len(task.test)
    assert set(answers) <= set(task.labels)
