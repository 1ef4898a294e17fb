"""One training shared by several processes: the same weights, one clear error, nobody left behind."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from copa_harness.errors import (
    BudgetExhausted,
    ConfigurationError,
    TrainingDivergedError,
    TrainingError,
    TrainingInterruptedError,
    TrainingMemoryError,
)
from copa_harness.lm.budget.scope import open_scope
from copa_harness.lm.local.files import WEIGHTS_FILE, read_lora
from copa_harness.tune import LoraSettings, LoraTrainer, TrainingRow
from copa_harness.tune.epochs import Charge
from copa_harness.tune.processes import count_processes, run_workers

SETTINGS = LoraSettings(rank=4, alpha=8, epochs=3, batch_size=4, warmup_steps=1, processes=1)
"""Three steps an epoch on ROWS, the last one of a single row."""
SHARED = SETTINGS.replaced({"processes": 2})


def row(question: str, answer: str) -> TrainingRow:
    return TrainingRow(({"role": "user", "content": question}, {"role": "assistant", "content": answer}))


ROWS = tuple(row(f"question {i} " + "zebra " * (i % 4), "red" if i % 2 else "green") for i in range(9))
HELD_OUT = ROWS[:3]


def trained(engine, directory, settings):
    trainer = LoraTrainer(engine, directory=directory)
    return trainer.train(ROWS, settings=settings, held_out=HELD_OUT, served_with="none")


EARLIER = set()
"""Processes that other tests have left to this one, such as a resource tracker."""


@pytest.fixture(autouse=True)
def earlier_children():
    EARLIER.clear()
    EARLIER.update(child.pid for child in psutil.Process().children())


def children():
    return [child for child in psutil.Process().children() if child.pid not in EARLIER]


def files_of(directory):
    return {path.relative_to(directory).parts[0] for path in directory.rglob("*") if path.is_file()}


def test_two_processes_give_the_weights_of_one_and_go_on_after_one_was_killed(engine, tmp_path, monkeypatch):
    alone = trained(engine, tmp_path / "alone", SETTINGS)
    whole = trained(engine, tmp_path / "whole", SHARED)
    real, steps = Charge.check_seconds, itertools.count(1)

    def kill_one(self):
        if next(steps) == 5:  # in the second epoch
            (second,) = (each for each in children() if each.environ().get("RANK") == "1")
            second.kill()
        real(self)

    monkeypatch.setattr(Charge, "check_seconds", kill_one)
    with open_scope("killed") as scope, pytest.raises(TrainingInterruptedError, match=r"process 2 of 2 .* by SIGKILL"):
        trained(engine, tmp_path / "killed", SHARED)
    assert not children()
    assert scope.usage().train_steps == 4
    again = trained(engine, tmp_path / "killed", SHARED)

    expected, got = (load_file(each.directory / WEIGHTS_FILE) for each in (alone, whole))
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5)
    for field in ("losses", "held_out_losses"):
        losses = [read_lora(each.directory).details[field] for each in (alone, whole)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert (whole.recipe, whole.train_steps, whole.epoch) == (alone.recipe, 9, alone.epoch)
    assert [read_lora(each.directory).details["processes"] for each in (alone, whole)] == [1, 2]
    assert again.steps_now == 6
    assert [each.fingerprint for each in again.checkpoints] == [each.fingerprint for each in whole.checkpoints]
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_when_the_process_that_asked_is_killed_nobody_is_left(tmp_path):
    worker = "from copa_harness.tune.worker import Starter; import threading; Starter().ask(); threading.Event().wait()"
    program = f"""
        import os, sys, time
        from pathlib import Path
        from copa_harness.tune.processes import run_workers
        run_workers(
            [sys.executable, "-c", {worker!r}], environments=[os.environ] * 2, folder=Path({str(tmp_path)!r}),
            progress=None, before_step=lambda: (print("at the first step", flush=True), time.sleep(600)),
        )
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    code = textwrap.dedent(program)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as starter:
        try:
            assert starter.stdout.readline() == b"at the first step\n"
            workers = psutil.Process(starter.pid).children()
            assert len(workers) == 2
        finally:
            os.kill(starter.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


STARTED = """
    import json, os, sys, time
    def say(kind, **told):
        print(json.dumps({"kind": kind, **told}), flush=True)
    first = os.environ["RANK"] == "0"
"""


class Steps(list):
    """A listener that keeps what it hears."""

    def step(self, epoch, loss):
        self.append((epoch, loss))


@pytest.fixture
def scripted(tmp_path):
    """Runs two workers that follow a few lines of script instead of training."""

    def run(script, *, before_step=lambda: None):
        code = textwrap.dedent(STARTED) + textwrap.dedent(script)
        steps = Steps()
        environments = [{**os.environ, "RANK": str(i)} for i in range(2)]
        try:
            outcome = run_workers(
                [sys.executable, "-I", "-S", "-c", code],
                environments=environments,
                folder=tmp_path,
                progress=steps,
                before_step=before_step,
            )
            return outcome, steps
        finally:
            assert not children()

    return run


def test_steps_are_allowed_one_by_one_and_told(scripted):
    asked = []
    outcome, steps = scripted(
        """
        for i in range(3 if first else 0):
            say("before step")
            os.read(0, 1)
            say("step", epoch=1, loss=0.5)
        if first:
            say("finished", outcome={"n_steps": 3})
        time.sleep(600)
        """,
        before_step=lambda: asked.append(1),
    )
    assert (outcome, steps, len(asked)) == ({"n_steps": 3}, [(1, 0.5)] * 3, 3)


@pytest.mark.parametrize("stop", [BudgetExhausted("no seconds left"), KeyboardInterrupt()])
def test_what_stops_a_step_ends_the_processes(scripted, stop):
    def refuse():
        raise stop

    with pytest.raises(type(stop)):
        scripted('say("before step") if first else None\ntime.sleep(600)', before_step=refuse)


@pytest.mark.parametrize(
    ("script", "error", "words"),
    [
        ('say("failed", cause="training", text="no such module")', TrainingError, "^no such module$"),
        ('say("failed", cause="diverged", text="the loss is nan")', TrainingDivergedError, "^the loss is nan$"),
        (
            'say("failed", cause="peer", text="gone") if first else say("failed", cause="memory", text="2 GB")',
            TrainingMemoryError,
            r"process 2 of 2 .* ran out of memory \(2 GB\).*smaller micro_batch_size",
        ),
        (
            'say("failed", cause="peer", text="gone") if first else sys.exit("words on standard error")',
            TrainingInterruptedError,
            "process 2 of 2 .* exit status 1\n.*\nwords on standard error\n",
        ),
        ('print("{")\ntime.sleep(0)', TrainingInterruptedError, "process 1 of 2 .* exit status 0"),
    ],
)
def test_of_all_that_fails_the_cause_is_told_once(scripted, script, error, words):
    with pytest.raises(error, match=words) as raised:
        scripted(script)
    assert type(raised.value) is error


def test_workers_that_hang_when_another_fails_are_ended_soon(scripted):
    began_s = time.monotonic()
    with pytest.raises(TrainingInterruptedError, match="process 2 of 2"):
        scripted("time.sleep(600) if first else sys.exit(1)")
    assert time.monotonic() - began_s < 30


@pytest.mark.parametrize(
    ("processes", "device", "work", "expected"),
    [
        ("auto", "cpu", 1e18, 1),
        (3, "cpu", 0, 3),
        (99, "cpu", 0, 16),
        ("auto", "cuda", 1e18, 4),
        ("auto", "cuda", 1e9, 1),
        ("auto", "cuda:1", 1e18, 1),
        (2, "cuda", 0, 2),
        (1, "cuda", 1e18, 1),
    ],
)
def test_a_process_per_device_where_it_is_worth_it_or_as_many_as_one_says(
    processes, device, work, expected, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    settings = LoraSettings(processes=processes)
    assert count_processes(settings, torch.device(device), work=work) == expected


def test_more_processes_than_devices_or_no_accelerate_are_clear_errors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigurationError, match="got 2, and 1 cuda device"):
        count_processes(LoraSettings(processes=2), torch.device("cuda"), work=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="pip install accelerate"):
        count_processes(LoraSettings(processes=2), torch.device("cpu"), work=0)


@pytest.mark.parametrize("value", [0, 1.5, True, "all"])
def test_a_number_of_processes_is_a_number_or_auto(value):
    with pytest.raises(ConfigurationError, match="processes"):
        LoraSettings(processes=value)


def test_the_number_of_processes_is_no_part_of_the_recipe(engine, tmp_path):
    trainer = LoraTrainer(engine, directory=tmp_path)
    recipes = {trainer.recipe(ROWS, settings=each, held_out=(), served_with="none") for each in (SETTINGS, SHARED)}
    assert len(recipes) == 1
    assert "processes" not in json.dumps(SETTINGS.in_recipe())
