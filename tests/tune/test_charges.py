"""Steps are held in the budget before the first one is taken, and charged once however often a run begins again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from copa_harness.errors import BudgetExhausted
from copa_harness.lm import whole_run
from copa_harness.lm.call_context import open_scope
from copa_harness.results import Budget
from copa_harness.tune import LoraSettings, LoraTrainer, TrainingRow
from copa_harness.tune.batches import BatchLoss

SETTINGS = LoraSettings(rank=4, epochs=2, batch_size=4, warmup_steps=1)
"""Four steps on ROWS."""

ROWS = tuple(
    TrainingRow(({"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "red"}))
    for i in range(8)
)


@pytest.fixture
def trainer(engine):
    return LoraTrainer(engine, directory=engine.lora_dir)


def trained(trainer, settings=SETTINGS, **options):
    return trainer.train(ROWS, settings=settings, served_with="none", **options)


@pytest.fixture
def never(monkeypatch):
    """Whoever computes a loss fails."""

    def refuse(*args, **kwargs):
        raise AssertionError("a batch was trained on")

    monkeypatch.setattr(BatchLoss, "sum", refuse)


def test_a_ceiling_below_the_job_refuses_it_before_anything_is_trained(trainer, never):
    with (
        open_scope("small", budget=Budget(train_steps=3)) as scope,
        pytest.raises(BudgetExhausted, match="train steps"),
    ):
        trained(trainer)
    assert scope.exhausted
    assert scope.usage().train_steps == 0


def test_a_ceiling_of_exactly_the_job_suffices_and_leaves_nothing(trainer):
    with open_scope("exact", budget=Budget(train_steps=4)) as scope:
        trained(trainer)
        with pytest.raises(BudgetExhausted):
            trained(trainer, LoraSettings(rank=2, epochs=1))
    assert scope.usage().train_steps == 4


def test_an_adapter_that_is_only_read_is_charged_as_when_it_was_trained_but_shows_no_steps(trainer):
    trained(trainer)
    with open_scope("again", budget=Budget(train_steps=4)) as scope:
        assert trained(trainer).steps_now == 0
        with pytest.raises(BudgetExhausted):
            trained(trainer, LoraSettings(rank=2, epochs=1))
    assert scope.usage().train_steps == 0
    with open_scope("small", budget=Budget(train_steps=3)), pytest.raises(BudgetExhausted):
        trained(trainer)


def test_a_scope_is_charged_once_for_a_recipe(trainer):
    with open_scope("run", budget=Budget(train_steps=7)):
        for _ in range(3):
            trained(trainer)


def test_a_training_stopped_early_gives_the_steps_it_did_not_take_back(trainer):
    settings = LoraSettings(rank=4, epochs=20, batch_size=8, learning_rate=3e-2, early_stop_patience=1)
    contrary = [
        TrainingRow(({"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "green"}))
        for i in range(8)
    ]
    with open_scope("run", budget=Budget(train_steps=21)) as scope:
        taken = trained(trainer, settings, held_out=contrary).train_steps
        assert taken < 17
        trained(trainer)
    assert scope.usage().train_steps == taken + 4


def test_seconds_are_looked_at_between_steps_and_what_was_done_is_kept(trainer, monkeypatch):
    real, now = BatchLoss.sum, [100.0]

    def slow(*args, **kwargs):
        now[0] += 0.3
        return real(*args, **kwargs)

    monkeypatch.setattr(BatchLoss, "sum", slow)
    monkeypatch.setattr("copa_harness.lm.budget.scope.time", SimpleNamespace(monotonic=lambda: now[0]))
    with open_scope("short", budget=Budget(seconds=1.0)) as scope, pytest.raises(BudgetExhausted, match="seconds"):
        trained(trainer, LoraSettings(rank=4, epochs=20, batch_size=4))
    assert scope.usage().train_steps == 4
    monkeypatch.setattr(BatchLoss, "sum", real)
    with open_scope("again", budget=Budget(train_steps=40)) as again:
        adapter = trained(trainer, LoraSettings(rank=4, epochs=20, batch_size=4))
    assert adapter.train_steps == 40
    assert again.usage().train_steps == adapter.steps_now == 40 - scope.usage().train_steps // 2 * 2
    with open_scope("less", budget=Budget(train_steps=39)), pytest.raises(BudgetExhausted):
        trained(trainer, LoraSettings(rank=4, epochs=20, batch_size=4))


def test_the_ledger_of_the_whole_run_counts_steps_really_taken(trainer, tmp_path):
    with whole_run(Budget(train_steps=4), directory=tmp_path / "run", run_id="r") as ledger:
        with open_scope("first"):
            trained(trainer)
        with open_scope("second"):
            trained(trainer)
        assert ledger.spent.train_steps == 4
        with open_scope("third"), pytest.raises(BudgetExhausted, match="the whole run"):
            trained(trainer, LoraSettings(rank=2, epochs=1))
