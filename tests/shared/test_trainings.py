"""The same training on two machines: one trains, the other waits and takes what it made; a killed one is taken over."""

import json
import os
import subprocess
import sys
import time

import pytest

from copa_harness.testing.tiny_models import write_tiny_model

MACHINE = """
import json, sys
from pathlib import Path
from copa_harness.lm.local.engine import TransformersEngine
from copa_harness.session.machines import opened_database, opened_files
from copa_harness.session.options import Settings
from copa_harness.shared import database
from copa_harness.shared_files import sharing_files
from copa_harness.tune.options import LoraSettings
from copa_harness.tune.rows import TrainingRow
from copa_harness.tune.trainer import LoraTrainer

model, directory, shared, url, n_epochs = *map(Path, sys.argv[1:4]), sys.argv[4], int(sys.argv[5])
if sys.argv[6] == "short":  # else a process without a processor for a while would be taken for dead
    database.LEASE_S, database.BEAT_S = 2.0, 0.3
rows = [
    TrainingRow(({"role": "user", "content": "question %d" % i}, {"role": "assistant", "content": "red"}), 0)
    for i in range(8)
]
settings = Settings(root=directory, shared=url, shared_files=str(shared))
opened = opened_database(settings)
with sharing_files(opened_files(settings, opened)):
    engine = TransformersEngine(model, name="hf:tiny", lora_dir=directory / "lora")
    print("ready", flush=True)
    sys.stdin.readline()
    made = LoraTrainer(engine, directory=engine.lora_dir).train(
        rows, settings=LoraSettings(rank=4, alpha=8, epochs=n_epochs, batch_size=4, warmup_steps=1), served_with="none"
    )
opened.close()
print(json.dumps([made.fingerprint, made.trained_now, made.steps_now]), flush=True)
"""


@pytest.fixture
def machines(tmp_path, postgres):
    model = write_tiny_model(tmp_path / "tiny", seed=3)
    url, started = postgres.database("trainings"), []

    def machine(name, n_epochs, shared="shared", lease="short"):
        arguments = [model, tmp_path / name, tmp_path / shared, url, n_epochs, lease]
        one = subprocess.Popen(
            [sys.executable, "-c", MACHINE, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        started.append(one)
        assert one.stdout.readline() == "ready\n"
        return one

    yield machine
    for one in started:
        one.kill()
        one.communicate()


def go(machine):
    machine.stdin.write("go\n")
    machine.stdin.flush()


def result(machine):
    line = machine.stdout.readline()
    assert line, machine.wait()
    return json.loads(line)


def test_two_machines_at_once_train_once_and_have_the_same_adapter(machines):
    two = [machines(name, 3, lease="whole") for name in ("one", "other")]
    for machine in two:
        go(machine)
    results = [result(machine) for machine in two]
    assert results[0][0] == results[1][0]
    assert sorted(one[1:] for one in results) == [[False, 0], [True, 6]]


def test_a_machine_that_is_killed_while_it_trains_is_taken_over(machines, tmp_path, postgres):
    first, second = machines("one", 40), machines("other", 40)
    go(first)
    while not any((tmp_path / "one").glob("lora/.unfinished/*/state.safetensors")):
        assert first.poll() is None
        time.sleep(0.01)
    go(second)
    while postgres.sql("SELECT count(*) FROM copa_owners", name="trainings")[0][0] < 2:
        time.sleep(0.01)
    assert not any((tmp_path / "other").glob("lora/.unfinished/*"))
    first.kill()
    fingerprint, *taken = result(second)
    assert taken == [True, 80]
    alone = machines("alone", 40, shared="of its own")
    go(alone)
    assert result(alone)[0] == fingerprint
