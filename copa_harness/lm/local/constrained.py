"""Constrained answers, the answering side: free fields are generated, listed ones chosen by log-probability.

The answer is written field by field in `dspy.ChatAdapter`'s layout. The headers are given, not generated. A free field
ends where the model begins another header, and takes no more than its share of the tokens that are left. A field with
allowed values gets the one whose text, up to and including the header that follows, has the highest log-probability

    score(c) = sum over tokens of log p(token | prompt, answer so far, tokens before),

the sum lm-evaluation-harness takes for multiple choice (its `acc`; no division by length: the end of the field is
scored too, so a value that begins like a longer one has no advantage). Token boundaries: every candidate is tokenized
as one text with the whole prompt, and what is scored begins at the first token in which any two candidates differ. At a
temperature T > 0 the value is drawn from softmax(score / T). Of a long list, values that cannot win any more are not
scored to their end (see `ChoiceRace`), and have no score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from copa_harness.lm.constrained import OutputField
from copa_harness.lm.local.chat_template import ChatTemplate, PromptTokens
from copa_harness.lm.local.decoding import DecodingRules
from copa_harness.lm.local.executor import Answer

Ask = Callable[[PromptTokens, DecodingRules, tuple[tuple[int, ...], ...]], Answer]
"""Generates after a prompt, or scores the continuations given."""

COMPLETED = "completed"
"""The header that ends an answer."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The value a field got, and (value, log-probability) of every allowed one that was scored, likeliest first."""

    value: str
    scores: tuple[tuple[str, float], ...]

    @property
    def score(self) -> float:
        """Log-probability of the value."""
        return dict(self.scores)[self.value]


@dataclass(frozen=True, slots=True)
class ConstrainedAnswer:
    """An answer in the adapter's layout.

    `n_input` counts the prompt's tokens and the given headers', `n_output` those that were generated or chosen.
    """

    text: str
    choices: tuple[Choice, ...]
    finish_reason: Literal["stop", "length"]
    n_input: int
    n_output: int


def answer_constrained(
    fields: Sequence[OutputField],
    *,
    prompt_text: str,
    prompt: PromptTokens,
    rules: DecodingRules,
    chat: ChatTemplate,
    ask: Ask,
) -> ConstrainedAnswer:
    """Write the fields one after the other.

    Args:
        fields: in order.
        prompt_text: the prompt up to the opening of the assistant's turn.
        prompt: its tokens.
        rules: of the request; `max_tokens` is what all free fields together may take.
        chat: tokenizer and template.
        ask: what generates and scores.
    """
    text, n_output = "", 0
    finish: Literal["stop", "length"] = "stop"
    choices: list[Choice] = []
    n_free = sum(field.choices is None for field in fields)
    followers = [field.name for field in fields[1:]] + [COMPLETED]
    for position, (field, follower) in enumerate(zip(fields, followers, strict=True)):
        text += _header(field.name)
        if field.choices is None:
            left, n_free = (rules.max_tokens - n_output) // n_free, n_free - 1
            if left > 0:
                tokens = _behind(prompt, chat.ids(prompt_text + text))
                free = replace(
                    rules, max_tokens=left, stop=(*rules.stop, "[[ ## "), seed=rules.seed + position, n_logprobs=None
                )
                got = ask(tokens, free, ())
                text, n_output = text + got.text.strip(), n_output + got.n_tokens
            if left <= 0 or got.finish_reason == "length":
                finish = "length"
        else:
            tails = [f"{value}\n\n{_header(follower).rstrip()}" for value in field.choices]
            whole = [chat.ids(prompt_text + text + tail) for tail in tails]
            n_common = _common(whole)
            scored = ask(_behind(prompt, whole[0][:n_common]), rules, tuple(ids[n_common:] for ids in whole))
            choice = _chosen(field.choices, scored.choice_scores, rules=rules, position=position)
            choices.append(choice)
            n_text = len(chat.ids(prompt_text + text))
            text += choice.value
            n_output += max(1, len(chat.ids(prompt_text + text)) - n_text)
        text += "\n\n"
    text += _header(COMPLETED)
    n_all = len(chat.ids(prompt_text + text))
    n_output = min(max(n_output, 1), rules.max_tokens)
    return ConstrainedAnswer(text, tuple(choices), finish, max(n_all - n_output, len(prompt.ids)), n_output)


def _chosen(values: Sequence[str], scores: Sequence[float], *, rules: DecodingRules, position: int) -> Choice:
    scored = [(value, score) for value, score in zip(values, scores, strict=True) if score > -math.inf]
    ranked = tuple(sorted(scored, key=lambda pair: -pair[1]))
    if rules.temperature <= 0:
        return Choice(ranked[0][0], ranked)
    weights = [math.exp((score - ranked[0][1]) / rules.temperature) for _, score in ranked]
    drawn = np.random.default_rng([rules.seed, position]).random() * sum(weights)
    place = int(np.searchsorted(np.cumsum(weights), drawn, side="right"))
    return Choice(ranked[min(place, len(ranked) - 1)][0], ranked)


def _header(name: str) -> str:
    return f"[[ ## {name} ## ]]\n"


def _common(whole: Sequence[Sequence[int]]) -> int:
    """Tokens that all have in common at the beginning; at least one is left of each."""
    limit = min(map(len, whole)) - 1
    return next((n for n in range(limit) if len({ids[n] for ids in whole}) > 1), limit)


def _behind(prompt: PromptTokens, ids: tuple[int, ...]) -> PromptTokens:
    """A longer prompt that shares the prompt's prefix as far as it still tokenizes alike."""
    limit = min(prompt.n_prefix, len(ids) - 1)
    return PromptTokens(ids, next((n for n in range(limit) if ids[n] != prompt.ids[n]), limit))
