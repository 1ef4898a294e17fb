"""Several processes for one training: how many, starting them, hearing of them, and ending them whatever happens.

Each runs `worker` with a device of its own. They are started here rather than by `accelerate launch`, which would stand
between as one more process, read a person's own launch configuration, and report a failure on its standard error only;
inside, the process group, its backend and the device are accelerate's. What holds them:

    standard input   leave to take each step; its end (this process closed it, or died) ends the worker
    standard output  steps, failures, the outcome, as JSON lines
    exit             a worker that ends before its time ends them all

They are in a session of their own, so Ctrl-C reaches only this process, which ends them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from copa_harness.errors import (
    ConfigurationError,
    TrainingDivergedError,
    TrainingError,
    TrainingInterruptedError,
    TrainingMemoryError,
)
from copa_harness.tune.epochs import LESS_MEMORY, Outcome
from copa_harness.tune.job import TrainingJob, write_job
from copa_harness.tune.progress import StepListener
from copa_harness.tune.settings import LoraSettings

WORTH_PROCESSES = 1e15
"""Operations of a training from which `auto` takes all GPUs: an estimate, about a minute of one GPU in float32, beside
some ten seconds in which processes start and load the weights."""

FAILURE_GRACE_S = 2.0
"""How long the other workers may take to say why they failed too: the first to be heard need not be the cause."""

_CAUSES = ("diverged", "training", "memory", "ended", "error", "peer")
"""What failed, the likeliest cause of all others first."""


def count_processes(settings: LoraSettings, device: Any, *, work: float) -> int:
    """How many processes a training is shared by.

    Args:
        settings: its `processes`; never more than `batch_size`.
        device: the engine's `torch.device`. With a number in it (`cuda:1`) one GPU was chosen, and `auto` keeps to it.
        work: floating-point operations of the whole training, roughly.

    Raises:
        ConfigurationError: fewer devices than processes asked for, or accelerate is missing.
    """
    import torch

    wanted = settings.processes
    n_devices = torch.cuda.device_count() if device.type == "cuda" else 1
    if wanted == "auto":
        wanted = n_devices if device.index is None and work >= WORTH_PROCESSES else 1
    elif device.type != "cpu" and wanted > n_devices:
        raise ConfigurationError(
            f"LoRA setting processes: got {wanted}, and {n_devices} {device.type} device(s) visible; expected at most "
            "one process per device; remedy: processes='auto', or CUDA_VISIBLE_DEVICES"
        )
    n = min(wanted, settings.batch_size)
    if n > 1 and (importlib.util.find_spec("accelerate") is None or not torch.distributed.is_available()):
        raise ConfigurationError(
            f"training in {n} processes needs accelerate and a torch with torch.distributed, and one of them is "
            "missing; remedy: pip install accelerate, or the LoRA setting processes=1"
        )
    return n


def train_in_processes(
    job: TrainingJob, folder: Path, *, progress: StepListener, before_step: Callable[[], None]
) -> Outcome:
    """Run a job; no process is left when this returns or raises.

    Args:
        job: how many processes, and what they do.
        folder: for the job and the workers' standard error; made here, removed at the end.
        progress: hears of every step.
        before_step: called before every optimizer step; what it raises ends the training.

    Raises:
        TrainingError: as in one process.
        TrainingMemoryError: a worker ran out of memory.
        TrainingInterruptedError: a worker was killed, or failed.
    """
    import torch

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    n_threads = max(1, torch.get_num_threads() // job.n_processes)
    try:
        write_job(folder, job)
        told = run_workers(
            [sys.executable, "-m", "copa_harness.tune.worker", str(folder.absolute())],
            environments=[_environment(i, job.n_processes, n_threads=n_threads) for i in range(job.n_processes)],
            folder=folder,
            progress=progress,
            before_step=before_step,
        )
        return Outcome.from_json(told)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_workers(
    command: Sequence[str],
    *,
    environments: Sequence[Mapping[str, str]],
    folder: Path,
    progress: StepListener,
    before_step: Callable[[], None],
) -> Mapping[str, Any]:
    """Start one process per environment and stay with them; returns the outcome the first one tells."""
    events: queue.Queue[tuple[int, Mapping[str, Any]]] = queue.Queue()
    workers: list[_Worker] = []
    try:
        for i, environment in enumerate(environments):
            workers.append(_Worker(i, command, environment, folder, events))
        while True:
            i, event = events.get()
            if event["kind"] == "before step":
                before_step()
                workers[i].allow_step()
            elif event["kind"] == "step":
                progress.step(int(event["epoch"]), float(event["loss"]))
            elif event["kind"] == "finished":
                outcome: Mapping[str, Any] = event["outcome"]
                return outcome
            else:
                raise _failure(_gathered((i, event), events, n=len(workers)), workers)
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process, and a thread that reads what it says."""

    def __init__(
        self,
        index: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        events: queue.Queue[tuple[int, Mapping[str, Any]]],
    ) -> None:
        self._index, self._events = index, events
        self._log = folder / f"worker-{index}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                list(command),
                cwd=folder,
                env=dict(environment),
                start_new_session=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin: IO[bytes] = self._process.stdin
        self._stdout: IO[bytes] = self._process.stdout
        self._reader = threading.Thread(target=self._read, name=f"copa-worker-{index}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._stdout:
            try:
                self._events.put((self._index, json.loads(line)))
            except ValueError:
                break  # it was killed in the middle of a line
        self._events.put((self._index, {"kind": "ended", "cause": "ended", "status": self._process.wait()}))

    def allow_step(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, and its reader says so next
            self._stdin.write(b"\n")
            self._stdin.flush()

    def last_words(self) -> str:
        """The end of its standard error."""
        text = self._log.read_text(encoding="utf-8", errors="replace").strip()
        return "\n".join(text[-4000:].splitlines()[-12:])

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._stdout.close()
        with contextlib.suppress(BrokenPipeError):  # an unsent byte for a process that is gone
            self._stdin.close()


def _gathered(
    first: tuple[int, Mapping[str, Any]], events: queue.Queue[tuple[int, Mapping[str, Any]]], *, n: int
) -> dict[int, Mapping[str, Any]]:
    """By worker, what it failed of, as far as it is known within `FAILURE_GRACE_S`."""
    failures = {first[0]: first[1]}
    until_s = time.monotonic() + FAILURE_GRACE_S
    while len(failures) < n:
        try:
            i, event = events.get(timeout=max(0.0, until_s - time.monotonic()))
        except queue.Empty:
            break
        if event["kind"] in ("failed", "ended"):
            failures.setdefault(i, event)
    return failures


def _failure(failures: Mapping[int, Mapping[str, Any]], workers: Sequence[_Worker]) -> TrainingError:
    """The one error that stands for all."""
    i = min(failures, key=lambda each: (_CAUSES.index(failures[each]["cause"]), each))
    event = failures[i]
    cause = event["cause"]
    if cause in ("diverged", "training"):
        return (TrainingDivergedError if cause == "diverged" else TrainingError)(event["text"])
    if cause == "ended":
        what = _ending(int(event["status"]))
    elif cause == "memory":
        what = f"ran out of memory ({event['text']})"
    else:
        what = f"failed: {event['text']}"
    if cause != "memory" and (said := workers[i].last_words()):
        what += f"\n--- its last lines on standard error:\n{said}\n---\n"
    memory = f"; where memory is short: {LESS_MEMORY}, or processes=1"
    kind = TrainingMemoryError if cause == "memory" else TrainingInterruptedError
    return kind(
        f"process {i + 1} of {len(workers)} of a LoRA training {what}; what was trained up to the last epoch is kept; "
        f"remedy: the same training again, which goes on there{memory}"
    )


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = ", as Linux does when memory runs out" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def _environment(index: int, n: int, *, n_threads: int) -> dict[str, str]:
    """What a worker finds: its place, this process's import path, and no traces of another launcher."""
    strange = ("ACCELERATE_", "TORCHELASTIC_", "FORK_LAUNCHED")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(strange)}
    if sys.platform == "linux":
        kept.setdefault("GLOO_SOCKET_IFNAME", "lo")  # they are all on this machine, and nobody else need connect
    return {
        **kept,
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "OMP_NUM_THREADS": str(n_threads),
        "MKL_NUM_THREADS": str(n_threads),
        "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
    }
