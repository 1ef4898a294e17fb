from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from copa_harness.lm.embedded.pretrain.recipe import SHIPPED, Recipe
from copa_harness.lm.embedded.pretrain.train import PretrainingRun

MICRO = dataclasses.replace(
    SHIPPED,
    width=32,
    n_heads=4,
    feed_forward=48,
    compiled=False,
    decay_steps=2,
    stages=tuple(dataclasses.replace(stage, steps=2, rows=3, tokens=128) for stage in SHIPPED.stages[1:3]),
)


def weights(run: PretrainingRun) -> list[torch.Tensor]:
    return [value.clone() for value in [*run.network.state_dict().values(), *run.supervision.state_dict().values()]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> PretrainingRun:
    run = PretrainingRun(MICRO, tmp_path_factory.mktemp("finished"), n_workers=0)
    run.run(log_every=2)
    return run


def test_a_run_ends_after_its_recipes_steps_and_logs_losses(finished):
    assert finished.step == MICRO.total_steps == 4
    lines = [json.loads(line) for line in (finished._folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(0 < line["loss"] < 20 for line in lines)


def test_a_killed_run_resumes_to_the_same_bits(finished, tmp_path):
    PretrainingRun(MICRO, tmp_path, n_workers=0).run(until=3)
    resumed = PretrainingRun(MICRO, tmp_path, n_workers=0)
    assert resumed.step == 3
    resumed.run()
    assert all(torch.equal(a, b) for a, b in zip(weights(finished), weights(resumed), strict=True))


def test_the_exported_model_computes_what_the_training_network_computes(finished):
    network = finished.network
    tokens = torch.randint(5, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    cos, sin = (table[:40][None, :, None] for table in network.rotary_tables())
    with torch.no_grad():
        table = network.table()
        expected = network(table, tokens, cos, sin)[0] @ table.T
        found = network.to_hf(pad_id=0, end_id=4)(tokens).logits
    assert torch.allclose(expected, found, atol=1e-4)


def test_the_manifest_says_what_was_done(finished):
    manifest = json.loads((finished._folder / "run.json").read_text())
    assert manifest["steps"] == 4
    assert Recipe.from_json(manifest["recipe"]) == MICRO
    assert manifest["tokens"] == 4 * 3 * 128
    assert {"machine", "torch", "commits", "wall_s", "n_parameters"} <= set(manifest)


def test_moving_the_end_moves_the_decay_and_is_recorded(tmp_path):
    (tmp_path / "end_at").write_text("3")
    run = PretrainingRun(MICRO, tmp_path, n_workers=0)
    run.run()
    assert run.step == 3
    assert Recipe.from_json(json.loads((tmp_path / "run.json").read_text())["recipe"]).total_steps == 3


def test_the_learning_rate_rises_stays_and_falls():
    stages = (dataclasses.replace(MICRO.stages[0], steps=100),)
    recipe = dataclasses.replace(MICRO, stages=stages, warmup_steps=10, decay_steps=20, final_share=0.05)
    shares = [recipe.rate_share(step, 100) for step in (0, 9, 50, 79, 90, 99)]
    assert shares == pytest.approx([0.1, 1.0, 1.0, 1.0, 0.5, 0.05])


def test_a_recipe_survives_json():
    assert Recipe.from_json(json.loads(json.dumps(SHIPPED.to_json()))) == SHIPPED
