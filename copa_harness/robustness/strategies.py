"""Hypothesis strategies over perturbations: what a program might meet, and the smallest change that breaks it.

    @given(changed_examples(row, "typos", "white_space"))
    def test_slips_do_not_matter(changed):
        assert program(**changed.inputs()).answer == row.answer

Hypothesis draws which steps are made and shrinks towards none of them, so what it reports is the smallest change that
still fails. `smallest` does the same for a change that is known to fail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from copa_harness.robustness.perturbations import (
    Step,
    changed_example,
    changed_program,
    check_names,
    steps_in_example,
    steps_in_program,
)

if TYPE_CHECKING:
    import dspy

MAX_TRIES = 40
"""Subsets of a change that are tried while it is shrunk; each costs an answer."""

_MADE = (False, *[True] * 9)
"""Nine in ten steps are made, so that few draws are needed to fail again; Hypothesis shrinks towards the first."""


def subsets(steps: Sequence[Step]) -> Any:
    """Most of the steps, in their order."""
    return st.tuples(*[st.sampled_from(_MADE) for _ in steps]).map(
        lambda made: tuple(step for step, is_made in zip(steps, made, strict=True) if is_made)
    )


def changed_examples(example: dspy.Example, *names: str) -> Any:
    """The example as the perturbations change it, in every way they have."""
    check_names(names)
    return _steps(names, lambda name, seed: steps_in_example(name, example, seed)).map(
        lambda steps: changed_example(example, steps)
    )


def changed_programs(program: dspy.Module, *names: str) -> Any:
    """The program as the perturbations change its prompts, in every way they have; its own copy each time."""
    check_names(names)
    return _steps(names, lambda name, seed: steps_in_program(name, program, seed)).map(
        lambda steps: changed_program(program, steps)
    )


def _steps(names: Sequence[str], steps_of: Callable[[str, int], tuple[Step, ...]]) -> Any:
    return st.tuples(st.sampled_from(names), st.integers(0, 2**16)).flatmap(lambda one: subsets(steps_of(*one)))


def smallest(
    steps: Sequence[Step], is_broken: Callable[[tuple[Step, ...]], bool], *, seed: int, max_tries: int = MAX_TRIES
) -> tuple[Step, ...]:
    """The smallest part of a change that still breaks what it broke, as far as so many tries find one.

    Args:
        steps: A change that is known to break it.
        is_broken: Whether some of the steps do; asked once for each subset, never for none or all of them.
        seed: Of Hypothesis's draws.
        max_tries: How often it may be asked.
    """
    whole = tuple(steps)
    known: dict[tuple[Step, ...], bool] = {(): False, whole: True}

    def fails(part: tuple[Step, ...]) -> bool:
        if part not in known:
            if len(known) - 2 >= max_tries:
                return False
            known[part] = is_broken(part)
        return known[part]

    quiet = settings(
        database=None,
        deadline=None,
        max_examples=10 * max_tries,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    try:
        found: tuple[Step, ...] = find(subsets(whole), fails, settings=quiet, random=Random(seed))
    except NoSuchExample:
        return whole
    return found
