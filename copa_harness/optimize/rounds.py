"""Rounds: studies in a row, each with fresh proposals made in the light of the ones before.

Nothing can be learned about proposals before some were tried, and no demonstration set can be varied before one has
proven itself; so a prompt step proposes more than once. Scores are kept between rounds, so a point that comes again
costs nothing. Knows runs and spaces; knows nothing of strategies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from copa_harness.optimize.allowance import Allowance
from copa_harness.optimize.demos import DemoSet
from copa_harness.optimize.instructions import InstructionOption
from copa_harness.optimize.space import Point, Space, WeightsLevel
from copa_harness.optimize.trials import PERFECT
from copa_harness.results import Phase

if TYPE_CHECKING:
    from copa_harness.optimize.run import Run

MIN_FULL_SCORES = 3
"""Full scores a round must be able to pay for: less teaches nothing that the next round could use."""

InstructionSets = Mapping[str, Sequence[InstructionOption]]
DemoSets = Mapping[str, Sequence[DemoSet]]


def search_in_rounds(
    run: Run,
    allowance: Allowance,
    *,
    name: str,
    levels: Sequence[WeightsLevel],
    first_starts: Callable[[InstructionSets, DemoSets], Sequence[Point]],
) -> None:
    """Search instructions, demonstrations and weights in `n_rounds` studies.

    Every round may use half of what is left, the last one all of it; a round whose half does not pay for
    `MIN_FULL_SCORES` is the last.

    Args:
        run: Proposes, searches and adopts.
        allowance: Calls of all rounds together.
        name: Of the first study; later ones are numbered.
        levels: Weights beside the incumbent's.
        first_starts: Points the first study begins with, from its proposals.
    """
    n_rounds = run.settings.proposals.n_rounds
    for number in range(1, n_rounds + 1):
        cost = run.full_score_cost
        if run.score >= PERFECT or (number > 1 and not allowance.can_afford(cost)):
            return
        half = run.fraction(allowance, 1 / 2)
        share = half if number < n_rounds and half.can_afford(MIN_FULL_SCORES * cost) else allowance
        demos = run.demo_options(share)
        instructions = run.instruction_options(share)
        starts = first_starts(instructions, demos) if number == 1 else _fresh_starts(instructions, demos)
        space = Space.around(run.incumbent, weights=levels, instructions=instructions, demos=demos)
        title = name if number == 1 else f"{name}, round {number}"
        if run.search(space, share, phase=Phase.SEARCH, name=title, starts=starts) == "no head-room":
            return


def instruction_starts(instructions: InstructionSets) -> list[Point]:
    """Every instruction once, all predictors alike."""
    longest = max(len(options) for options in instructions.values())
    return [
        {f"{name}.instruction": options[min(i, len(options) - 1)].name for name, options in instructions.items()}
        for i in range(longest)
    ]


def _fresh_starts(instructions: InstructionSets, demos: DemoSets) -> list[Point]:
    """Every fresh set with the incumbent's instruction, then every instruction with the incumbent's demonstrations."""
    longest = max((len(sets) for sets in demos.values()), default=0)
    shown = [
        {f"{name}.demos": sets[min(i, len(sets) - 1)].name for name, sets in demos.items()} for i in range(longest)
    ]
    return [*shown, *instruction_starts(instructions)]
