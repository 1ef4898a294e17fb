"""A batch of prompts becomes answers: by the cascade loop, by the library's `generate`, or by scoring continuations.

`scheduler` decides which prompts share a batch and which way it takes. Only the thread that holds the model may call
in here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from copa_harness.lm.local.attention import RowGroup
from copa_harness.lm.local.chat_template import ChatTemplate, PromptTokens
from copa_harness.lm.local.decoding import (
    FIRST_ROOM_TOKENS,
    CascadeRun,
    DecodingRules,
    LibraryReader,
    Reader,
    RowChooser,
    RowState,
    RowStopper,
    Suffixes,
    TokenScores,
)
from copa_harness.lm.local.files import LoraFiles
from copa_harness.lm.local.llama import LoraRows, PrefixStates
from copa_harness.lm.local.model import LocalModel
from copa_harness.lm.local.prefix_cache import MIN_PREFIX_TOKENS, PrefixCache, PrefixKey, prefill, spread


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request, ready to generate.

    Attributes:
        tokens: the prompt.
        rules: how to answer.
        lora: the adapter that answers, None for the base model.
        chat: tokens to text.
        eos_ids: tokens that end the answer.
        choices: continuations to score instead of generating, each at least one token.
    """

    tokens: PromptTokens
    rules: DecodingRules
    lora: LoraFiles | None
    chat: ChatTemplate
    eos_ids: frozenset[int]
    choices: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a prompt got: an answer, or the log-probability of each of its choices.

    `n_tokens` counts generated tokens, the end token included, padding never.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    near_tie: bool
    logprobs: tuple[TokenScores, ...] = ()
    choice_scores: tuple[float, ...] = ()

    @property
    def n_tokens(self) -> int:
        """Tokens generated."""
        return len(self.ids)


def lora_key(prompt: Prompt) -> str:
    """Fingerprint of the adapter that answers a prompt, "" for the base model."""
    return prompt.lora.fingerprint if prompt.lora else ""


class BatchExecutor:
    """Answers batches with one model.

    Args:
        model: the model in memory.
        prefixes: states of shared prefixes.
    """

    def __init__(self, model: LocalModel, prefixes: PrefixCache) -> None:
        self.model = model
        self.prefixes = prefixes

    def prefix_key(self, prompt: Prompt) -> PrefixKey:
        """Adapter and tokens of the prefix that a prompt may share; none where sharing is not exact or too short."""
        n_prefix = prompt.tokens.n_prefix
        if n_prefix < MIN_PREFIX_TOKENS or not self.model.shares_prefix:
            n_prefix = 0
        return (lora_key(prompt), prompt.tokens.ids[:n_prefix])

    def family(self, prompt: Prompt) -> str:
        """Prompts of one family may share a batch: all whose adapters the decoder mixes, else those of one adapter."""
        if self.model.decoder is None or (prompt.lora is not None and self.model.fused(prompt.lora) is None):
            return f"one {lora_key(prompt)}"
        return "mixed"

    def by_cascade(self, prompts: Sequence[Prompt], *, is_cancelled: Callable[[int], bool]) -> list[RowState]:
        """Rows of a batch through the cascade loop.

        Args:
            prompts: of one family, those of one adapter side by side.
            is_cancelled: whether nobody waits for row i any more.
        """
        run = self._run(prompts, room=min(max(prompt.rules.max_tokens for prompt in prompts), FIRST_ROOM_TOKENS))
        rows = [RowState(prompt.rules) for prompt in prompts]
        run.decode(rows, RowChooser(rows, dtype=self.model.dtype), _stopper(prompts, rows, is_cancelled))
        return rows

    def read_prefix(self, prompt: Prompt) -> None:
        """Compute and keep the states of a prompt's prefix, for the cascade."""
        self.prefixes.states(self.prefix_key(prompt), self._prefix_reader([prompt]))

    def _prefix_reader(self, prompts: Sequence[Prompt]) -> Callable[[PrefixKey], Any]:
        """What reads the prefixes of a batch."""
        model, decoder = self.model, self.model.decoder
        if decoder is not None and self.family(prompts[0]) == "mixed":
            loras = {lora_key(prompt): model.fused(prompt.lora) for prompt in prompts if prompt.lora}
            return lambda key: decoder.prefill(key[1], loras.get(key[0]))
        module = model.serving(prompts[0].lora)
        return lambda key: prefill(module, key[1], model.new_cache())

    def _run(self, prompts: Sequence[Prompt], *, room: int) -> CascadeRun:
        model = self.model
        reader: Reader
        spans: list[LoraRows] = []
        if model.decoder is not None and self.family(prompts[0]) == "mixed":
            reader = model.decoder
            for i, prompt in enumerate(prompts):
                lora = model.fused(prompt.lora) if prompt.lora else None
                if lora is not None and spans and spans[-1].stop == i and spans[-1].lora is lora:
                    spans[-1] = LoraRows(spans[-1].start, i + 1, lora)
                elif lora is not None:
                    spans.append(LoraRows(i, i + 1, lora))
        else:
            reader = LibraryReader(model.serving(prompts[0].lora))
        suffixes = self._suffixes(prompts, self._prefix_reader(prompts), spans)
        return CascadeRun(reader, suffixes, device=model.device, pad_id=model.pad_id, room=room)

    def _suffixes(
        self, prompts: Sequence[Prompt], read: Callable[[PrefixKey], Any], loras: Sequence[LoraRows]
    ) -> Suffixes:
        """The rows behind their prefixes.

        A prefix is shared if two rows have it, if it is kept already, or if its row is alone: the next may have it too.
        """
        keys = [self.prefix_key(prompt) for prompt in prompts]
        counts = Counter(keys)
        groups: list[RowGroup] = []
        lengths = []
        for i, key in enumerate(keys):
            if i and key == keys[i - 1] and groups[-1].states is not None:
                groups[-1].stop = i + 1
            else:
                is_shared = key[1] and (counts[key] > 1 or len(keys) == 1 or key in self.prefixes)
                states = self.prefixes.states(key, read) if is_shared else None
                groups.append(RowGroup(i, i + 1, states))
            lengths.append(len(key[1]) if groups[-1].states is not None else 0)
        ids = [prompt.tokens.ids[n:] for prompt, n in zip(prompts, lengths, strict=True)]
        return Suffixes(ids, lengths, groups, loras)

    def by_generate(
        self, prompts: Sequence[Prompt], *, is_cancelled: Callable[[int], bool], plain: bool = False
    ) -> list[RowState]:
        """Rows by the library's `generate`; `plain` is its own way, alone and without a prefix of ours."""
        import torch
        import transformers

        model = self.model
        module = model.serving(prompts[0].lora)
        keys = {self.prefix_key(prompt) for prompt in prompts}
        prefix = next(iter(keys)) if len(keys) == 1 and not plain else ("", ())
        n_prefix = len(prefix[1])
        suffixes = [prompt.tokens.ids[n_prefix:] for prompt in prompts]
        width = max(map(len, suffixes))
        ids = [[*prefix[1], *[model.pad_id] * (width - len(suffix)), *suffix] for suffix in suffixes]
        mask = torch.ones(len(ids), n_prefix + width, dtype=torch.long)
        for i, suffix in enumerate(suffixes):
            mask[i, n_prefix : n_prefix + width - len(suffix)] = 0
        shared: dict[str, Any] = {}
        longest = max(prompt.rules.max_tokens for prompt in prompts)
        if n_prefix or (model.pads and model.shares_prefix and not plain):
            empty = model.new_cache()
            states = self.prefixes.states(prefix, lambda key: prefill(module, key[1], empty)) if n_prefix else empty
            if isinstance(states, PrefixStates):
                for i, layer in enumerate(states.layers):
                    empty.update(layer.keys, layer.values, i)
                states = empty
            shared["past_key_values"] = spread(states, len(prompts), width + min(longest, FIRST_ROOM_TOKENS))
        rows = [RowState(prompt.rules) for prompt in prompts]
        chooser = RowChooser(rows, dtype=model.dtype)
        module.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=mask.to(model.device),
            generation_config=transformers.GenerationConfig(
                max_new_tokens=longest, do_sample=False, pad_token_id=model.pad_id, use_cache=True
            ),
            logits_processor=transformers.LogitsProcessorList([chooser]),
            stopping_criteria=transformers.StoppingCriteriaList([_stopper(prompts, rows, is_cancelled)]),
            **shared,
        )
        if not plain and (len(prompts) > 1 or shared):
            chooser.note_near_ties()
        return rows

    def score(self, prompts: Sequence[Prompt]) -> list[list[float]]:
        """Log-probability of every choice of every prompt, through the cascade loop."""
        run = self._run(prompts, room=max(len(choice) for prompt in prompts for choice in prompt.choices))
        return run.score([prompt.choices for prompt in prompts])

    def score_alone(self, prompt: Prompt) -> list[float]:
        """Log-probability of each choice, by a plain forward of prompt and choice."""
        import torch

        module = self.model.serving(prompt.lora)
        scores = []
        for choice in prompt.choices:
            ids = torch.tensor([[*prompt.tokens.ids, *choice]], device=module.device)
            logits = module(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -len(choice) - 1 : -1]
            logprobs = torch.log_softmax(logits.double(), dim=-1)
            scores.append(float(logprobs[range(len(choice)), list(choice)].sum()))
        return scores


def _stopper(prompts: Sequence[Prompt], rows: Sequence[RowState], is_cancelled: Callable[[int], bool]) -> RowStopper:
    return RowStopper(
        rows,
        eos_ids=[prompt.eos_ids for prompt in prompts],
        decoders=[prompt.chat.decode for prompt in prompts],
        is_cancelled=is_cancelled,
    )
