from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from copa_harness.lm.embedded.pretrain.batches import EpisodeMaker
from copa_harness.lm.embedded.pretrain.recipe import FOUNDATION, OWN_NAMES
from copa_harness.lm.embedded.pretrain.train import PretrainingRun

MICRO = dataclasses.replace(
    FOUNDATION,
    width=32,
    n_heads=4,
    feed_forward=48,
    decay_steps=2,
    stages=tuple(dataclasses.replace(stage, steps=2, rows=3, tokens=128) for stage in FOUNDATION.stages[1:3]),
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
    lines = [json.loads(line) for line in (finished.folder / "log.jsonl").read_text().splitlines()]
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
    manifest = json.loads((finished.folder / "run.json").read_text())
    assert manifest["steps"] == 4
    assert [stage["name"] for stage in manifest["recipe"]["stages"]] == ["short", "rules"]
    assert manifest["tokens"] == 4 * 3 * 128
    assert {"commit", "versions", "cpu_count", "wall_s"} <= set(manifest)


def test_the_learning_rate_rises_stays_and_falls():
    stages = (dataclasses.replace(MICRO.stages[0], steps=100),)
    recipe = dataclasses.replace(MICRO, stages=stages, warmup_steps=10, decay_steps=20, final_share=0.05)
    shares = [recipe.rate_share(step) for step in (0, 9, 50, 79, 90, 99)]
    assert shares == pytest.approx([0.1, 1.0, 1.0, 1.0, 0.5, 0.05])


def test_a_slope_replaces_the_decay_and_ends_with_the_run():
    first, second = (dataclasses.replace(MICRO.stages[0], steps=10, slope=slope) for slope in ((0.3, 0.2), (0.2, 0.0)))
    recipe = dataclasses.replace(MICRO, stages=(first, second))
    shares = [recipe.rate_share(step) for step in (0, 5, 10, 15, 19)]
    assert shares == pytest.approx([0.3, 0.25, 0.2, 0.1, 0.02])


def test_answers_are_told_the_words_of_their_own_sentence(tmp_path):
    mix = dataclasses.replace(MICRO.stages[0].mix, kinds=(0, 0, 0, 0, 1), system=1.0)
    stage = dataclasses.replace(MICRO.stages[0], mix=mix, words=True, gather=True)
    run = PretrainingRun(dataclasses.replace(MICRO, stages=(stage,)), tmp_path, n_workers=0)
    assert not run.supervision.word_probe.any()
    run.run(until=1)
    assert run.supervision.word_probe.any()


def test_answers_are_pulled_to_look_at_their_own_sentence(tmp_path):
    mix = dataclasses.replace(MICRO.stages[0].mix, kinds=(0, 0, 0, 0, 1), system=1.0)
    run = PretrainingRun(MICRO, tmp_path, n_workers=0)
    batch = EpisodeMaker(run.tokenizer, n_tokens=128).batch(mix, 3, seed=(1,)).each(torch.from_numpy)
    cos, sin = (table[batch.positions][:, :, None] for table in run.network.rotary_tables())
    table = run.network.table()
    _, taps = run.network(table, batch.ids[:, :-1], cos, sin)
    pulls = [
        run.supervision(
            taps, batch, stage=dataclasses.replace(MICRO.stages[0], words=True, gather=gather), table=table
        )[1].item()
        for gather in (False, True)
    ]
    assert pulls[1] > pulls[0]


@pytest.mark.parametrize("recipe", [FOUNDATION, OWN_NAMES], ids=["from nothing", "own names"])
def test_every_stage_of_a_recipe_still_runs(recipe, tmp_path):
    def short(stage):
        partner = stage.partner and dataclasses.replace(stage.partner, rows=2)
        return dataclasses.replace(stage, steps=2, rows=2, tokens=min(stage.tokens, 300), partner=partner)

    micro = dataclasses.replace(
        recipe, width=32, feed_forward=48, n_layers=6, stages=tuple(short(stage) for stage in recipe.stages)
    )
    run = PretrainingRun(micro, tmp_path, n_workers=0)
    run.run(log_every=1)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == [stage.name for stage in recipe.stages for _ in range(2)]
    assert all(0 < line["loss"] < 20 for line in lines)


def test_a_run_starts_from_an_exported_model_token_by_token(finished, tmp_path):
    start = finished.folder / "export"
    run = PretrainingRun(MICRO, tmp_path / "more", n_workers=0, start=start)
    assert run.step == 0
    assert torch.equal(run.network.table(), finished.network.table())
    for one, other in zip(run.network.hidden_matrices(), finished.network.hidden_matrices(), strict=True):
        assert torch.equal(one, other)
    run.run(until=1)
    resumed = PretrainingRun(MICRO, tmp_path / "more", n_workers=0)
    assert resumed.manifest()["started_from"] == run.manifest()["started_from"]
    assert len(resumed.manifest()["started_from"]) == 64


def test_a_token_the_older_tokenizer_lacks_starts_as_the_mean_of_its_pieces(finished, tmp_path):
    from transformers import AutoTokenizer

    start = tmp_path / "older"
    shutil.copytree(finished.folder / "export", start)
    spec = json.loads((start / "tokenizer.json").read_text())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "True"]
    (start / "tokenizer.json").write_text(json.dumps(spec))
    older = AutoTokenizer.from_pretrained(start)
    pieces = older("True", add_special_tokens=False).input_ids
    assert len(pieces) > 1
    run = PretrainingRun(MICRO, tmp_path / "more", n_workers=0, start=start)
    table = run.network.table()
    assert torch.allclose(table[run.tokenizer.convert_tokens_to_ids("True")], finished.network.table()[pieces].mean(0))
