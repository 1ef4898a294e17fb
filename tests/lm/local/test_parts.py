"""The parts of the local engine: batching, decoding rules, shared prefixes, LoRA files."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest

from copa_harness.errors import ArtifactError
from copa_harness.lm.local import scheduler as local_batching
from copa_harness.lm.local.decoding import DecodingRules, RowChooser, RowState, RowStopper
from copa_harness.lm.local.files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    find_lora,
    model_name,
    read_lora,
    split_model_name,
    write_manifest,
)
from copa_harness.lm.local.scheduler import Batcher

HANGS_S = 60.0
"""After so long nothing will come any more; no measure of how long it should take."""


def echo_batcher(log, **options):
    def run(batch):
        log.append([job.payload for job in batch])
        for job in batch:
            job.future.set_result(job.payload)

    return Batcher(lambda waiting: waiting, run, **options)


def test_a_lone_caller_does_not_wait_for_company():
    log = []
    batcher = echo_batcher(log, window_s=3600.0)
    assert batcher.wait(batcher.submit("a"), timeout_s=HANGS_S) == "a"


def test_a_batch_waits_for_a_job_that_is_being_prepared():
    log = []
    batcher = echo_batcher(log, window_s=3600.0)
    with batcher.arriving():
        first = batcher.submit("a")
        time.sleep(0.05)
        assert not first.future.done()
        batcher.submit("b")
    batcher.wait(first)
    assert log == [["a", "b"]]


def test_the_wait_for_company_ends_at_the_deadline():
    log = []
    batcher = echo_batcher(log, window_s=0.05)
    with batcher.arriving():
        assert batcher.submit("a").future.result(timeout=HANGS_S) == "a"


def test_an_error_in_a_batch_reaches_every_caller():
    def run(batch):
        raise KeyboardInterrupt

    batcher = Batcher(lambda waiting: waiting, run)
    with batcher.arriving():
        jobs = [batcher.submit(i) for i in range(3)]
    for job in jobs:
        with pytest.raises(KeyboardInterrupt):
            batcher.wait(job)


def test_an_error_in_choosing_a_batch_reaches_every_caller_instead_of_hanging():
    def choose(waiting):
        raise ZeroDivisionError

    batcher = Batcher(choose, lambda batch: None)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            batcher.submit(1).future.result(timeout=HANGS_S)


def test_jobs_that_were_not_chosen_stay_in_order():
    log = []

    def run(batch):
        log.append([job.payload for job in batch])
        for job in batch:
            job.future.set_result(None)

    batcher = Batcher(lambda waiting: waiting[:2], run, window_s=0.3)
    with batcher.arriving():
        jobs = [batcher.submit(i) for i in range(5)]
    for job in jobs:
        batcher.wait(job)
    assert log == [[0, 1], [2, 3], [4]]


def test_the_worker_thread_ends_when_idle_and_a_later_job_starts_another(monkeypatch):
    monkeypatch.setattr(local_batching, "IDLE_S", 0.05)
    batcher = echo_batcher([])
    batcher.wait(batcher.submit(1))
    if (worker := batcher._worker) is not None:
        worker.join(HANGS_S)
    assert batcher._worker is None
    assert batcher.wait(batcher.submit(2)) == 2


def test_jobs_of_callers_that_gave_up_are_not_run():
    log = []
    batcher = echo_batcher(log, window_s=0.2)
    with batcher.arriving():
        gone, kept = batcher.submit("gone"), batcher.submit("kept")
        gone.cancelled = True
    batcher.wait(kept)
    assert log == [["kept"]]


def choose(scores, rules, *, steps=1):
    import torch

    rows = [RowState(rule) for rule in rules]
    chooser = RowChooser(rows, dtype="float32")
    chosen = []
    for _ in range(steps):
        chosen.append(chooser(None, torch.tensor(scores, dtype=torch.float32)).argmax(-1).tolist())
        for row, token in zip(rows, chosen[-1], strict=True):
            row.ids.append(token)
    return chosen, chooser, rows


def test_sampled_tokens_follow_the_models_distribution():
    scores = np.log([[0.5, 0.3, 0.2]] * 3000)
    chosen, _, _ = choose(scores, [DecodingRules(1, temperature=1.0, seed=seed) for seed in range(3000)])
    frequencies = np.bincount(chosen[0], minlength=3) / 3000
    assert np.abs(frequencies - [0.5, 0.3, 0.2]).max() < 0.04


def test_top_p_and_top_k_leave_only_the_likeliest_tokens():
    scores = np.log([[0.2, 0.5, 0.3]] * 400)
    by_p, _, _ = choose(scores, [DecodingRules(1, temperature=1.0, top_p=0.7, seed=seed) for seed in range(400)])
    by_k, _, _ = choose(scores, [DecodingRules(1, temperature=1.0, top_k=1, seed=seed) for seed in range(400)])
    assert set(by_p[0]) == {1, 2}
    assert set(by_k[0]) == {1}


def test_a_sampled_row_draws_anew_at_every_step():
    chosen, _, _ = choose(np.zeros((1, 50)), [DecodingRules(20, temperature=1.0, seed=3)], steps=20)
    assert len({step[0] for step in chosen}) > 5


def test_a_near_tie_is_flagged_only_in_the_row_and_step_that_has_it():
    _, chooser, rows = choose([[1.0, 1.0, 0.0], [1.0, 0.5, 0.0]], [DecodingRules(1)] * 2)
    chooser.note_near_ties()
    assert [row.near_tie for row in rows] == [True, False]


def stop(tokens, rules, *, eos=frozenset({9}), is_cancelled=lambda i: False):
    import torch

    rows = [RowState(rules)]
    stopper = RowStopper(rows, eos_ids=[eos], decoders=[lambda ids: "".join(map(str, ids))], is_cancelled=is_cancelled)
    for i in range(len(tokens)):
        if stopper(torch.tensor([tokens[: i + 1]]), None).all():
            break
    return rows[0]


def test_a_row_ends_at_its_end_token_limit_or_stop_string():
    assert (stop([1, 9, 2], DecodingRules(5)).reason, stop([1, 9, 2], DecodingRules(5)).ids) == ("stop", [1, 9])
    assert (stop([1, 2, 3], DecodingRules(2)).reason, stop([1, 2, 3], DecodingRules(2)).ids) == ("length", [1, 2])
    by_string = stop([1, 2, 3, 4], DecodingRules(9, stop=("23",)))
    assert (by_string.reason, by_string.text) == ("stop", "1")


def test_a_row_nobody_waits_for_ends():
    assert stop([1, 2, 3], DecodingRules(5), is_cancelled=lambda i: True).ids == [1]


@pytest.fixture
def lora_folder(tmp_path):
    folder = tmp_path / "loras" / "one"
    folder.mkdir(parents=True)
    (folder / WEIGHTS_FILE).write_bytes(b"weights")
    (folder / CONFIG_FILE).write_text("{}")
    write_manifest(folder, base_fingerprint="base", details={"train_steps": 3})
    return folder


def test_a_lora_directory_reads_back_as_written(lora_folder):
    files = read_lora(lora_folder)
    assert files.base_fingerprint == "base"
    assert files.details["train_steps"] == 3
    assert find_lora(lora_folder.parent, files.fingerprint[:12]) == lora_folder
    assert find_lora(lora_folder.parent, "0" * 12) is None
    assert split_model_name(model_name("hf:a@b", files.fingerprint)) == ("hf:a@b", files.fingerprint[:12])


@pytest.mark.parametrize("name", [WEIGHTS_FILE, CONFIG_FILE])
def test_a_damaged_lora_is_an_artifact_error_with_a_remedy(name, lora_folder):
    read_lora(lora_folder)
    (lora_folder / name).write_bytes(b"broken!")
    with pytest.raises(ArtifactError, match=r"damaged.*remedy: delete"):
        read_lora(lora_folder)


def test_a_lora_without_manifest_or_with_a_forged_one_is_refused(lora_folder):
    path = lora_folder / "manifest.json"
    forged = {**json.loads(path.read_text()), "fingerprint": "f" * 64}
    path.write_text(json.dumps(forged))
    with pytest.raises(ArtifactError, match="does not match itself"):
        read_lora(lora_folder)
    path.unlink()
    with pytest.raises(ArtifactError, match="manifest"):
        read_lora(lora_folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    from copa_harness.lm.local.model import LocalModel
    from copa_harness.testing.tiny_models import write_tiny_model

    return LocalModel(write_tiny_model(tmp_path_factory.mktemp("prefix") / "llama"), device="cpu", dtype="float32")


def filled(cache, key, model):
    from copa_harness.lm.local.prefix_cache import prefill

    return cache.states(key, lambda wanted: prefill(model.model, wanted[1], model.new_cache()))


def test_prefix_states_stay_within_the_byte_limit_oldest_out_first(llama):
    from copa_harness.lm.local.prefix_cache import PrefixCache

    one = 16 * llama.footprint.states
    cache = PrefixCache(limit_bytes=2 * one)
    keys = [("", tuple(range(start, start + 16))) for start in (10, 40, 70)]
    for key in keys:
        filled(cache, key, llama)
    assert [key in cache for key in keys] == [False, True, True]


def test_prefix_states_are_kept_apart_by_adapter_and_reused_by_key(llama):
    from copa_harness.lm.local.prefix_cache import PrefixCache

    cache, tokens = PrefixCache(), tuple(range(10, 26))
    first = filled(cache, ("", tokens), llama)
    assert filled(cache, ("", tokens), llama) is first
    assert filled(cache, ("lora", tokens), llama) is not first
    assert cache.n_prefilled == 2


def test_spreading_a_prefix_leaves_it_as_it_was_and_grows_as_needed(llama):
    import torch

    from copa_harness.lm.local.prefix_cache import PrefixCache, spread

    states = filled(PrefixCache(), ("", tuple(range(10, 26))), llama)
    before = states.layers[0].keys.clone()
    ids = torch.arange(30, 54).reshape(2, 12)
    with torch.inference_mode():
        roomy = llama.model(ids, past_key_values=spread(states, 2, 3), use_cache=True).logits  # 12 tokens in room for 3
        whole = llama.model(torch.cat([torch.arange(10, 26).repeat(2, 1), ids], 1)).logits[:, 16:]
    assert torch.allclose(roomy, whole, atol=1e-5)
    assert torch.equal(states.layers[0].keys, before)


def test_who_comes_while_the_first_is_prepared_joins_its_batch():
    log, prepared, go_on = [], threading.Event(), threading.Event()

    def run(batch):
        log.append([job.payload for job in batch])
        for job in batch:
            job.future.set_result(job.payload)

    def prepare(waiting):
        prepared.set()
        go_on.wait(5)

    batcher = Batcher(lambda waiting: waiting, run, prepare=prepare)
    first = batcher.submit("a")
    assert prepared.wait(5)
    second = batcher.submit("b")
    go_on.set()
    assert (batcher.wait(first), batcher.wait(second)) == ("a", "b")
    assert log == [["a", "b"]]
