"""Training rows as tokens: the very prompt tokens of inference, and which positions to learn.

Knows nothing of weights, batches or files; needs a tokenizer and its chat template only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from copa_harness.errors import TrainingError
from copa_harness.tune.rows import TrainingRow

if TYPE_CHECKING:
    from copa_harness.lm.local_chat import ChatFormat


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """Token ids of a row. Loss falls on those from `n_prompt` on and on the positions `also` (in demonstrations).

    For `variant` see `TrainingRow`.
    """

    ids: tuple[int, ...]
    n_prompt: int
    variant: int = 0
    also: tuple[int, ...] = ()

    @property
    def targets(self) -> tuple[int, ...]:
        """Positions of the tokens to learn; the first is at least 1."""
        return (*self.also, *range(self.n_prompt, len(self.ids)))


def encode_row(
    chat: ChatFormat, row: TrainingRow, *, eos_ids: frozenset[int], learn_from_demos: bool = False
) -> EncodedRow:
    """A row as tokens: the very prompt tokens of inference, then the answer's up to and with its end token.

    Prompt and answer are tokenized apart, as they are at inference, where the answer follows the given prompt tokens.

    Raises:
        TrainingError: the chat template writes a finished conversation differently from the prompt it began with.
    """
    prompt = chat.text(row.prompt, answer_next=True)
    whole = chat.text(row.messages, answer_next=False)
    if not whole.startswith(prompt):
        at = next(
            (i for i, (a, b) in enumerate(zip(whole, prompt, strict=False)) if a != b), min(len(whole), len(prompt))
        )
        raise TrainingError(
            f"the chat template of {chat.name} writes the finished conversation differently from the prompt, from "
            f"character {at} on: {whole[at : at + 40]!r} instead of {prompt[at : at + 40]!r}; training on it would "
            "teach prompts that are never served; remedy: give a template without such rules, "
            "TransformersEngine(..., chat_template=...)"
        )
    prompt_ids, answer_ids = chat.ids(prompt), list(chat.ids(whole[len(prompt) :]))
    end = next((i for i, token in enumerate(answer_ids) if token in eos_ids), None)
    # What a template writes after the end token (often a newline) is never generated.
    answer_ids = answer_ids[: end + 1] if end is not None else [*answer_ids, *sorted(eos_ids)[:1]]
    also = _demo_targets(chat, row, prompt, prompt_ids, eos_ids=eos_ids) if learn_from_demos else ()
    return EncodedRow((*prompt_ids, *answer_ids), len(prompt_ids), row.variant, also)


def _demo_targets(
    chat: ChatFormat, row: TrainingRow, prompt: str, prompt_ids: Sequence[int], *, eos_ids: frozenset[int]
) -> tuple[int, ...]:
    """Positions of the demonstrations' answers (end tokens included) in the prompt's tokens."""
    offsets = chat.offsets(prompt)
    targets: list[int] = []
    for i, message in enumerate(row.prompt):
        # DSPy shows demonstrations with missing fields too; their placeholder is nothing to learn.
        if message["role"] != "assistant" or "Not supplied for this particular" in message["content"]:
            continue
        before = chat.text(row.messages[:i], answer_next=True)
        if not prompt.startswith(before):
            continue  # this template writes earlier turns differently from the one being answered
        # Templates may trim what is said, or open an earlier turn with less than they open the answer with.
        said = message["content"] if prompt.startswith(message["content"], len(before)) else message["content"].strip()
        start = prompt.find(said, len(before)) if said else -1
        if start < 0 or prompt[len(before) : start].strip():
            continue
        end = start + len(said)
        own = [position for position, (first, last) in enumerate(offsets) if len(before) <= first and last <= end]
        following = own[-1] + 1 if own else 0
        if own and following < len(prompt_ids) and prompt_ids[following] in eos_ids:
            own.append(following)
        targets += [position for position in own if position]
    return tuple(targets)
