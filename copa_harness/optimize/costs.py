"""What a program's answers cost: prompt tokens, output tokens, dollars and seconds per answer.

Measured on the validation examples while they are scored, from what was stored with every answer when it was bought; a
replayed run sees the same numbers. An answer may take several calls (stages, retries); all of them count. Seconds are
those of the calls one after another, as they were when bought. Knows calls; knows nothing of programs or scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from copa_harness.lm.observing import Observed


@dataclass(frozen=True, slots=True)
class AnswerCost:
    """The cost of so many answers.

    Attributes:
        n_answers: Examples answered.
        longest_prompt: Tokens of the longest prompt of any call; None when a call's are unknown.
        prompt_tokens: Prompt tokens of all calls, None when unknown.
        output_tokens: Answer tokens of all calls, None when unknown.
        usd: Dollars of all calls, None when a price is unknown.
        seconds: Seconds of all calls, None when unknown.
    """

    n_answers: int = 0
    longest_prompt: int | None = 0
    prompt_tokens: int | None = 0
    output_tokens: int | None = 0
    usd: float | None = 0.0
    seconds: float | None = 0.0

    def plus(self, calls: Sequence[Observed], *, n_answers: int) -> AnswerCost:
        """With the calls of further answers."""
        inputs = [call.input_tokens for call in calls]
        longest = None if self.longest_prompt is None or None in inputs else self.longest_prompt
        if longest is not None:
            longest = max([longest, *(one for one in inputs if one is not None)])
        return AnswerCost(
            n_answers=self.n_answers + n_answers,
            longest_prompt=longest,
            prompt_tokens=_whole(_sum(self.prompt_tokens, inputs)),
            output_tokens=_whole(_sum(self.output_tokens, [call.output_tokens for call in calls])),
            usd=_sum(self.usd, [call.usd for call in calls]),
            seconds=_sum(self.seconds, [call.seconds for call in calls]),
        )

    def per_answer(self, what: str) -> float | None:
        """Mean per answer of "prompt_tokens", "output_tokens", "tokens" (both), "usd" or "seconds"; None if unknown."""
        if what == "tokens":
            inputs, outputs = self.per_answer("prompt_tokens"), self.per_answer("output_tokens")
            return None if inputs is None or outputs is None else inputs + outputs
        total = getattr(self, what)
        return None if total is None or self.n_answers == 0 else total / self.n_answers


def _sum(start: float | None, values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return None if start is None or len(known) < len(values) else start + sum(known)


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
