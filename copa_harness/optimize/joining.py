"""Which optimizations several processes may share, how they recognize each other, and the journal they write.

Shared is what any process would do in exactly the same way. Everything else is made by one process at a time, and
others that want the same journal are refused. Knows strategies, models and files; the sharing itself is in `sharing`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy

from copa_harness.evaluate.metrics import Metric
from copa_harness.optimize.candidate import Candidate, model_name
from copa_harness.optimize.journal import Journal
from copa_harness.optimize.settings import RunSettings
from copa_harness.optimize.sharing import Colleagues, alone_at, colleagues_at
from copa_harness.optimize.strategy import Step, StepKind
from copa_harness.results import Budget
from copa_harness.store.fingerprints import hash_examples, hash_json, hash_source


def why_not_shared(steps: Sequence[Step], lms: Sequence[Any], budget: Budget) -> str | None:
    """Why an optimization is made by one process at a time, or None when several may share it.

    Args:
        steps: Of the strategy, `auto` resolved.
        lms: All models it asks.
        budget: Its ceilings.
    """
    foreign = [str(step) for step in steps if step.kind in (StepKind.OPTIMIZER, StepKind.AUTO)]
    if foreign:
        return f"{foreign[0]!r} decides for itself what it asks, in an order that depends on threads"
    timed = sorted(set(budget.ceilings) - {"calls", "train_steps"})
    if timed:
        return f"where a ceiling on {timed[0]} refuses depends on threads and time"
    trains = any(step.kind in (StepKind.WEIGHTS, StepKind.JOINT) for step in steps)
    if trains and not all(hasattr(getattr(lm, "engine", None), "add_lora") for lm in lms):
        return "a provider's fine-tuning job would be started by each"
    if any(getattr(getattr(lm, "door", None), "cache", None) is None for lm in lms):
        return "its answers are kept in memory, where another process does not find them"
    return None


def identity_of(
    student: Candidate,
    steps: Sequence[Step],
    *,
    lms: Sequence[Any],
    settings: RunSettings,
    budget: Budget,
    metric: Metric,
    splits: Sequence[Sequence[dspy.Example]],
    further: Sequence[Any] = (),
) -> str | None:
    """Hash of everything a search depends on; processes with equal ones take the same trials. None: not to be shared.

    Args:
        student: The program as given.
        steps: What is done.
        lms: All models it asks.
        settings: Of the run; how many threads it has does not count.
        budget: Its ceilings.
        metric: By its source.
        splits: Training and validation examples.
        further: Whatever else it depends on, with a telling `repr`.
    """
    if why_not_shared(steps, lms, budget) is not None:
        return None
    return hash_json(
        [
            [student.key, hash_source(type(student.template)), [str(step) for step in steps]],
            [[model_name(lm), str(getattr(lm, "fingerprint", "")), _lasting(sorted(lm.kwargs.items()))] for lm in lms],
            [_lasting(replace(settings, threads=1)), budget.ceilings, hash_source(metric)],
            [[hash_examples(split) for split in splits], _lasting(further)],
        ]
    )


def _lasting(value: Any) -> str:
    """A `repr` without addresses in memory, which are others in every process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def admission(colleagues: Colleagues | None) -> Callable[[str], bool] | None:
    """What counts a request for all processes; None for one that works alone."""
    return None if colleagues is None else colleagues.calls.admit


@contextmanager
def at_work(
    path: Path | None, *, identity: str | None, budget: Budget, attributes: Mapping[str, Any]
) -> Iterator[tuple[Journal | None, Colleagues | None]]:
    """The journal at `path`, and who else writes it, for the time of the block.

    Args:
        path: The journal file; None keeps none, and then nobody can join.
        identity: Of an optimization that may be shared; None works alone.
        budget: Its ceilings.
        attributes: Shown with every study of the journal.

    Raises:
        ConfigurationError: Another optimization is writing the journal, or one that cannot be shared.
        CacheError: It cannot be used.
    """
    if path is None:
        yield None, None
    elif identity is None:
        with alone_at(path):
            yield Journal(path, attributes=attributes), None
    else:
        with colleagues_at(path, identity=identity, budget=budget) as colleagues:
            yield Journal(path, attributes=attributes), colleagues
