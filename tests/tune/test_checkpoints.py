"""A checkpoint per epoch, each a whole adapter; a training killed at any point ends with the same bits."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal

import pytest
import torch
from dspy.lm15 import Config, Message, Request
from safetensors import safe_open

from copa_harness.lm.call_context import open_scope
from copa_harness.lm.local.engine import TransformersEngine
from copa_harness.lm.local.files import WEIGHTS_FILE, find_lora, read_lora
from copa_harness.tune import LoraSettings, LoraTrainer, TrainingRow, checkpoints
from copa_harness.tune.batches import BatchLoss
from copa_harness.tune.checkpoints import ABANDONED_AFTER_S, recipe_lock

SETTINGS = LoraSettings(rank=4, alpha=8, epochs=3, batch_size=4, warmup_steps=1, learning_rate=2e-2)
"""Two steps an epoch on ROWS."""


def row(question: str, answer: str) -> TrainingRow:
    return TrainingRow(({"role": "user", "content": question}, {"role": "assistant", "content": answer}))


ROWS = tuple(row(f"question {i}", "red" if i % 2 else "green") for i in range(8))
HELD_OUT = ROWS[:2]


def trained(trainer, **options):
    return trainer.train(ROWS, settings=SETTINGS, served_with="none", **options)


def weights(directory):
    return (directory / WEIGHTS_FILE).read_bytes()


def files_of(directory):
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


@pytest.fixture
def trainer(engine):
    return LoraTrainer(engine, directory=engine.lora_dir)


@pytest.fixture
def uninterrupted(engine, tmp_path):
    return trained(LoraTrainer(engine, directory=tmp_path / "uninterrupted"), held_out=HELD_OUT)


class Stopped(BaseException):
    """Stands for a kill that leaves this process alive."""


@pytest.fixture
def stop_at_batch(monkeypatch):
    """Lets training fail at the n-th batch (counted from 1) after it was asked to."""

    def stop(number: int) -> None:
        real, seen = BatchLoss.sum, [0]

        def failing(*args, **kwargs):
            seen[0] += torch.is_grad_enabled()  # held-out rows do not count
            if seen[0] == number:
                monkeypatch.setattr(BatchLoss, "sum", real)
                raise Stopped
            return real(*args, **kwargs)

        monkeypatch.setattr(BatchLoss, "sum", failing)

    return stop


def test_every_epoch_is_an_adapter_that_the_engine_serves_by_its_name(trainer, engine, tiny_folder):
    adapter = trained(trainer)
    assert [each.epoch for each in adapter.checkpoints] == [1, 2, 3]
    assert [each.train_steps for each in adapter.checkpoints] == [2, 4, 6]
    assert len({each.model for each in adapter.checkpoints}) == 3
    kept = adapter.checkpoints[adapter.epoch - 1]
    assert (kept.model, kept.directory, kept.fingerprint) == (adapter.model, adapter.directory, adapter.fingerprint)
    later = TransformersEngine(tiny_folder, name="hf:tiny", lora_dir=engine.lora_dir)
    for checkpoint in adapter.checkpoints:
        assert later.fingerprint(checkpoint.model) == checkpoint.fingerprint
        request = Request(model=checkpoint.model, messages=(Message.user("question 1"),), config=Config(max_tokens=2))
        assert later.complete(request, seed=0).usage.output_tokens


def test_a_checkpoint_says_of_which_training_and_epoch_it_is(trainer):
    adapter = trained(trainer, held_out=HELD_OUT)
    for checkpoint in adapter.checkpoints:
        details = read_lora(checkpoint.directory).details
        assert (details["recipe"], details["epoch"]) == (adapter.recipe, checkpoint.epoch)
        assert details["held_out_loss"] == checkpoint.final_loss
        assert details["settings"]["rank"] == 4
    others = [each for each in adapter.checkpoints if each.epoch != adapter.epoch]
    assert all(read_lora(each.directory).details["parent"] == adapter.recipe for each in others)


def test_the_checkpoints_come_back_when_the_adapter_is_only_read(trainer):
    first, again = trained(trainer), trained(trainer)
    assert [each.model for each in again.checkpoints] == [each.model for each in first.checkpoints]
    assert (first.steps_now, again.steps_now, again.train_steps) == (6, 0, 6)


def test_a_finished_training_leaves_adapters_and_locks_and_nothing_else(trainer):
    adapter = trained(trainer)
    names = {path.split("/")[0] for path in files_of(trainer.directory)}
    assert names == {adapter.recipe, f"{adapter.recipe}-01", f"{adapter.recipe}-02", ".locks"}
    assert not list((trainer.directory / ".unfinished").glob("*"))


@pytest.mark.parametrize("batch", [1, 2, 5, 6])
def test_a_training_interrupted_anywhere_ends_with_the_same_bits(batch, trainer, uninterrupted, stop_at_batch):
    stop_at_batch(batch)
    with pytest.raises(Stopped):
        trained(trainer, held_out=HELD_OUT)
    adapter = trained(trainer, held_out=HELD_OUT)
    assert adapter.fingerprint == uninterrupted.fingerprint
    assert [each.fingerprint for each in adapter.checkpoints] == [e.fingerprint for e in uninterrupted.checkpoints]
    assert weights(adapter.directory) == weights(uninterrupted.directory)
    assert adapter.steps_now == 6 - (batch - 1) // 2 * 2
    assert adapter.train_steps == uninterrupted.train_steps


def _train_and_die(folder, directory):
    real, seen = BatchLoss.sum, [0]

    def deadly(*args, **kwargs):
        seen[0] += torch.is_grad_enabled()
        if seen[0] == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    BatchLoss.sum = deadly
    engine = TransformersEngine(folder, name="hf:tiny", lora_dir=directory)
    trained(LoraTrainer(engine, directory=directory), held_out=HELD_OUT)


def test_a_killed_process_holds_up_nobody_and_its_training_goes_on_at_the_last_epoch(
    trainer, tiny_folder, uninterrupted
):
    context = multiprocessing.get_context("spawn")
    killed = context.Process(target=_train_and_die, args=(tiny_folder, trainer.directory))
    killed.start()
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL
    assert not list(trainer.directory.glob("*/manifest.json"))
    with open_scope("again") as scope:
        adapter = trained(trainer, held_out=HELD_OUT)
    assert weights(adapter.directory) == weights(uninterrupted.directory)
    assert adapter.steps_now == scope.usage().train_steps == 4


def test_a_kill_while_checkpoints_are_moved_to_their_places_costs_nothing(trainer, uninterrupted, monkeypatch):
    real, seen = checkpoints._replace_folder, [0]

    def failing(source, target):
        seen[0] += target.parent == trainer.directory
        if seen[0] == 2:
            raise Stopped
        real(source, target)

    monkeypatch.setattr(checkpoints, "_replace_folder", failing)
    with pytest.raises(Stopped):
        trained(trainer, held_out=HELD_OUT)
    monkeypatch.setattr(checkpoints, "_replace_folder", real)
    adapter = trained(trainer, held_out=HELD_OUT)
    assert adapter.steps_now == 0
    assert [each.fingerprint for each in adapter.checkpoints] == [e.fingerprint for e in uninterrupted.checkpoints]


@pytest.fixture
def interrupted(trainer, stop_at_batch):
    """The folder of a training that did one epoch."""
    stop_at_batch(3)
    with pytest.raises(Stopped):
        trained(trainer)
    (folder,) = (trainer.directory / ".unfinished").iterdir()
    return folder


def test_the_state_is_one_file_of_tensors_and_json_whatever_the_number_of_epochs(interrupted):
    assert [name for name in files_of(interrupted) if not name.startswith("epoch-01/")] == ["state.safetensors"]
    with safe_open(interrupted / "state.safetensors", framework="pt") as file:
        record = json.loads(file.metadata()["record"])
    assert record["training"]["n_steps"] == 2


def test_unfinished_checkpoints_are_not_served(interrupted, trainer):
    manifest = json.loads((interrupted / "epoch-01" / "manifest.json").read_text())
    assert find_lora(trainer.directory, manifest["fingerprint"][:12]) is None


@pytest.mark.parametrize("damage", ["half", "bits"])
def test_a_damaged_state_is_reported_and_the_training_begins_anew(damage, interrupted, trainer, caplog):
    path = interrupted / "state.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "half" else content[:-8] + b"\x01" * 8)
    with caplog.at_level("WARNING"):
        assert trained(trainer).steps_now == 6
    assert "begins anew" in caplog.text


def test_leftovers_of_dead_trainings_are_removed_and_those_of_living_ones_are_not(interrupted, trainer):
    elsewhere = interrupted.parent
    for name in ("dead", "alive", "abandoned"):
        (elsewhere / name / "epoch-02.partial").mkdir(parents=True)
        (elsewhere / name / "state.safetensors").write_bytes(b"x")
    old_s = (elsewhere / "dead").stat().st_mtime - ABANDONED_AFTER_S - 60
    os.utime(elsewhere / "abandoned" / "state.safetensors", (old_s, old_s))
    with recipe_lock(trainer.directory, "alive"):
        trained(trainer)
    assert sorted(path.name for path in elsewhere.iterdir()) == ["alive", "dead"]
    assert (elsewhere / "alive" / "epoch-02.partial").exists()
    assert files_of(elsewhere / "dead") == ["state.safetensors"]
    assert not (elsewhere / "dead" / "epoch-02.partial").exists()


def test_a_training_whose_checkpoint_was_deleted_is_done_again(trainer):
    first = trained(trainer)
    shutil.rmtree(first.checkpoints[0].directory)
    again = trained(trainer)
    assert again.trained_now
    assert again.checkpoints[0].fingerprint == first.checkpoints[0].fingerprint


def test_dropout_of_the_base_model_repeats_also_after_an_interruption(tmp_path, stop_at_batch):
    from copa_harness.testing.tiny_models import write_tiny_model

    engine = TransformersEngine(
        write_tiny_model(tmp_path / "gpt2", architecture="gpt2"), name="hf:gpt2", lora_dir=tmp_path / "loras"
    )
    whole = trained(LoraTrainer(engine, directory=tmp_path / "whole"))
    trainer = LoraTrainer(engine, directory=tmp_path / "parts")
    stop_at_batch(4)
    with pytest.raises(Stopped):
        trained(trainer)
    assert trained(trainer).fingerprint == whole.fingerprint
