"""Hard limits on what an optimization may return: prompt length, words, dollars and seconds per answer.

    COPA(..., constraints={"max_prompt_tokens": 800, "forbidden_text": ["internal"], "required_text": ["Be polite."]})

Text is checked before a candidate costs a call; tokens, dollars and seconds on the validation examples, after every
block. A candidate that breaks a limit is never returned, however good: when nothing keeps them all, that is an error.
Required sentences are appended to every instruction that lacks them. What validation cannot show (a longer input
tomorrow) is not promised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from copa_harness.evaluate.examples import plain
from copa_harness.optimize.options import parse_limits
from copa_harness.optimize.propose.instructions import joined
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.scoring import AnswerCost


@dataclass(frozen=True, slots=True)
class Constraints:
    """The limits; None or empty for none.

    Attributes:
        max_prompt_tokens: Tokens of the longest prompt of any call on the validation examples.
        forbidden_text: Texts that stand in no instruction and no demonstration, letter case ignored.
        required_text: Texts that stand in the instruction of every predictor, word for word.
        max_usd_per_answer: Mean dollars per answer.
        max_seconds_per_answer: Mean seconds of model calls per answer, as measured when the answers were bought.
    """

    max_prompt_tokens: int | None = None
    forbidden_text: tuple[str, ...] = ()
    required_text: tuple[str, ...] = ()
    max_usd_per_answer: float | None = None
    max_seconds_per_answer: float | None = None

    @property
    def any(self) -> bool:
        """Whether there is a limit at all."""
        return self != Constraints()

    @property
    def measured(self) -> bool:
        """Whether a limit needs the cost of answers."""
        return not (self.max_prompt_tokens is self.max_usd_per_answer is self.max_seconds_per_answer is None)

    def completed(self, instruction: str) -> str:
        """The instruction with the required texts it lacks."""
        for text in self.required_text:
            if text not in instruction:
                instruction = joined(instruction, text)
        return instruction

    def completed_candidate(self, candidate: Candidate) -> Candidate:
        """The candidate with every instruction completed."""
        return candidate.with_instructions({p.predictor: self.completed(p.instruction) for p in candidate.parts})

    def repaired(self, candidate: Candidate) -> Candidate:
        """The candidate with every instruction completed, without demonstrations that hold a forbidden text."""
        if not self.any:
            return candidate
        kept = {p.predictor: tuple(demo for demo in p.demos if self.allows(demo)) for p in candidate.parts}
        return self.completed_candidate(candidate.with_demos(kept))

    def allows(self, demo: Any) -> bool:
        """Whether an example or demonstration holds no forbidden text."""
        said = [str(plain(value)).casefold() for value in dict(demo).values()]
        return not any(text.casefold() in one for text in self.forbidden_text for one in said)

    def allowed_examples(self, examples: Sequence[Any]) -> Sequence[Any]:
        """The examples that may be shown; all of them when none may, so that what shows none can still learn."""
        return [example for example in examples if self.allows(example)] or examples

    def broken_by_text(self, candidate: Candidate) -> str | None:
        """Which limit on words a candidate breaks, or None."""
        for part in candidate.parts:
            for text in self.required_text:
                if text not in part.instruction:
                    return f"the instruction of {part.predictor} lacks the required text {text!r}"
            said = [part.instruction, *(str(plain(v)) for demo in part.demos for v in dict(demo).values())]
            for text in self.forbidden_text:
                if any(text.casefold() in one.casefold() for one in said):
                    return f"the prompt of {part.predictor} contains the forbidden text {text!r}"
        return None

    def broken_by_cost(self, cost: AnswerCost) -> str | None:
        """Which limit on tokens, dollars or seconds answers of this cost break, or None (also before any answer)."""
        if cost.n_answers == 0:
            return None
        for limit, value, what in (
            (self.max_prompt_tokens, cost.longest_prompt, "prompt tokens"),
            (self.max_usd_per_answer, cost.per_answer("usd"), "dollars per answer"),
            (self.max_seconds_per_answer, cost.per_answer("seconds"), "seconds per answer"),
        ):
            if limit is None:
                continue
            if value is None:
                return f"{what} are unknown for this model, so the limit of {limit:g} cannot be kept"
            if value > limit:
                return f"{value:g} {what}, more than {limit:g}"
        return None

    def broken_by(self, candidate: Candidate, cost: AnswerCost) -> str | None:
        """Which limit is broken, by the words or by the cost so far; None when all are kept."""
        return self.broken_by_text(candidate) or self.broken_by_cost(cost)


def parse_constraints(given: Mapping[str, Any] | Constraints | None) -> Constraints:
    """Checked constraints.

    Raises:
        ConfigurationError: An unknown name or an impossible value.
    """
    if given is None:
        return Constraints()
    return given if isinstance(given, Constraints) else Constraints(**parse_limits(given))
