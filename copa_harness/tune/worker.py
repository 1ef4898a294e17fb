"""One of the processes that share a training: `python -m copa_harness.tune.worker JOB_FOLDER`.

Started by `processes`, which sets RANK, WORLD_SIZE and the like in its environment. Standard output carries one JSON
object a line, about the first process's steps and anybody's failure; whatever else is printed goes to standard error.
On standard input comes a byte for every step the first process may take. When standard input ends, so does this
process, at once and wherever it is: whoever started it is gone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from copa_harness.errors import OutOfMemoryError, TrainingDivergedError, TrainingError
from copa_harness.lm.local.memory import is_out_of_memory, last_words
from copa_harness.tune.epochs import Outcome, run_epochs
from copa_harness.tune.job import TrainingJob, read_job
from copa_harness.tune.peers import AcceleratePeers, PeerLost

ABANDONED = 3
"""Exit status when standard input ended."""


class Starter:
    """The process that started this one. Takes standard output for itself; make one, and first of all."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # what libraries print, C code included
        self._allowed = threading.Semaphore(0)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while os.read(0, 1):
            self._allowed.release()
        os._exit(ABANDONED)  # the main thread may be inside a sum that never ends

    def say(self, kind: str, **told: Any) -> None:
        """Send one message."""
        self._out.write(json.dumps({"kind": kind, **told}) + "\n")
        self._out.flush()

    def ask(self) -> None:
        """Wait for leave to take a step."""
        self.say("before step")
        self._allowed.acquire()

    def step(self, epoch: int, loss: float) -> None:
        """A step is done (see `StepListener`)."""
        self.say("step", epoch=epoch, loss=loss)


class _Silent:
    def step(self, epoch: int, loss: float) -> None:
        """The first process tells of it."""


def train(job: TrainingJob, starter: Starter, *, rendezvous: Path) -> Outcome:
    """This process's part of the training; the first one writes the files."""
    from accelerate import PartialState

    from copa_harness.lm.local.model import LocalModel
    from copa_harness.tune import loop
    from copa_harness.tune.checkpoints import Unfinished, workers_lock

    index = int(os.environ["RANK"])
    if job.device != "cpu":
        _mind_consumer_gpus()
    state = PartialState(
        cpu=job.device == "cpu", init_method=rendezvous.as_uri(), rank=index, world_size=job.n_processes
    )
    peers = AcceleratePeers(state)
    if peers.n != job.n_processes:
        raise RuntimeError(f"got {peers.n} processes from accelerate ({state!r}); expected {job.n_processes}")
    if index == 0:
        workers_lock(job.directory, job.recipe).acquire()  # until this process ends, however it ends
    unfinished = Unfinished(job.directory, job.recipe, base_fingerprint=job.base_fingerprint)
    base = LocalModel(job.base, device=str(state.device), dtype=job.dtype)
    training = loop.Training(
        loop.add_lora(base.model, job.settings),
        job.rows,
        held_out=job.held_out,
        settings=job.settings,
        pad_id=job.pad_id,
        peers=peers,
    )
    if job.resumes:
        before = unfinished.load_state()
        if before is None:
            raise RuntimeError("the state to go on from was there when the training began and is not any more")
        training.restore(before)
    # Nobody writes before everybody has read.
    state.wait_for_everyone()
    first = index == 0
    return run_epochs(
        training,
        unfinished if first else None,
        details=job.details,
        progress=starter if first else _Silent(),
        before_step=starter.ask if first else lambda: None,
    )


def _mind_consumer_gpus() -> None:
    """Some cannot speak to one another directly; accelerate's own launcher says so to NCCL in the same way."""
    from accelerate.utils import check_cuda_p2p_ib_support

    if not check_cuda_p2p_ib_support():
        os.environ.setdefault("NCCL_P2P_DISABLE", "1")
        os.environ.setdefault("NCCL_IB_DISABLE", "1")


def main(folder: Path) -> None:
    """Take part in the job of a folder; does not return."""
    starter = Starter()
    try:
        outcome = train(read_job(folder), starter, rendezvous=folder / "rendezvous")
    except BaseException as error:  # noqa: BLE001 - whatever it is, the starter hears of it and ends all processes
        traceback.print_exc()
        kind = _kind(error)
        starter.say("failed", cause=kind, text=_text(error, kind=kind))
        sys.stderr.flush()
        os._exit(1)
    if os.environ["RANK"] == "0":
        starter.say("finished", outcome=dataclasses.asdict(outcome))
        os._exit(0)
    threading.Event().wait()  # its connections are open until the first process, too, is done


def _text(error: BaseException, *, kind: str) -> str:
    if kind in ("diverged", "training"):
        return str(error)
    return last_words(error) if kind == "memory" else f"{type(error).__name__}: {error}"


def _kind(error: BaseException) -> str:
    """`diverged`, `training`, `memory`, `peer` or `error`."""
    if isinstance(error, OutOfMemoryError) or is_out_of_memory(error):
        return "memory"
    if isinstance(error, TrainingDivergedError):
        return "diverged"
    if isinstance(error, TrainingError):
        return "training"
    return "peer" if isinstance(error, PeerLost) else "error"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
