"""The key of a finished optimization covers the modules that decide how it runs."""

from pathlib import Path

import copa_harness
from copa_harness.session import optimizations


def test_the_optimizers_own_source_is_part_of_the_key(tmp_path: Path, monkeypatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("copa_harness.store.stages.hash_file", lambda path: seen.append(str(path)) or "hash")
    optimizations._own_source.__wrapped__()
    package = Path(copa_harness.__file__).parent
    assert str(package / "optimize" / "copa.py") in seen
    assert str(package / "tune" / "trainer.py") in seen
