"""The key of a finished optimization covers the modules that decide how it runs; its lines say whose they are."""

from pathlib import Path

import dspy
import pytest

import copa_harness
from copa_harness import ScriptedLM, Task
from copa_harness.errors import ConfigurationError
from copa_harness.session import CopaSession, MarkerArguments, Settings, optimizations


def test_the_optimizers_own_source_is_part_of_the_key(tmp_path: Path, monkeypatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("copa_harness.store.stages.hash_file", lambda path: seen.append(str(path)) or "hash")
    optimizations._own_source.__wrapped__()
    package = Path(copa_harness.__file__).parent
    assert str(package / "optimize" / "copa.py") in seen
    assert str(package / "tune" / "trainer.py") in seen


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
            session.run(task, lm=lm, marker=MarkerArguments(strategy="p", budget=60))
    assert [line for line in lines if line.startswith("one: p ended")]
    assert [line for line in lines if line.startswith("two: p ended")]
    assert all(line.startswith(("one: ", "two: ")) for line in lines)


def test_a_cache_that_cannot_be_made_is_told_with_its_remedy_once(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "responses").write_text("in the way")
    with pytest.raises(ConfigurationError, match=r"cache directory .* cannot be used: cannot create") as told:
        CopaSession(settings(tmp_path))
    assert str(told.value).count("--copa-cache-dir") == 1
