"""`copa cache`: what it shows, what it drops, and that it says clearly what it cannot do."""

import os
import sqlite3
import subprocess
import sys

import pytest

from copa_harness.cli import main
from copa_harness.errors import CacheError
from copa_harness.lm.cache.maintenance import cache_stats, clear_cache, prune_cache
from copa_harness.lm.cache.store import ResponseCache


def key(index):
    return f"{index:064x}"


@pytest.fixture
def directory(tmp_path):
    cache = ResponseCache(tmp_path / "responses")
    for index in range(30):
        cache.set(key(index), {"text": "x" * (50_000 if index % 10 == 0 else 1000)})
    cache.close()
    with sqlite3.connect(tmp_path / "responses" / "answers" / "cache.db") as sql:
        sql.execute("UPDATE Cache SET store_time = store_time - 86400 * 10 WHERE rowid <= 10")
    sql.close()
    return tmp_path


def copa(*arguments):
    return main(["cache", *map(str, arguments)])


def test_stats_tell_what_is_there(directory, capsys):
    assert copa("stats", "--cache-dir", directory) == 0
    out = capsys.readouterr().out
    assert "30 answers" in out
    assert "kB" in out
    assert "stored from" in out
    assert cache_stats(directory / "responses").n_answers == 30


def test_prune_by_age_keeps_what_is_young_and_frees_files(directory, capsys):
    files = list((directory / "responses" / "answers").rglob("*.val"))
    assert len(files) == 3
    assert copa("prune", "--older-than", "5d", "--cache-dir", directory) == 0
    assert "dropped 10 answers, freed" in capsys.readouterr().out
    cache = ResponseCache(directory / "responses")
    assert cache.get(key(5)) is None
    assert cache.get(key(20)) is not None
    assert len(list((directory / "responses" / "answers").rglob("*.val"))) == 2


def test_prune_by_size_drops_the_oldest_first(directory):
    cache = ResponseCache(directory / "responses")
    for index in range(100, 700):
        cache.set(key(index), {"text": "y" * 3000})
    dropped, freed = prune_cache(directory, max_bytes=600_000)
    assert dropped > 100
    assert freed > 500_000
    assert cache.get(key(1)) is None
    assert cache.get(key(699)) is not None


def test_clear_drops_everything_and_leaves_foreign_files(directory):
    foreign = directory / "responses" / "notes.txt"
    foreign.write_text("mine")
    assert clear_cache(directory)[0] == 30
    assert cache_stats(directory).n_answers == 0
    assert foreign.read_text() == "mine"


def test_clear_asks_and_does_nothing_without_an_answer(directory, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    assert copa("clear", "--cache-dir", directory) == 1
    assert "nothing was dropped: add --yes to drop 30 answers" in capsys.readouterr().err
    assert copa("clear", "--yes", "--cache-dir", directory) == 0


def test_a_damaged_store_is_shown_and_pruned(directory, capsys):
    damaged = directory / "responses" / "answers.damaged-1"
    damaged.mkdir()
    (damaged / "cache.db").write_text("x" * 2000)
    assert copa("stats", "--cache-dir", directory) == 0
    assert "moved aside as damaged: answers.damaged-1, 2.0 kB" in capsys.readouterr().out
    assert prune_cache(directory) == (0, 2000)
    assert not damaged.exists()


def test_a_planted_row_cannot_name_a_file_outside_to_be_removed(directory, tmp_path):
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    with sqlite3.connect(directory / "responses" / "answers" / "cache.db") as sql:
        sql.execute("UPDATE Cache SET filename = ? WHERE rowid = 1", (str(victim),))
        sql.execute("UPDATE Cache SET filename = '../../victim.txt' WHERE rowid = 2")
    sql.close()
    clear_cache(directory)
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("command", ["stats", "prune", "clear"])
def test_no_cache_is_one_clear_error_and_creates_nothing(tmp_path, capsys, command):
    assert copa(command, "--cache-dir", tmp_path / "none") == 1
    assert "no response cache in" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("option", "message"), [("--older-than=5", "got the age '5'"), ("--max-size=1XB", "got the size")]
)
def test_ages_and_sizes_that_mean_nothing_are_told(directory, capsys, option, message):
    assert copa("prune", option, "--cache-dir", directory) == 2
    assert message in capsys.readouterr().err


def test_without_a_command_help_is_printed(capsys):
    assert main([]) == 2
    assert "cache" in capsys.readouterr().err
    assert copa() == 2


def test_a_cache_that_cannot_be_written_is_one_clear_error(directory, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise sqlite3.OperationalError("attempt to write a readonly database")

    monkeypatch.setattr("diskcache.Cache.clear", refuse)
    with pytest.raises(CacheError, match=r"cannot change the response cache .*readonly"):
        clear_cache(directory)


def test_the_command_loads_neither_torch_nor_dspy(directory):
    code = (
        "import sys; from copa_harness.cli import main; status = main(sys.argv[1:]);"
        "assert not {'torch', 'dspy', 'litellm', 'pytest'} & set(sys.modules); sys.exit(status)"
    )
    subprocess.run(
        [sys.executable, "-c", code, "cache", "stats", "--cache-dir", str(directory)],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
