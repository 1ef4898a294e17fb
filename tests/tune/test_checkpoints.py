"""A training killed at any point ends with the same bits; what it leaves is one adapter."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from copa_harness.lm.call_context import open_scope
from copa_harness.lm.local.engine import TransformersEngine
from copa_harness.lm.local.files import WEIGHTS_FILE, read_lora
from copa_harness.tune import LoraSettings, LoraTrainer, TrainingRow, checkpoints
from copa_harness.tune.batches import BatchLoss
from copa_harness.tune.checkpoints import ABANDONED_AFTER_S, recipe_lock
from copa_harness.tune.loop import Training

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


def test_the_manifest_says_of_which_training_and_epoch_the_adapter_is(trainer):
    adapter = trained(trainer, held_out=HELD_OUT)
    details = read_lora(adapter.directory).details
    assert (details["kind"], details["recipe"], details["epoch"]) == ("lora", adapter.recipe, adapter.epoch)
    assert details["held_out_loss"] == adapter.final_loss == min(details["held_out_losses"])
    assert details["settings"]["rank"] == 4


def test_the_weights_are_those_of_the_epoch_with_the_least_held_out_loss(trainer, monkeypatch):
    by_epoch = []
    run_epoch = Training.run_epoch

    def watched(self, *args, **kwargs):
        run_epoch(self, *args, **kwargs)
        by_epoch.append({name: one.detach().clone() for name, one in self._trainable.items()})

    monkeypatch.setattr(Training, "run_epoch", watched)
    contrary = [row(f"question {i}", "green" if i % 2 else "red") for i in range(8)]
    settings = replace(SETTINGS, learning_rate=3e-2, batch_size=8, early_stop_patience=2, epochs=40)
    adapter = trainer.train(ROWS, settings=settings, held_out=contrary, served_with="none")
    assert adapter.epoch < len(by_epoch)
    kept = by_epoch[adapter.epoch - 1]
    with safe_open(adapter.directory / WEIGHTS_FILE, framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    assert len(found) == len(kept)
    for name, tensor in found.items():
        assert torch.equal(tensor, kept[name.replace(".weight", ".default.weight")])


def test_a_finished_training_is_only_read(trainer):
    first, again = trained(trainer), trained(trainer)
    assert (again.model, again.final_loss) == (first.model, first.final_loss)
    assert (first.steps_now, again.steps_now, again.train_steps) == (6, 0, 6)


def test_a_finished_training_leaves_adapters_and_locks_and_nothing_else(trainer):
    adapter = trained(trainer)
    assert {path.split("/")[0] for path in files_of(trainer.directory)} == {adapter.recipe, ".locks"}
    assert not list((trainer.directory / ".unfinished").glob("*"))


@pytest.mark.parametrize("batch", [1, 2, 5, 6])
def test_a_training_interrupted_anywhere_ends_with_the_same_bits(batch, trainer, uninterrupted, stop_at_batch):
    stop_at_batch(batch)
    with pytest.raises(Stopped):
        trained(trainer, held_out=HELD_OUT)
    adapter = trained(trainer, held_out=HELD_OUT)
    assert adapter.fingerprint == uninterrupted.fingerprint
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


def test_a_kill_before_the_adapter_is_in_its_place_costs_nothing(trainer, uninterrupted, monkeypatch):
    real, seen = checkpoints._replace_folder, [0]

    def failing(source, target):
        seen[0] += target.parent == trainer.directory
        if seen[0] == 1:
            raise Stopped
        real(source, target)

    monkeypatch.setattr(checkpoints, "_replace_folder", failing)
    with pytest.raises(Stopped):
        trained(trainer, held_out=HELD_OUT)
    monkeypatch.setattr(checkpoints, "_replace_folder", real)
    adapter = trained(trainer, held_out=HELD_OUT)
    assert (adapter.steps_now, adapter.fingerprint) == (0, uninterrupted.fingerprint)


@pytest.fixture
def interrupted(trainer, stop_at_batch):
    """The folder of a training that did one epoch."""
    stop_at_batch(3)
    with pytest.raises(Stopped):
        trained(trainer)
    (folder,) = (trainer.directory / ".unfinished").iterdir()
    return folder


def test_the_state_is_one_file_of_tensors_and_json_whatever_the_number_of_epochs(interrupted):
    assert [name for name in files_of(interrupted) if not name.startswith("best/")] == ["state.safetensors"]
    with safe_open(interrupted / "state.safetensors", framework="pt") as file:
        record = json.loads(file.metadata()["record"])
    assert record["training"]["n_steps"] == 2


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
        (elsewhere / name / "best.partial").mkdir(parents=True)
        (elsewhere / name / "state.safetensors").write_bytes(b"x")
    old_s = (elsewhere / "dead").stat().st_mtime - ABANDONED_AFTER_S - 60
    os.utime(elsewhere / "abandoned" / "state.safetensors", (old_s, old_s))
    with recipe_lock(trainer.directory, "alive"):
        trained(trainer)
    assert sorted(path.name for path in elsewhere.iterdir()) == ["alive", "dead"]
    assert (elsewhere / "alive" / "best.partial").exists()
    assert files_of(elsewhere / "dead") == ["state.safetensors"]
    assert not (elsewhere / "dead" / "best.partial").exists()


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
