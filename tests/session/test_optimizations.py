"""Finished optimizations: what their key covers, whose the lines of progress are, and processes that take turns."""

import json
import multiprocessing
import os
import shutil
import signal
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Literal

import dspy
import pytest

import copa_harness
from copa_harness import ScriptedLM, Task
from copa_harness.errors import ConfigurationError
from copa_harness.lm.local.engine import TransformersEngine
from copa_harness.lm.local.files import find_lora
from copa_harness.lm.metered import MeteredLM
from copa_harness.session import CopaSession, Settings, optimizations
from copa_harness.session.optimizations import Optimizations
from copa_harness.shared_files import SharedFiles, sharing_files
from copa_harness.store.artifacts import load_artifact
from copa_harness.store.stages import StageStore
from copa_harness.testing.tiny_models import write_tiny_model


def test_the_optimizers_own_source_is_part_of_the_key(tmp_path: Path, monkeypatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("copa_harness.documents.hash_file", lambda path: seen.append(str(path)) or "hash")
    optimizations._own_source.__wrapped__()
    package = Path(copa_harness.__file__).parent
    assert str(package / "optimize" / "copa.py") in seen
    assert str(package / "tune" / "trainer.py") in seen
    assert str(package / "strategy.py") in seen


def settings(folder: Path) -> Settings:
    return Settings(root=folder, cache_dir=folder / "cache", report_dir=folder / "reports")


def test_lines_of_progress_say_of_which_task_they_tell(tmp_path: Path) -> None:
    lines: list[str] = []
    rows = [dspy.Example(question=f"q{i}", answer="yes").with_inputs("question") for i in range(12)]
    program = dspy.Predict("question -> answer")
    with CopaSession(settings(tmp_path), on_progress=lines.append) as session:
        for name in ("one", "two"):
            task = Task(name, program, lambda example, prediction, trace=None: 0.0, rows[:4], rows[4:8], rows[8:])
            lm = ScriptedLM({"answer": name}, gateway=session.models.gateway)
            session.run(task, lm=lm, settings=session.settings.merged(strategy="p", budget=60))
    assert [line for line in lines if line.startswith("one: p ended")]
    assert [line for line in lines if line.startswith("two: p ended")]
    assert all(line.startswith(("one: ", "two: ", "one, none: ", "two, none: ")) for line in lines)
    assert [line[:4] for line in lines if "do not parse" in line] == ["one,", "two,"]  # not again after the search


def test_a_cache_that_cannot_be_made_is_told_with_its_remedy_once(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "responses").write_text("in the way")
    with pytest.raises(ConfigurationError, match=r"cache directory .* cannot be used: cannot create") as told:
        CopaSession(settings(tmp_path))
    assert str(told.value).count("--copa-cache-dir") == 1


SCALE = {"hit": 1.0}


def scaled(example, prediction, trace=None) -> float:
    return SCALE["hit"] * float(example.answer == prediction.answer)


class Sorter(dspy.Module):
    def __init__(self, kind: type = str, limit: int = 1):
        super().__init__()
        self.limit = limit
        self.sort = dspy.Predict(
            dspy.Signature({"question": (str, dspy.InputField()), "answer": (kind, dspy.OutputField())})
        )

    def forward(self, **inputs):
        return self.sort(**inputs)


def with_model(temperature: float) -> Sorter:
    program = Sorter()
    program.sort.lm = dspy.LM("openai/m", temperature=temperature, api_key="k")
    return program


def key_of(folder: Path, program: dspy.Module) -> tuple[str, str]:
    """The key of an optimization, and the fingerprint of what judges it."""
    rows = [dspy.Example(question=f"q{i}", answer="yes").with_inputs("question") for i in range(12)]
    task = Task("keyed", program, scaled, rows[:4], rows[4:8], rows[8:])
    lm = ScriptedLM("yes", fingerprint="scripted")
    key = optimizations._key(task, lm=lm, prompt_lm=None, settings=settings(folder))
    return key, optimizations.fingerprints_of(task, program, lm)["metric"]


def test_an_optimization_is_not_taken_for_one_of_another_program_model_or_prompt_adapter(tmp_path: Path) -> None:
    keys = [key_of(tmp_path, Sorter()), key_of(tmp_path, Sorter())]
    assert keys[0] == keys[1]
    changed = [Sorter(limit=2), Sorter(Literal["yes", "no"]), Sorter(Literal["yes", "maybe"])]
    changed += [with_model(0.0), with_model(1.0)]
    keys += [key_of(tmp_path, program) for program in changed]
    for adapter in (dspy.JSONAdapter(), dspy.ChatAdapter(use_native_function_calling=True)):
        with dspy.context(adapter=adapter):
            keys.append(key_of(tmp_path, Sorter()))
    assert len({key for key, _ in keys}) == len(keys) - 1
    assert len({metric for _, metric in keys}) == 1


def test_a_metric_with_other_numbers_is_another_one(tmp_path: Path, monkeypatch) -> None:
    before = key_of(tmp_path, Sorter())
    monkeypatch.setitem(SCALE, "hit", 0.5)
    after = key_of(tmp_path, Sorter())
    assert before[0] != after[0]
    assert before[1] != after[1]  # a baseline of the old one is not comparable


def needing_it(folder: Path, *, doomed_after: int = 0):
    """Starts processes that need one optimization; each writes down what it got.

    Every call that reaches the model is a line of `calls.log`. The process that asks first kills itself at its call
    number `doomed_after`, if that is above 0.
    """
    log, first = folder / "calls.log", folder / "first"

    def answers(messages, model):
        with log.open("a") as file:
            file.write(f"{os.getpid()} {json.dumps(messages)}\n")
        if doomed_after and not first.exists() and len(log.read_text().splitlines()) >= doomed_after:
            first.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.005)  # whoever does not wait for the other is seen in the log
        return {"answer": "yes" if any(f"{i}\n" in messages[-1]["content"] for i in range(3)) else "no"}

    def work(barrier) -> None:
        rows = [dspy.Example(question=f"q{i}", answer="yes").with_inputs("question") for i in range(24)]
        task = Task("needed", dspy.Predict("question -> answer"), exact, rows[:10], rows[10:18], rows[18:])
        with CopaSession(settings(folder)) as session:
            lm = ScriptedLM(answers, gateway=session.models.gateway, fingerprint="scripted")
            barrier.wait(60)
            run = session.run(task, lm=lm, settings=session.settings.merged(strategy="p", budget=60, adoption_p=1.0))
            state = run.program.dump_state(json_mode=True)
        (folder / f"{os.getpid()}.result").write_text(json.dumps([run.from_disk, run.score, state]))

    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    both = [context.Process(target=work, args=(barrier,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    return both, [json.loads(path.read_text()) for path in folder.glob("*.result")]


def exact(example, prediction, trace=None) -> float:
    return float(example.answer == prediction.answer)


def test_of_two_processes_that_need_the_same_one_makes_it_and_the_other_finds_it_done(tmp_path: Path) -> None:
    both, results = needing_it(tmp_path)
    assert [process.exitcode for process in both] == [0, 0]
    assert sorted(from_disk for from_disk, _, _ in results) == [False, True]
    assert results[0][1:] == results[1][1:]
    calls = Counter(line.split(" ", 1)[1] for line in (tmp_path / "calls.log").read_text().splitlines())
    assert len(calls) > 20
    assert max(calls.values()) == 1, "a call was paid twice"


def test_whoever_waits_makes_it_when_the_maker_is_killed_and_pays_for_no_answer_twice(tmp_path: Path) -> None:
    both, results = needing_it(tmp_path, doomed_after=20)
    assert sorted(process.exitcode for process in both) == [-signal.SIGKILL, 0]
    assert [from_disk for from_disk, _, _ in results] == [False]
    calls = Counter(line.split(" ", 1)[1] for line in (tmp_path / "calls.log").read_text().splitlines())
    n_in_flight = settings(tmp_path).threads  # what the killed one had asked was never answered to anybody
    assert sum(count - 1 for count in calls.values()) <= n_in_flight


@pytest.mark.parametrize(
    "damage",
    [
        lambda value: value.pop("result"),
        lambda value: value.update(result=[]),
        lambda value: value["result"].update(phases=7),
        lambda value: value["result"].update(state=[]),
        lambda value: value["result"]["state"].update(schema=99),
        lambda value: value["result"]["state"].pop("predictors"),
        lambda value: value["result"]["state"]["predictors"].update(other={}),
        lambda value: value["result"]["state"]["predictors"]["self"].update(demos=[1]),
        lambda value: value["result"]["state"]["predictors"]["self"].update(model=[]),
    ],
)
def test_a_stored_optimization_of_wrong_parts_is_told_of_and_made_again(tmp_path: Path, damage) -> None:
    rows = [dspy.Example(question=f"q{i}", answer="yes").with_inputs("question") for i in range(12)]
    task = Task("stored", dspy.Predict("question -> answer"), exact, rows[:4], rows[4:8], rows[8:])
    with CopaSession(settings(tmp_path)) as session:
        lm = ScriptedLM("yes", gateway=session.models.gateway, fingerprint="scripted")
        chosen = session.settings.merged(strategy="p", budget=40)

        def found() -> optimizations.Optimized:
            return Optimizations(tmp_path / "cache").get(task, lm=lm, prompt_lm=None, settings=chosen)

        key = found().key
        stages = StageStore(tmp_path / "cache" / "stages")
        value = stages.get(key)
        damage(value)
        stages.put(key, value)
        with pytest.warns(RuntimeWarning, match="it is made again"):
            assert not found().from_disk
        assert found().from_disk


# -- a lost adapter, and one that was trained elsewhere


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "llama")


def tuned(folder: Path, tiny: Path) -> optimizations.Optimized:
    """The weights of a tiny model tuned, by a session of its own."""
    with CopaSession(settings(folder)) as session:
        engine = TransformersEngine(tiny, name="hf:tiny", lora_dir=folder / "cache" / "lora")
        lm = MeteredLM("hf:tiny", engine=engine, gateway=session.models.gateway, max_tokens=4)
        rows = [dspy.Example(question=word, answer=word.upper()).with_inputs("question") for word in ("au", "av", "aw")]
        task = Task("shout", dspy.Predict("question -> answer"), exact, rows[:1], rows[1:2], rows[2:])
        chosen = session.settings.merged(strategy="w", budget=40, adoption_p=1.0, lora={"epochs": 2})
        found = Optimizations(folder / "cache").get(task, lm=lm, prompt_lm=None, settings=chosen)
        assert found.program.predictors()[0].lm.engine.fingerprint(found.lm.model)  # it is there
        return found


@pytest.mark.parametrize(
    ("lost", "has_copy"),
    [
        (lambda folder: shutil.rmtree(folder), True),
        (lambda folder: os.truncate(folder / "adapter_model.safetensors", 100), True),
        (lambda folder: (folder / "adapter_config.json").unlink(), True),
        (lambda folder: (folder / "manifest.json").write_text("[]"), True),
        (lambda folder: shutil.rmtree(folder), False),
        (lambda folder: os.truncate(folder / "adapter_model.safetensors", 100), False),
    ],
    ids=["deleted", "truncated", "without config", "manifest", "deleted, copy too", "truncated, copy too"],
)
def test_a_lost_adapter_comes_back_from_the_artifact_or_is_trained_again(tmp_path, tiny, lost, has_copy) -> None:
    first = tuned(tmp_path, tiny)
    digits = first.lm.model.rpartition("@")[2]
    lost(find_lora(tmp_path / "cache" / "lora", digits))
    if not has_copy:
        os.truncate(first.artifact / "lora" / "adapter_model.safetensors", 100)
    with pytest.warns(RuntimeWarning, match="put back from the artifact" if has_copy else "trained again"):
        again = tuned(tmp_path, tiny)
    assert (again.lm.model, again.from_disk) == (first.lm.model, has_copy)
    assert load_artifact(again.artifact).lora_directory is not None  # whole again too
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned(tmp_path, tiny).from_disk


def test_what_another_machine_tuned_is_taken_from_the_shared_files(tmp_path, tiny) -> None:
    files = SharedFiles(f"memory://{tmp_path.name}")
    with sharing_files(files):
        first = tuned(tmp_path / "one", tiny)
        shutil.copytree(tmp_path / "one" / "cache" / "stages", tmp_path / "other" / "cache" / "stages")
        again = tuned(tmp_path / "other", tiny)
    assert again.from_disk
    assert again.lm.model == first.lm.model
    assert load_artifact(again.artifact).fingerprint == load_artifact(first.artifact).fingerprint
