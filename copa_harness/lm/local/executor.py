"""Prompts become answers: as rows of a cascade run, by the library's `generate`, or by scoring continuations.

`scheduler` decides which prompts go together and which way they take. Only the thread that holds the model may call in
here.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from copa_harness.lm.local.chat_template import ChatTemplate, PromptTokens
from copa_harness.lm.local.decoding import (
    FIRST_ROOM_TOKENS,
    NEAR_TIE,
    CascadeRun,
    ChoiceRace,
    DecodingRules,
    Guesses,
    LibraryReader,
    Reader,
    Row,
    RowChooser,
    RowState,
    RowStopper,
    TokenScores,
)
from copa_harness.lm.local.files import LoraFiles
from copa_harness.lm.local.llama import PrefixStates
from copa_harness.lm.local.memory import free_bytes
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

    `n_tokens` counts generated tokens, the end token included, padding never. A choice that fell behind before it was
    read to its end has minus infinity.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]
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

    def new_run(self, prompt: Prompt) -> CascadeRun:
        """An empty run for prompts of this one's family."""
        model, reader = self.model, self._reader(prompt)
        return CascadeRun(
            reader,
            device=model.device,
            pad_id=model.pad_id,
            tie=NEAR_TIE.get(model.dtype, 0.0),
            limits=model.footprint.limits(free_bytes(model.device)),
        )

    def rows(self, prompts: Sequence[Prompt], *, is_cancelled: Callable[[int], bool]) -> list[Row]:
        """Prompts of one family as rows of a run, each behind the states of the prefix it shares.

        A prefix is shared if two rows have it, if it is kept already, or if its row is alone: the next may have it too.

        Args:
            prompts: of one family.
            is_cancelled: whether nobody waits for prompt i any more.
        """
        read = self._prefix_reader(prompts)
        keys = [self.prefix_key(prompt) for prompt in prompts]
        counts = Counter(keys)
        is_mixed = self._is_mixed(prompts[0])
        rows = []
        for i, (prompt, key) in enumerate(zip(prompts, keys, strict=True)):
            is_shared = bool(key[1]) and (counts[key] > 1 or len(keys) == 1 or key in self.prefixes)
            n_shared = len(key[1]) if is_shared else 0
            rows.append(
                Row(
                    prompt.tokens.ids[n_shared:],
                    n_shared=n_shared,
                    shared=(self.prefixes.states(key, read),) if is_shared else (),
                    lora=self.model.fused(prompt.lora) if is_mixed and prompt.lora else None,
                    state=new_state(prompt, is_cancelled=partial(is_cancelled, i)),
                    guesses=Guesses(prompt.tokens.ids),
                )
            )
        return rows

    def look_again(self, prompt: Prompt, row: Row) -> Any:
        """Logits [V] of a row's next token, by a plain forward of the library: the row alone, behind its prefix."""
        import torch

        model = self.model
        module = model.serving(prompt.lora)
        cache = self._as_library_cache(row.shared[0]) if row.shared else None
        ids = torch.tensor([[*row.ids, *row.state.ids]], device=model.device)
        mask = torch.ones(1, row.n_shared + ids.shape[1], dtype=torch.long, device=model.device)
        shared = {"past_key_values": cache} if cache is not None else {}
        return module(ids, attention_mask=mask, use_cache=cache is not None, logits_to_keep=1, **shared).logits[0, -1]

    def _as_library_cache(self, states: Any) -> Any:
        """States of a prefix in a cache of the library's own kind, which may be filled further."""
        cache = self.model.new_cache()
        for i, layer in enumerate(states.layers):
            cache.update(layer.keys, layer.values, i)
        return cache

    def _is_mixed(self, prompt: Prompt) -> bool:
        return self.family(prompt) == "mixed"

    def _reader(self, prompt: Prompt) -> Reader:
        model = self.model
        if model.decoder is not None and self._is_mixed(prompt):
            return model.decoder
        return LibraryReader(model.serving(prompt.lora), lambda: model.serving(prompt.lora))

    def _prefix_reader(self, prompts: Sequence[Prompt]) -> Callable[[PrefixKey], Any]:
        """What reads the prefixes of a batch."""
        model, decoder = self.model, self.model.decoder
        if decoder is not None and self._is_mixed(prompts[0]):
            loras = {lora_key(prompt): model.fused(prompt.lora) for prompt in prompts if prompt.lora}
            return lambda key: decoder.prefill(key[1], loras.get(key[0]))
        module = model.serving(prompts[0].lora)
        return lambda key: prefill(module, key[1], model.new_cache())

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
                states = self._as_library_cache(states)
            shared["past_key_values"] = spread(states, len(prompts), width + min(longest, FIRST_ROOM_TOKENS))
        rows = [new_state(prompt, is_cancelled=partial(is_cancelled, i)) for i, prompt in enumerate(prompts)]
        chooser = RowChooser(rows, dtype=model.dtype)
        module.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=mask.to(model.device),
            generation_config=transformers.GenerationConfig(
                max_new_tokens=longest, do_sample=False, pad_token_id=model.pad_id, use_cache=True
            ),
            logits_processor=transformers.LogitsProcessorList([chooser]),
            stopping_criteria=transformers.StoppingCriteriaList([RowStopper(rows)]),
            **shared,
        )
        if not plain and (len(prompts) > 1 or shared):
            chooser.note_near_ties()
        return rows

    def score(self, prompts: Sequence[Prompt]) -> list[list[float]]:
        """Log-probability of every choice of every prompt, through the cascade; see `ChoiceRace` for those dropped."""
        run, rows = self.new_run(prompts[0]), self.rows(prompts, is_cancelled=lambda i: False)
        run.add(rows, room=1)
        scores = run.score({row: prompt.choices for row, prompt in zip(rows, prompts, strict=True)})
        return [scores[row] for row in rows]

    def score_alone(self, prompt: Prompt) -> list[float]:
        """The same for one prompt, by plain forwards of prompt and choice."""
        module, ids = self.model.serving(prompt.lora), prompt.tokens.ids
        first = _last_logprobs(module, ids, 1)[0]
        race = ChoiceRace(prompt.choices, first, rules=prompt.rules)
        for same in race.branches(range(len(prompt.choices))):
            for k in same:
                if race.can_win(k):
                    head, *tail = prompt.choices[k]
                    logprobs = _last_logprobs(module, [*ids, head, *tail[:-1]], len(tail))
                    race.add(k, float(logprobs[range(len(tail)), tail].sum()), n_tokens=len(tail))
        return race.scores


def _last_logprobs(module: Any, ids: Sequence[int], n: int) -> Any:
    """Log-probabilities behind each of the last `n` tokens, [n, V] in float64, by a plain forward of a model."""
    import torch

    tokens = torch.tensor([list(ids)], device=module.device)
    takes_fewer = "logits_to_keep" in inspect.signature(module.forward).parameters
    fewer = {"logits_to_keep": n} if takes_fewer else {}
    logits = module(tokens, attention_mask=torch.ones_like(tokens), use_cache=False, **fewer).logits[0, -n:]
    return torch.log_softmax(logits.double(), dim=-1)


def new_state(prompt: Prompt, *, is_cancelled: Callable[[], bool]) -> RowState:
    """How a prompt's answer decodes, from its first token on."""
    return RowState(prompt.rules, eos_ids=prompt.eos_ids, decode=prompt.chat.decode, is_cancelled=is_cancelled)
