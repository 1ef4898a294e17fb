import os
import socket
import stat
import subprocess
import sys
import time

import pytest

from copa_harness.atomic_files import remove_leftovers, temporary_name, write_atomic


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.json"
    write_atomic(path, "one")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_atomic(path, "two")
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_a_written_file_obeys_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        write_atomic(tmp_path / "f", "x")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640


def dead_pid():
    """The number of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    return ended.pid


def leftover(path, monkeypatch, *, pid=None, machine=None, age_s=0.0):
    """A file (a folder for a name without dot) under the temporary name another process would give it."""
    with monkeypatch.context() as patch:
        if pid is not None:
            patch.setattr(os, "getpid", lambda: pid)
        if machine is not None:
            patch.setattr(socket, "gethostname", lambda: machine)
        temporary = temporary_name(path)
    if "." in path.name:
        temporary.write_text("hal")
    else:
        temporary.mkdir()
        (temporary / "half").write_text("hal")
    then = time.time() - age_s
    os.utime(temporary, (then, then))
    return temporary


def test_what_a_killed_process_left_half_written_is_removed_by_the_next_write(tmp_path):
    killed = (
        "import os, signal, sys; from pathlib import Path; from copa_harness import atomic_files;"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        "atomic_files.write_atomic(Path(sys.argv[1]) / 'latest.json', 'x' * 100)"
    )
    subprocess.run([sys.executable, "-c", killed, str(tmp_path)], check=False)
    assert [path.name.endswith(".tmp") for path in tmp_path.iterdir()] == [True]
    write_atomic(tmp_path / "other.json", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


def test_leftovers_of_the_dead_and_the_very_old_go_and_nothing_else_does(tmp_path, monkeypatch):
    dead = dead_pid()
    gone = [
        leftover(tmp_path / "a.json", monkeypatch, pid=dead),
        leftover(tmp_path / "artifact", monkeypatch, pid=dead),
        leftover(tmp_path / "b.json", monkeypatch, pid=dead, machine="elsewhere", age_s=4000),
        leftover(tmp_path / "c.json", monkeypatch, pid=os.getppid(), age_s=4000),
    ]
    kept = [
        leftover(tmp_path / "d.json", monkeypatch, pid=os.getppid()),
        leftover(tmp_path / "e.json", monkeypatch),
        leftover(tmp_path / "f.json", monkeypatch, pid=dead, machine="elsewhere"),
    ]
    for name in (f".notes.{dead}.tmp", ".hidden", "latest.json", f"{dead}.tmp"):
        (tmp_path / name).write_text("somebody's")
        kept.append(tmp_path / name)
    remove_leftovers(tmp_path)
    assert not [path.name for path in gone if path.exists()]
    assert all(path.exists() for path in kept)
    remove_leftovers(tmp_path / "no such folder")


def test_a_predecessor_that_stepped_aside_goes_only_when_its_successor_is_there(tmp_path, monkeypatch):
    temporary = leftover(tmp_path / "artifact", monkeypatch, pid=dead_pid())
    aside = temporary.rename(temporary.with_name(f"{temporary.name}.old"))
    remove_leftovers(tmp_path)
    assert (aside / "half").exists()
    (tmp_path / "artifact").mkdir()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
