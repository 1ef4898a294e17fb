"""Head-room: whether what a study can choose from could improve on the incumbent at all, judged from a few looks.

No combination of the options looked at is better on an example than the best of them. So if none of a fair number of
candidates gets a single example right that the incumbent gets wrong, there is nothing in sight to be gained: more calls
would buy more ties. One example won is head-room; the study then goes on, since who wins one may win others.

Only looks at examples the incumbent does not already get fully right can show a gain, and a candidate dropped after an
easy block gave none. By the rule of three, no gain in 60 such looks says with 95 % confidence that fewer than one look
in twenty would have shown one. Knows scores by example; knows nothing of candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

from copa_harness.optimize.sheets import Sheet

MIN_CANDIDATES = 8
"""Fewer candidates say too little about the options."""

MIN_LOOKS = 60
"""Scores of other candidates on examples that could be gained; fewer prove nothing."""


def gained_examples(incumbent: Sheet, others: Sequence[Sheet]) -> int:
    """On how many examples at least one of the others scores higher than the incumbent."""
    gained = 0
    for i, mine in enumerate(incumbent):
        theirs = [score for sheet in others if i < len(sheet) and (score := sheet[i]) is not None]
        gained += mine is not None and max(theirs, default=0.0) > mine
    return gained


def looks(incumbent: Sheet, others: Sequence[Sheet]) -> int:
    """How many scores of the others could have shown a gain: those on examples the incumbent lacks full marks on."""
    return sum(
        mine is not None and mine < 1.0 and theirs is not None
        for sheet in others
        for mine, theirs in zip(incumbent, sheet, strict=False)
    )


def has_headroom(incumbent: Sheet, others: Sequence[Sheet]) -> bool:
    """Whether going on can pay: too few candidates or looks to tell, or some example on which one of them does better.

    Args:
        incumbent: The incumbent's full scores, the incumbent being the best found so far.
        others: What the candidates scored, the incumbent's own sheet among them or not.
    """
    tried = sum(any(score is not None for score in sheet) for sheet in others)
    if tried < MIN_CANDIDATES or looks(incumbent, others) < MIN_LOOKS:
        return True
    return gained_examples(incumbent, others) > 0
