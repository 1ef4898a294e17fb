"""Ensemble: the run's best programs asked together, their answers put to the vote or averaged.

DSPy's `Ensemble` over the programs this run has scored fully, best first; every member keeps its prompts and its
weights. On validation it costs no call: its members' answers are known there. In use every answer costs one run of each
member. Knows candidates and their scores; knows nothing of how they were found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dspy
from dspy import teleprompt

from copa_harness.errors import ConfigurationError
from copa_harness.optimize.candidate import Candidate
from copa_harness.optimize.limits import ENSEMBLE_KWARGS, check_kwargs

SIZE = 3
"""Members unless said otherwise: the fewest that can outvote one."""


def ensemble_of(candidates: Sequence[Candidate], *, kwargs: Mapping[str, Any] | None = None) -> Candidate:
    """The ensemble of the first candidates.

    Args:
        candidates: Fully scored candidates, best first.
        kwargs: `size` (members, at least 2) and `reduce` ("majority" or "mean").

    Raises:
        ConfigurationError: Fewer than two candidates, or an argument that cannot be used.
    """
    check_kwargs("ensemble", kwargs or {}, known=ENSEMBLE_KWARGS)
    given = {"size": SIZE, "reduce": "majority", **(kwargs or {})}
    size, reduce = given["size"], given["reduce"]
    if isinstance(size, bool) or not isinstance(size, int) or size < 2:
        raise ConfigurationError(f"got size={size!r} for ensemble; expected a whole number of at least 2")
    if reduce not in REDUCERS:
        raise ConfigurationError(f"got reduce={reduce!r} for ensemble; expected one of {', '.join(REDUCERS)}")
    members = [one for one in candidates if not one.structure][:size]
    if len(members) < 2:
        raise ConfigurationError(
            f"got {len(members)} fully scored program for an ensemble; expected at least 2: let a step that searches "
            "come before it, 'p -> ensemble'"
        )
    program = teleprompt.Ensemble(reduce_fn=REDUCERS[reduce]).compile([member.program() for member in members])
    return Candidate.of(program, lm=members[0].lms[0], structure=f"ensemble of {len(members)} by {reduce}")


def majority(predictions: Sequence[Any]) -> Any:
    """The first prediction that gives the commonest answer; the better member's when several are equally common.

    Answers are compared by all output fields, letter case and outer spaces aside.
    """
    counts = Counter(_answer(prediction) for prediction in predictions)
    most = max(counts.values())
    return next(prediction for prediction in predictions if counts[_answer(prediction)] == most)


def mean(predictions: Sequence[Any]) -> Any:
    """A prediction whose numeric fields are averages; what is no number is the first member's.

    Numbers written as text count as numbers, and stay text.
    """
    fields = dict(predictions[0].items())
    for name, first in fields.items():
        try:
            values = [float(prediction[name]) for prediction in predictions]
        except (TypeError, ValueError, KeyError):
            continue
        average = sum(values) / len(values)
        fields[name] = f"{average:g}" if isinstance(first, str) else average
    return dspy.Prediction(**fields)


def _answer(prediction: Any) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((str(name), str(value).strip().casefold()) for name, value in prediction.items()))


REDUCERS: dict[str, Callable[[Sequence[Any]], Any]] = {"majority": majority, "mean": mean}
"""How answers become one."""
