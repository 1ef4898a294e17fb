"""A batch's loss and gradients are those of its rows one by one, however it goes through the model."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import transformers

from copa_harness.lm.local.model import share_weights
from copa_harness.testing.tiny_models import write_tiny_model
from copa_harness.tune import LoraSettings, batches, packing
from copa_harness.tune.batches import BatchLoss, batches_of, training_bytes
from copa_harness.tune.loop import add_lora
from copa_harness.tune.low_rank import speed_up
from copa_harness.tune.packing import Packing
from copa_harness.tune.rows import EncodedRow

PREFIX = tuple(range(10, 22))
ROWS = (
    EncodedRow((*PREFIX, 30, 31, 32, 33), 14),
    EncodedRow((*PREFIX, 30, 40, 41, 42, 43, 44, 45), 17, demo_targets=(5, 6)),
    EncodedRow((*PREFIX, 50, 51), 13, demo_targets=(11, 12)),
)
"""Twelve tokens shared; two rows also learn what stands inside the prefix."""

PACKING = ("llama", "qwen2", "gpt2", "gpt_neox")
PADDING = ("mistral", "gemma3_text", "lfm2")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Loads a tiny model of an architecture, in evaluation mode."""
    folders = {}

    def load(architecture):
        if architecture not in folders:
            folders[architecture] = write_tiny_model(
                tmp_path_factory.mktemp("models") / architecture, architecture=architecture
            )
        return transformers.AutoModelForCausalLM.from_pretrained(folders[architecture], dtype=torch.float32).eval()

    return load


def with_lora(model):
    """A peft model whose LoRA weights are all random; B is zero at first, which would hide half of the gradients."""
    wrapped = add_lora(share_weights(model.requires_grad_(False)), LoraSettings(rank=4))
    draw = torch.Generator().manual_seed(3)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    return wrapped.eval()


def loss_and_gradients(model, losses):
    total = sum(losses)
    total.backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad])
    for parameter in model.parameters():
        parameter.grad = None
    return float(total.detach()), gradients


def one_by_one(model):
    """The definition, from full logits of single rows."""
    for row in ROWS:
        logits = model(torch.tensor([row.ids])).logits[0]
        at = torch.tensor(row.targets)
        yield torch.nn.functional.cross_entropy(logits[at - 1], torch.tensor(row.ids)[at], reduction="sum")


@pytest.mark.parametrize("architecture", [*PACKING, *PADDING])
def test_loss_and_gradients_of_a_batch_are_those_of_its_rows(architecture, load):
    model = with_lora(load(architecture))
    expected, gradients = loss_and_gradients(model, one_by_one(model))
    loss = BatchLoss(model, pad_id=0)
    assert loss.packs == (architecture in PACKING)
    for together in {loss.packs, False}:
        loss.packs = together
        got, others = loss_and_gradients(model, [loss.sum(ROWS)])
        assert got == pytest.approx(expected, rel=1e-5)
        assert torch.dist(others, gradients) < 1e-4 * gradients.norm()
    got, others = loss_and_gradients(model, [loss.sum(part) for part in loss.parts(ROWS, most_rows=2)])
    assert got == pytest.approx(expected, rel=1e-5)
    assert torch.dist(others, gradients) < 1e-4 * gradients.norm()


def test_packed_rows_give_the_same_without_pytorchs_kernel_for_cpus(load, monkeypatch):
    model = with_lora(load("llama"))
    expected, gradients = loss_and_gradients(model, one_by_one(model))
    monkeypatch.setattr(packing, "KERNEL", "of no such name")
    got, others = loss_and_gradients(model, [BatchLoss(model, pad_id=0).sum(ROWS)])
    assert got == pytest.approx(expected, rel=1e-5)
    assert torch.dist(others, gradients) < 1e-4 * gradients.norm()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_sped_up_lora_layers_compute_what_pefts_do(architecture, load):
    model = with_lora(load(architecture))
    expected, gradients = loss_and_gradients(model, one_by_one(model))
    n_linear = 0 if architecture == "gpt2" else 14  # GPT-2's layers are no nn.Linear: they stay peft's
    assert speed_up(model) == n_linear
    got, others = loss_and_gradients(model, one_by_one(model))
    assert got == pytest.approx(expected, rel=1e-6)
    assert torch.dist(others, gradients) < 1e-5 * gradients.norm()


def test_an_output_layer_with_lora_of_its_own_is_trained(load):
    model = load("gpt_neox").requires_grad_(False)
    wrapped = add_lora(share_weights(model), LoraSettings(rank=4, target_modules=("query_key_value", "lm_head")))
    speed_up(wrapped)
    BatchLoss(wrapped, pad_id=0).sum(ROWS).backward()
    (head,) = [p for name, p in wrapped.named_parameters() if "lm_head" in name and "lora_B" in name]
    assert head.grad.abs().sum() > 0


def test_a_shared_prefix_stands_once_and_every_token_keeps_its_position():
    packing = Packing.of([row.ids for row in ROWS])
    assert packing == Packing(12, (4, 7, 2))
    assert packing.ids([row.ids for row in ROWS])[12:16] == [30, 31, 32, 33]
    assert packing.positions()[12:] == [12, 13, 14, 15, *range(12, 19), 12, 13]
    for i, row in enumerate(ROWS):
        places = packing.places(i, range(len(row.ids)))
        assert [packing.ids([each.ids for each in ROWS])[place] for place in places] == list(row.ids)
        assert [packing.positions()[place] for place in places] == list(range(len(row.ids)))


@pytest.mark.parametrize("rows", [[(1, 2), (1, 2)], [(1, 2), (1, 2, 3)], [(5,), (6,)], [(7,), (7,)]])
def test_every_row_keeps_a_token_of_its_own(rows):
    packing = Packing.of(rows)
    assert min(packing.lengths) >= 1
    assert [packing.n_prefix + length for length in packing.lengths] == [len(row) for row in rows]


@pytest.mark.parametrize("packs", [True, False])
def test_parts_hold_every_row_once_and_no_more_tokens_than_fit(packs, load, monkeypatch):
    monkeypatch.setattr(batches, "TOKENS_AT_ONCE", 100)
    loss = BatchLoss(with_lora(load("llama")), pad_id=0)
    loss.packs = packs
    rows = [EncodedRow((*range(8), *[9 + i] * (n - 8)), 1) for i, n in enumerate((90, 30, 10, 40, 10, 120, 30))]
    parts = list(loss.parts(rows))
    assert sorted(id(row) for part in parts for row in part) == sorted(map(id, rows))
    if packs:
        assert all(len(part) == 1 or 8 + sum(len(row.ids) - 8 for row in part) <= 100 for part in parts)
        assert [len(part) for part in parts] == [5, 1, 1]
    else:
        assert all(len(part) == 1 or len(part) * max(len(row.ids) for row in part) <= 100 for part in parts)
    assert [len(part) for part in loss.parts(rows[1:5], most_rows=3)] == [3, 1]


def test_parts_keep_no_more_bytes_than_allowed(load):
    model = with_lora(load("llama"))
    loss, (token, target) = BatchLoss(model, pad_id=0), training_bytes(model.get_base_model().config)
    rows = [EncodedRow((1, 2, 3, 4, 5 + i, 6), 4) for i in range(5)]
    loss.limit_bytes = (4 + 3 * 2) * token + 3 * 2 * target
    assert [len(part) for part in loss.parts(rows)] == [3, 2]
    loss.limit_bytes = 1
    assert [len(part) for part in loss.parts(rows)] == [1] * 5


def test_batches_hold_every_row_once_and_rows_of_like_length_together():
    rows = [EncodedRow(tuple(range(n)), 1) for n in [10] * 8 + [200] * 8]
    found = list(batches_of(rows, 4, np.random.default_rng(0)))
    assert sorted(id(row) for batch in found for row in batch) == sorted(map(id, rows))
    assert all(len({len(row.ids) for row in batch}) == 1 for batch in found)


def test_the_total_loss_does_not_depend_on_the_batch_size(load):
    loss = BatchLoss(with_lora(load("llama")), pad_id=0)
    totals = [loss.total(ROWS, batch_size=size) for size in (1, 2, 3)]
    assert totals == pytest.approx([totals[0]] * 3, rel=1e-5)
    assert 0 < totals[0] < 2 * math.log(384) * sum(len(row.targets) for row in ROWS)


def test_bfloat16_products_give_nearly_the_same_loss_in_float32(load):
    model = with_lora(load("llama"))
    exact, rounded = (BatchLoss(model, pad_id=0, bfloat16=on).sum(ROWS).detach() for on in (False, True))
    assert exact.dtype == rounded.dtype == torch.float32
    assert float(rounded) == pytest.approx(float(exact), rel=0.05)
    assert float(rounded) != float(exact)


def test_training_rows_of_one_length_or_many_never_reach_the_model_padded_when_packed(load):
    model = with_lora(load("llama"))
    widths = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, given: widths.append(tuple(given[0].shape)))
    loss = BatchLoss(model, pad_id=0)
    widths.clear()
    loss.sum(ROWS)
    assert widths == [(1, 12 + 4 + 7 + 2)]
    assert sum(len(row.ids) for row in ROWS) == 49
    assert list(itertools.chain(*widths)) == [1, 25]


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("fast", [False, True])
def test_divergence_is_that_of_each_row_alone_by_peft_itself(load, architecture, fast):
    wrapped = with_lora(load(architecture))
    expected = n = 0.0
    for row in ROWS:
        at = [position - 1 for position in row.targets]
        with torch.no_grad():
            tuned = wrapped(input_ids=torch.tensor([row.ids])).logits[0, at].log_softmax(-1)
            with wrapped.disable_adapter():
                base = wrapped(input_ids=torch.tensor([row.ids])).logits[0, at].log_softmax(-1)
        expected += float(torch.nn.functional.kl_div(base, tuned, log_target=True, reduction="sum"))
        n += len(at)
    if fast:
        speed_up(wrapped)
    losses = BatchLoss(wrapped, pad_id=0)
    before = losses.total(ROWS, batch_size=2)
    assert losses.divergence(ROWS) == pytest.approx(expected / n, rel=1e-4)
    assert expected / n > 0.01
    assert losses.total(ROWS, batch_size=2) == before  # the adapter is on again
