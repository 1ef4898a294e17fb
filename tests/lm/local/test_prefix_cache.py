"""Prefix states: kept within a limit, by adapter, and spread over the rows of a batch."""

from __future__ import annotations

import pytest
import torch

from copa_harness.lm.local.model import LocalModel
from copa_harness.lm.local.prefix_cache import PrefixCache, prefill, spread
from copa_harness.testing.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return LocalModel(write_tiny_model(tmp_path_factory.mktemp("prefix") / "llama"), device="cpu", dtype="float32")


def filled(cache, key, model):
    return cache.states(key, lambda wanted: prefill(model.model, wanted[1], model.new_cache()))


def test_prefix_states_stay_within_the_byte_limit_oldest_out_first(llama):
    one = 16 * llama.footprint.states
    cache = PrefixCache(limit_bytes=2 * one)
    keys = [("", tuple(range(start, start + 16))) for start in (10, 40, 70)]
    for key in keys:
        filled(cache, key, llama)
    assert [key in cache for key in keys] == [False, True, True]


def test_prefix_states_are_kept_apart_by_adapter_and_reused_by_key(llama):
    cache, tokens = PrefixCache(), tuple(range(10, 26))
    first = filled(cache, ("", tokens), llama)
    assert filled(cache, ("", tokens), llama) is first
    assert filled(cache, ("lora", tokens), llama) is not first
    assert cache.n_prefilled == 2


def test_spreading_a_prefix_leaves_it_as_it_was_and_grows_as_needed(llama):
    states = filled(PrefixCache(), ("", tuple(range(10, 26))), llama)
    before = states.layers[0].keys.clone()
    ids = torch.arange(30, 54).reshape(2, 12)
    with torch.inference_mode():
        roomy = llama.model(ids, past_key_values=spread(states, 2, 3), use_cache=True).logits  # 12 tokens in room for 3
        whole = llama.model(torch.cat([torch.arange(10, 26).repeat(2, 1), ids], 1)).logits[:, 16:]
    assert torch.allclose(roomy, whole, atol=1e-5)
    assert torch.equal(states.layers[0].keys, before)
