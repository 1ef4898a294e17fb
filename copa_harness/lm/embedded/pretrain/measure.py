"""Measures a small local model on classification programs: zero-shot, with demonstrations, with LoRA, with both.

A program here is a ``dspy.Predict`` signature; prompts and parsing are ``dspy.ChatAdapter``'s own, decoding is greedy.
A few lines of transformers and peft on purpose, instead of this package's engine and trainer: it judges the model that
those are then tested on.
"""

from __future__ import annotations

import copy
import random
import warnings
from dataclasses import dataclass
from typing import Any, cast

import dspy
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class MeasuredTask:
    """A DSPy signature with rows of its fields.

    Attributes:
        name: For tables.
        program: The signature.
        train, test: Rows, inputs and outputs together.
        rule: A rule in words that a reader of instructions can follow, "" for none.
        ruled: What it answers on the test rows.
    """

    name: str
    program: type[dspy.Signature]
    train: list[Record]
    test: list[Record]
    rule: str = ""
    ruled: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Settings of one short LoRA training; ``n_demos`` are resampled for every row and epoch."""

    epochs: int
    learning_rate: float
    batch_size: int
    n_demos: int
    rank: int = 16


class MeasuredModel:
    """A causal LM with its tokenizer, asked through ``dspy.ChatAdapter``."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._adapter = dspy.ChatAdapter()

    def prompt_ids(self, program: type[dspy.Signature], demos: list[Record], example: Record) -> list[int]:
        """Tokens of the whole prompt up to the assistant's turn."""
        inputs = {name: example[name] for name in program.input_fields}
        messages = self._adapter.format(program, demos, inputs)
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return cast("list[int]", self.tokenizer(text, add_special_tokens=False).input_ids)

    def outputs(
        self, program: type[dspy.Signature], demos: list[Record], examples: list[Record]
    ) -> list[Record | None]:
        """The parsed output fields of every answer, None where the text does not parse."""
        prompts = [self.prompt_ids(program, demos, example) for example in examples]
        return [self._parsed(program, text) for text in self.generate(prompts)]

    def answers(self, program: type[dspy.Signature], demos: list[Record], examples: list[Record]) -> list[str | None]:
        """The last output field as text, None where the answer does not parse."""
        last = list(program.output_fields)[-1]
        found = self.outputs(program, demos, examples)
        return [None if values is None else _printed(values[last]) for values in found]

    def accuracy(
        self, program: type[dspy.Signature], demos: list[Record], examples: list[Record]
    ) -> tuple[float, float]:
        """Share of examples with every output field right, and share of answers that do not parse."""
        found = self.outputs(program, demos, examples)
        right = [
            values is not None and all(_printed(values[name]) == _printed(example[name]) for name in values)
            for values, example in zip(found, examples, strict=True)
        ]
        return float(np.mean(right)), float(np.mean([values is None for values in found]))

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], *, max_new_tokens: int = 64) -> list[str]:
        """Greedy continuations, one batch padded on the left."""
        batch = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        written = self.model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        answers = written[:, batch["input_ids"].shape[1] :]
        return cast("list[str]", self.tokenizer.batch_decode(answers, skip_special_tokens=True))

    def answer_text(self, program: type[dspy.Signature], example: Record) -> str:
        """The assistant's message for an example, as DSPy writes it in a demonstration."""
        known = {name: example[name] for name in program.output_fields}
        return str(self._adapter.format_assistant_message_content(program, known))

    def _parsed(self, program: type[dspy.Signature], text: str) -> Record | None:
        try:
            return dict(self._adapter.parse(program, text))
        except dspy.utils.exceptions.AdapterParseError:
            return None


def _printed(value: Any) -> str:
    return str(value).strip()


def best_demos(
    model: MeasuredModel,
    program: type[dspy.Signature],
    pool: list[Record],
    validation: list[Record],
    *,
    n_demos: int,
    n_sets: int,
    seed: int,
) -> list[Record]:
    """The best of ``n_sets`` random demonstration sets by accuracy on ``validation`` (the first of equals)."""
    rng = random.Random(seed)
    sets = [rng.sample(pool, min(n_demos, len(pool))) for _ in range(n_sets)]
    scores = [model.accuracy(program, demos, validation)[0] for demos in sets]
    return sets[int(np.argmax(scores))]


def with_lora(
    model: MeasuredModel, program: type[dspy.Signature], train: list[Record], settings: LoraSettings, *, seed: int
) -> MeasuredModel:
    """A copy of the model with a LoRA adapter trained on the rows' answers (loss on assistant tokens only)."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    rng = random.Random(seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(copy.deepcopy(model.model), config)
    tuned.train()
    decoder, head = tuned.get_base_model().model, tuned.get_base_model().lm_head
    parameters = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.01)
    n_batches = -(-len(train) // settings.batch_size)
    total, step = settings.epochs * n_batches, 0
    pad = int(model.tokenizer.pad_token_id)
    for _ in range(settings.epochs):
        order = rng.sample(range(len(train)), len(train))
        for start in range(0, len(order), settings.batch_size):
            rows, answers = [], []
            for i in order[start : start + settings.batch_size]:
                others = [row for j, row in enumerate(train) if j != i]
                demos = rng.sample(others, min(settings.n_demos, len(others)))
                text = model.answer_text(program, train[i]) + "<|end|>"
                answers.append(model.tokenizer(text, add_special_tokens=False).input_ids)
                rows.append(model.prompt_ids(program, demos, train[i]) + answers[-1])
            # padded on the right and without a mask: causal attention never sees the padding, and stays fast
            width = max(map(len, rows))
            ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
            spans = [(len(row) - len(answer), len(row)) for row, answer in zip(rows, answers, strict=True)]
            row_index = torch.tensor([i for i, (low, high) in enumerate(spans) for _ in range(low, high)])
            places = torch.tensor([place for low, high in spans for place in range(low, high)])
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * min(1.0, (step + 1) / 5) * (1 - step / total)
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state[row_index, places - 1]
            loss = torch.nn.functional.cross_entropy(head(hidden), ids[row_index, places])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    return MeasuredModel(tuned.eval(), model.tokenizer)


def load_model(folder: Any) -> MeasuredModel:
    """The exported model in a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return MeasuredModel(model.eval(), AutoTokenizer.from_pretrained(folder))
