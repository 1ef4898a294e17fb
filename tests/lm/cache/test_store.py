"""Answers on disk: right or absent, never wrong, never unpickled, and one clear warning when damaged."""

import os
import pickle
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import warnings

import pytest
from diskcache.core import MODE_PICKLE
from hypothesis import given
from hypothesis import strategies as st

from copa_harness.errors import CacheError
from copa_harness.lm.cache.answers import MemoryCache, decode_answer, encode_answer
from copa_harness.lm.cache.store import CacheWarning, ResponseCache

KEY = "ab" * 32
OTHER = "cd" * 32
ANSWER = {"message": {"role": "assistant", "parts": [{"type": "text", "text": "grüße"}]}}


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "responses"


def filled(directory):
    cache = ResponseCache(directory)
    cache.set(KEY, ANSWER)
    cache.set(OTHER, ANSWER)
    cache.close()
    return cache


def opened_and_read(directory):
    """Some damage shows when the store is opened, some when the first row is read."""
    cache = ResponseCache(directory)
    assert cache.get(f"{7:064x}") is None
    return cache


def database(directory):
    return directory / "answers" / "cache.db"


def sql(directory, statement, *values):
    connection = sqlite3.connect(database(directory))
    with connection:
        connection.execute(statement, values)
    connection.close()


@pytest.mark.parametrize("make", [lambda d: MemoryCache(), ResponseCache])
def test_what_is_set_is_got_and_nothing_else(make, directory):
    cache = make(directory)
    assert cache.get(KEY) is None
    cache.set(KEY, ANSWER)
    assert cache.get(KEY) == ANSWER
    assert cache.get(KEY) is not cache.get(KEY)
    assert cache.get(OTHER) is None
    cache.close()


def test_a_large_answer_is_kept_too(directory):
    answer = {"text": "x" * 200_000}
    cache = ResponseCache(directory)
    cache.set(KEY, answer)
    assert ResponseCache(directory).get(KEY) == answer


@given(st.binary(max_size=200))
def test_no_altered_bytes_are_ever_taken_for_an_answer(data):
    good = encode_answer(KEY, ANSWER)
    for bad in (data, good[: len(data)] if len(data) < len(good) else good + b"x", good.replace(b"text", data, 1)):
        if bad != good:
            with pytest.raises(ValueError):
                decode_answer(KEY, bad)


def test_an_answer_moved_to_another_key_is_refused():
    with pytest.raises(ValueError, match="checksum"):
        decode_answer(OTHER, encode_answer(KEY, ANSWER))


def test_answers_that_are_not_json_are_refused_before_they_are_written(directory):
    with pytest.raises(ValueError):
        ResponseCache(directory).set(KEY, {"score": float("nan")})


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_planted_pickle_is_refused_not_read(directory, tmp_path):
    filled(directory)
    bomb = pickle.dumps(Bomb(tmp_path / "boom"))
    sql(directory, "UPDATE Cache SET mode = ?, value = ? WHERE key = ?", MODE_PICKLE, bomb, KEY)
    cache = ResponseCache(directory)
    with pytest.warns(CacheWarning, match="damaged and was refused .*pickle"):
        assert cache.get(KEY) is None
    assert not (tmp_path / "boom").exists()
    assert cache.get(OTHER) == ANSWER
    cache.set(KEY, ANSWER)
    assert cache.get(KEY) == ANSWER


@pytest.mark.parametrize("name", ["../../../victim.txt", "absolute", "ab/../../../../victim.txt", ""])
@pytest.mark.parametrize("mode", [0, 1, 2, 3, 4, "text", None])
def test_a_planted_row_that_names_a_file_is_a_miss_and_never_touches_it(directory, tmp_path, mode, name):
    victim = tmp_path / "victim.txt"
    victim.write_bytes(encode_answer(KEY, ANSWER))
    filename = str(victim) if name == "absolute" else name
    filled(directory)
    for key in (KEY, OTHER):
        sql(directory, "UPDATE Cache SET mode = ?, filename = ?, value = NULL WHERE key = ?", mode, filename, key)
    cache = ResponseCache(directory)
    with pytest.warns(CacheWarning, match="damaged and was refused"):
        assert cache.get(KEY) is None
    cache.set(KEY, ANSWER)
    cache.set(OTHER, ANSWER)  # written over without being read
    assert cache.get(KEY) == cache.get(OTHER) == ANSWER
    assert len(cache) == 2
    assert victim.read_bytes() == encode_answer(KEY, ANSWER)


def test_planted_rows_are_dropped_with_the_others_and_their_files_are_not(directory, tmp_path):
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    cache = filled(directory)
    sql(directory, "UPDATE Cache SET filename = ?, mode = 2 WHERE key = ?", str(victim), KEY)
    sql(directory, "UPDATE Cache SET filename = ?, mode = 4, raw = 0 WHERE key = ?", "../../victim.txt", OTHER)
    assert cache.shrink(0) == 2
    assert victim.read_text() == "mine"


def test_a_row_planted_under_an_empty_key_stops_nothing(directory):
    filled(directory)
    sql(directory, "UPDATE Cache SET key = '', mode = NULL WHERE key = ?", KEY)
    cache = ResponseCache(directory)
    assert cache.get(OTHER) == ANSWER
    cache.set(KEY, ANSWER)
    assert cache.get(KEY) == ANSWER


def test_a_planted_link_leads_no_answer_out_of_the_store(directory, tmp_path):
    cache, outside = filled(directory), tmp_path / "outside"
    outside.mkdir()
    for index in range(256):
        (directory / "answers" / f"{index:02x}").symlink_to(outside)
    with pytest.warns(CacheWarning, match=r"cannot be written .*leads out of the store"):
        cache.set(KEY, {"text": "x" * 50_000})
    assert list(outside.iterdir()) == []
    assert cache.get(KEY) == {"text": "x" * 50_000}  # of this process' memory


def test_a_planted_link_in_place_of_the_database_is_moved_aside(directory, tmp_path):
    other = tmp_path / "other.db"
    filled(directory)
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE mine (a)")
    connection.close()
    before = other.read_bytes()
    database(directory).unlink()
    database(directory).symlink_to(other)
    with pytest.warns(CacheWarning, match=r"unusable \(cache.db is a link to another place\)"):
        cache = ResponseCache(directory)
    cache.set(KEY, ANSWER)
    assert other.read_bytes() == before


def test_a_row_whose_file_is_gone_or_is_no_file_is_a_miss(directory):
    cache, answer = ResponseCache(directory), {"text": "x" * 50_000}
    cache.set(KEY, answer)
    (file,) = directory.rglob("*.val")
    file.unlink()
    assert cache.get(KEY) is None
    os.mkfifo(file)
    assert cache.get(KEY) is None  # and does not wait for somebody to write into it
    cache.set(KEY, answer)
    assert cache.get(KEY) == answer


def test_rows_lie_in_the_database_as_they_always_did(directory):
    filled(directory).set("ef" * 32, {"text": "x" * 50_000})
    with sqlite3.connect(database(directory)) as connection:
        rows = connection.execute("SELECT key, raw, expire_time, tag, mode, filename, value FROM Cache").fetchall()
    connection.close()
    assert rows[0] == (KEY, 1, None, None, 1, None, encode_answer(KEY, ANSWER))
    key, raw, _, _, mode, filename, value = rows[2]
    assert (key, raw, mode, value) == ("ef" * 32, 1, 2, None)
    assert (directory / "answers" / filename).read_bytes() == encode_answer(key, {"text": "x" * 50_000})


def test_a_planted_pickle_file_is_refused_not_read(directory, tmp_path):
    filled(directory)
    (directory / "answers" / "bomb.val").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    sql(directory, "UPDATE Cache SET mode = ?, value = NULL, filename = ? WHERE key = ?", MODE_PICKLE, "bomb.val", KEY)
    with pytest.warns(CacheWarning, match="pickle"):
        assert ResponseCache(directory).get(KEY) is None
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("value", [b"", b"garbage", "text", 7, 1.5, encode_answer(OTHER, ANSWER)])
def test_a_damaged_row_is_a_miss_with_one_warning_and_then_gone(directory, value):
    filled(directory)
    sql(directory, "UPDATE Cache SET value = ? WHERE key = ?", value, KEY)
    sql(directory, "UPDATE Cache SET value = ? WHERE key = ?", b"also damaged", OTHER)
    cache = ResponseCache(directory)
    with pytest.warns(CacheWarning, match="is damaged and was refused"):
        assert cache.get(KEY) is None
    assert cache.get(KEY) is None
    assert cache.get(OTHER) is None  # a second warning would be an error here
    assert len(cache) == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"this is no database at all" * 100),
        lambda path: path.write_bytes(path.read_bytes()[:5000]),
        lambda path: path.write_bytes(path.read_bytes()[:4096] + os.urandom(40_000)),
    ],
    ids=["garbage", "truncated", "scrambled"],
)
def test_an_unusable_store_is_moved_aside_and_rebuilt_with_one_warning(directory, damage):
    cache = ResponseCache(directory)
    for index in range(300):
        cache.set(f"{index:064x}", ANSWER)
    cache.close()
    for leftover in directory.glob("answers/cache.db-*"):
        leftover.unlink()
    damage(database(directory))
    with pytest.warns(CacheWarning, match="unusable .* moved to answers.damaged-.* paid for again"):
        cache = opened_and_read(directory)
    cache.set(KEY, ANSWER)  # a second warning would be an error here
    assert cache.get(KEY) == ANSWER
    assert len(list(directory.glob("answers.damaged-*"))) == 1
    assert ResponseCache(directory).get(KEY) == ANSWER


def test_a_database_damaged_while_in_use_is_rebuilt_too(directory):
    cache = filled(directory)
    for leftover in directory.glob("answers/cache.db-*"):
        leftover.unlink()
    database(directory).write_bytes(b"overwritten by something" * 1000)
    with pytest.warns(CacheWarning, match="unusable"):
        cache.set(KEY, ANSWER)
    assert cache.get(KEY) == ANSWER


def test_a_file_in_place_of_the_store_is_moved_aside(directory):
    directory.mkdir()
    (directory / "answers").write_text("a stray file")
    with pytest.warns(CacheWarning, match="unusable"):
        cache = ResponseCache(directory)
    cache.set(KEY, ANSWER)
    assert cache.get(KEY) == ANSWER


def test_foreign_files_beside_the_store_are_left_alone(directory):
    filled(directory)
    (directory / "notes.txt").write_text("mine")
    assert ResponseCache(directory).get(KEY) == ANSWER
    assert (directory / "notes.txt").read_text() == "mine"


def test_a_file_where_the_folder_should_be_is_one_clear_error(directory):
    directory.write_text("a file")
    with pytest.raises(CacheError, match=r"cannot create the response cache in .*responses.* --copa-cache-dir"):
        ResponseCache(directory)


@pytest.mark.parametrize("complaint", ["attempt to write a readonly database", "database or disk is full"])
def test_an_answer_the_disk_refuses_is_kept_in_memory_with_one_warning(directory, monkeypatch, complaint):
    cache = ResponseCache(directory)

    def refuse(*args, **kwargs):
        raise sqlite3.OperationalError(complaint)

    monkeypatch.setattr(cache._store, "set", refuse)
    with pytest.warns(CacheWarning, match=f"cannot be written .{complaint}"):
        cache.set(KEY, ANSWER)
    cache.set(OTHER, ANSWER)  # a second warning would be an error here
    assert cache.get(KEY) == cache.get(OTHER) == ANSWER
    assert not list(directory.glob("answers.damaged-*"))


def test_a_store_that_somebody_else_keeps_locked_is_said_with_the_reason(directory, monkeypatch):
    monkeypatch.setattr("copa_harness.lm.cache.store._SQLITE_TIMEOUT_S", 0.05)
    cache = filled(directory)
    other = sqlite3.connect(database(directory), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.warns(CacheWarning, match=r"cannot be written \(database is locked\)"):
        cache.set(KEY, {"text": "new"})
    assert cache.get(KEY) == {"text": "new"}
    for change in (cache.clear, lambda: cache.shrink(0), lambda: cache.drop([KEY])):
        with pytest.raises(sqlite3.OperationalError, match="database is locked"):
            change()
    other.close()
    assert cache.clear() == 2


FORK = """
import os, sys, threading
from pathlib import Path
from copa_harness.lm.cache.store import ResponseCache

cache, held = ResponseCache(Path(sys.argv[1])), threading.Event()
cache.set("ab" * 32, {"text": "parent"})

def hold():
    with cache._writing, cache._opening, cache.locked("ab" * 32):
        held.set()
        threading.Event().wait()

threading.Thread(target=hold, daemon=True).start()
held.wait()
if (child := os.fork()) == 0:
    cache.set("cd" * 32, {"text": "child"})
    os._exit(0 if cache.get("ab" * 32) == {"text": "parent"} else 1)
assert os.waitpid(child, 0)[1] == 0
assert cache.get("cd" * 32) == {"text": "child"}
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_waits_for_no_thread_of_its_parent(directory):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK, directory], check=True, timeout=60, env=environment)


def test_a_lock_excludes_everybody_else_from_its_key_and_nobody_from_other_keys(directory):
    mine, other = ResponseCache(directory), ResponseCache(directory)  # another lock object, as another process has
    order = []

    def wait():
        with other.locked(KEY):
            order.append("other")

    with mine.locked(KEY):
        with mine.locked("ab" + "0" * 62):  # another key: no wait
            thread = threading.Thread(target=wait)
            thread.start()
        thread.join(0.1)
        order.append("mine")
    thread.join(5)
    assert order == ["mine", "other"]


def test_without_locks_calls_go_on_after_one_warning(directory, monkeypatch):
    cache = ResponseCache(directory)

    def refuse(*args, **kwargs):
        raise OSError("no locks available")

    monkeypatch.setattr("copa_harness.lm.cache.locks.fcntl.lockf", refuse)
    with pytest.warns(CacheWarning, match=r"cannot lock .*no locks available"), cache.locked(KEY):
        pass
    with warnings.catch_warnings(), cache.locked(OTHER):
        warnings.simplefilter("error")


def test_reads_leave_no_trace_and_many_threads_may_use_one_cache(directory):
    cache = filled(directory)
    results = []
    threads = [threading.Thread(target=lambda: results.append(cache.get(KEY))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [ANSWER] * 16


def test_beyond_its_size_limit_the_oldest_answers_are_dropped_with_one_warning(directory):
    cache = ResponseCache(directory, size_limit=1_000_000)

    def fill():
        for index in range(450):
            cache.set(f"{index:064x}", {"text": "x" * 4000})

    with pytest.warns(CacheWarning, match=r"reached its limit of 1,000,000 bytes.*copa cache stats") as caught:
        fill()
    assert len(caught) == 1
    assert cache.get(f"{0:064x}") is None
    assert cache.get(f"{449:064x}") == {"text": "x" * 4000}
    assert len(cache) < 300


def test_the_lock_file_is_closed_with_the_cache_unless_somebody_holds_a_lock(directory):
    cache, other = ResponseCache(directory), ResponseCache(directory)
    with cache.locked(KEY):
        other.close()
        assert cache._locks._file._descriptor >= 0
    cache.close()
    assert cache._locks._file._descriptor == -1
    with cache.locked(KEY):
        pass
    assert cache._locks._file._threads == {}


def test_an_answer_stored_again_replaces_the_old_one(directory):
    cache = ResponseCache(directory)
    for answer in ({"text": "x" * 50_000}, {"text": "small"}, {"text": "y" * 50_000}, {"text": "last"}):
        cache.set(KEY, answer)
        assert cache.get(KEY) == answer
    assert len(cache) == 1
    assert not list(directory.rglob("*.val"))


@pytest.mark.parametrize("writer_lives", [False, True])
def test_a_store_that_cannot_be_written_replays_and_keeps_new_answers_in_memory(directory, monkeypatch, writer_lives):
    writer = filled(directory)
    large = {"text": "x" * 200_000}
    writer.set(f"{1:064x}", large)
    if not writer_lives:
        writer.close()

    def refused(*arguments, **settings):
        raise sqlite3.OperationalError("attempt to write a readonly database")

    monkeypatch.setattr("copa_harness.lm.cache.store.diskcache.Cache", refused)
    monkeypatch.setattr("copa_harness.lm.cache.store.os.access", lambda path, mode: mode != os.W_OK)
    cache = ResponseCache(directory)  # pytest makes errors of warnings: reading warns of nothing
    assert (len(cache), cache.get(KEY), cache.get(f"{1:064x}"), cache.get(f"{7:064x}")) == (3, ANSWER, large, None)
    with pytest.warns(CacheWarning, match="readonly database"):
        cache.set(f"{7:064x}", ANSWER)
    assert cache.get(f"{7:064x}") == ANSWER
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        cache.clear()
    cache.close()


def test_no_flipped_byte_of_the_store_gives_another_answer_and_all_heal(directory):
    filled(directory)
    whole, chance = database(directory).read_bytes(), random.Random(6)
    places = [place for place, byte in enumerate(whole) if byte]
    places = places if os.environ.get("FUZZ") else chance.sample(places, 40)
    for place in places:
        shutil.rmtree(directory / "answers")
        (directory / "answers").mkdir()
        flipped = whole[place] ^ chance.randrange(1, 256)
        database(directory).write_bytes(whole[:place] + bytes([flipped]) + whole[place + 1 :])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CacheWarning)
            for _ in range(2):  # what was damaged may show, and be rebuilt, only after an answer was stored in it
                cache = ResponseCache(directory)
                for key in (KEY, OTHER):
                    assert cache.get(key) in (None, ANSWER), place
                    cache.set(key, ANSWER)
                cache.close()
        healed = ResponseCache(directory)
        assert [healed.get(key) for key in (KEY, OTHER)] == [ANSWER, ANSWER], place
        healed.close()
        for damaged in directory.glob("answers.damaged-*"):
            shutil.rmtree(damaged)
