"""Batches of prompts through the library's `generate`: which may go together, the prefix they share, near-ties.

One `BatchGenerator` per model in memory, whatever the number of engines. A batch is [shared prefix | padding | own
suffix] with the prefix's states computed once. Knows nothing of DSPy, files or names.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from copa_harness.errors import ProviderError
from copa_harness.lm.local_batching import Batcher
from copa_harness.lm.local_batching import Job as BatchJob
from copa_harness.lm.local_chat import ChatFormat, PromptTokens
from copa_harness.lm.local_decoding import DecodingRules, RowChooser, RowState, RowStopper
from copa_harness.lm.local_lora import LoraFiles
from copa_harness.lm.local_model import LocalModel
from copa_harness.lm.local_prefix import MIN_PREFIX_TOKENS, PrefixCache, PrefixKey, spread

logger = logging.getLogger(__name__)

BATCH_LIMIT_BYTES = 2 << 30
"""Ceiling on the key-value states of one batch."""
FIRST_ROOM_TOKENS = 64
"""Room for new tokens a batch starts with; grows when answers are longer."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request, ready to generate. `eos_ids` end the answer; `max_batch` bounds the batch it may be in."""

    tokens: PromptTokens
    rules: DecodingRules
    lora: LoraFiles | None
    chat: ChatFormat
    eos_ids: frozenset[int]
    max_batch: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What a prompt got. `n_tokens` counts generated tokens, the end token included, padding never."""

    ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    near_tie: bool

    @property
    def n_tokens(self) -> int:
        """Tokens generated."""
        return len(self.ids)


Job = BatchJob[Prompt, Answer]

_generators: dict[tuple[Path, str, str], tuple[str, BatchGenerator]] = {}
_generators_lock = threading.Lock()


def load_generator(directory: Path, *, device: str | None, dtype: str, fingerprint: str) -> BatchGenerator:
    """The process's one generator for this folder, device and dtype; the first call loads the weights.

    Other weights at the same place have another fingerprint and are loaded anew; nobody is given the old ones.
    """
    with _generators_lock:
        key = (directory, device or "auto", dtype)
        loaded, generator = _generators.get(key, ("", None))
        if generator is None or loaded != fingerprint:
            generator = BatchGenerator(LocalModel(directory, device=device, dtype=dtype))
            _generators[key] = (fingerprint, generator)
        return generator


class BatchGenerator:
    """Generates answers for prompts from any number of threads, in batches, on one worker thread.

    Attributes:
        model: the model in memory.
        prefixes: states of shared prefixes.
        n_batches, n_rows, n_near_ties: counters since loading.
    """

    def __init__(self, model: LocalModel) -> None:
        self.model = model
        self.prefixes = PrefixCache()
        self.n_batches = self.n_rows = self.n_near_ties = 0
        self._batcher: Batcher[Prompt, Answer] = Batcher(self._choose, self._run)

    def arriving(self) -> AbstractContextManager[None]:
        """Announces a prompt in preparation; see `Batcher.arriving`."""
        return self._batcher.arriving()

    def submit(self, prompt: Prompt) -> Job:
        """Queue a prompt."""
        return self._batcher.submit(prompt)

    def wait(self, job: Job) -> Answer:
        """The answer of a queued prompt; an interrupted caller abandons it."""
        return self._batcher.wait(job)

    def _prefix_key(self, prompt: Prompt) -> PrefixKey:
        n_prefix = prompt.tokens.n_prefix
        if n_prefix < MIN_PREFIX_TOKENS or not self.model.shares_prefix:
            n_prefix = 0
        return (prompt.lora.fingerprint if prompt.lora else "", prompt.tokens.ids[:n_prefix])

    def _group_key(self, prompt: Prompt) -> tuple[PrefixKey, int]:
        prefix = self._prefix_key(prompt)
        width = 0 if self.model.pads else len(prompt.tokens.ids) - len(prefix[1])
        return prefix, width

    def _choose(self, waiting: Sequence[Job]) -> Sequence[Job]:
        """The oldest job's group; or, if that is a lone new prefix, all lone new prefixes, padded without sharing."""
        groups: dict[tuple[PrefixKey, int], list[Job]] = {}
        for job in waiting:
            groups.setdefault(self._group_key(job.payload), []).append(job)
        (prefix, _), batch = next(iter(groups.items()))
        if len(batch) == 1 and self.model.pads and prefix not in self.prefixes:
            batch = [
                group[0]
                for (other, _), group in groups.items()
                if len(group) == 1 and other[0] == prefix[0] and other not in self.prefixes
            ]
        limit = min(job.payload.max_batch for job in batch)
        longest = max(len(job.payload.tokens.ids) for job in batch) + FIRST_ROOM_TOKENS
        limit = min(limit, max(1, BATCH_LIMIT_BYTES // (longest * self.model.bytes_per_token)))
        return batch[:limit]

    def _run(self, batch: Sequence[Job]) -> None:
        import torch

        with self.model.lock, torch.inference_mode():
            self._answer(batch)

    def _answer(self, batch: Sequence[Job]) -> None:
        try:
            rows, near = self._generate(batch)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise ProviderError(
                    f"generation failed on {self.model.device}: {type(error).__name__}: {error}"
                ) from error
            if len(batch) == 1:
                raise ProviderError(
                    f"out of memory on {self.model.device} for one prompt of {len(batch[0].payload.tokens.ids)} tokens "
                    f"({error}); remedy: fewer demonstrations, a smaller model, or another device"
                ) from error
            logger.warning("out of memory on %s with %d requests; trying halves", self.model.device, len(batch))
            middle = len(batch) // 2
        else:
            for job, row, near_tie in zip(batch, rows, near, strict=True):
                if near_tie:
                    self.n_near_ties += 1
                    row = self._generate([job], plain=True)[0][0]
                job.future.set_result(_to_answer(job.payload, row, near_tie=near_tie))
            return
        self._answer(batch[:middle])
        self._answer(batch[middle:])

    def _generate(self, batch: Sequence[Job], *, plain: bool = False) -> tuple[list[RowState], list[bool]]:
        """Rows of a batch, and which of them hang on a near-tie; `plain` is the library's own way, alone."""
        import torch
        import transformers

        model, prompts = self.model, [job.payload for job in batch]
        module = model.serving(prompts[0].lora)
        keys = {self._prefix_key(prompt) for prompt in prompts}
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
            states = self.prefixes.states(prefix, module, empty) if n_prefix else empty
            shared["past_key_values"] = spread(states, len(batch), width + min(longest, FIRST_ROOM_TOKENS))
        rows = [RowState(prompt.rules) for prompt in prompts]
        chooser = RowChooser(rows, dtype=model.dtype)
        stopper = RowStopper(
            rows,
            eos_ids=[prompt.eos_ids for prompt in prompts],
            decoders=[prompt.chat.decode for prompt in prompts],
            is_cancelled=lambda i: batch[i].cancelled,
        )
        module.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=mask.to(model.device),
            generation_config=transformers.GenerationConfig(
                max_new_tokens=longest, do_sample=False, pad_token_id=model.pad_id, use_cache=True
            ),
            logits_processor=transformers.LogitsProcessorList([chooser]),
            stopping_criteria=transformers.StoppingCriteriaList([stopper]),
            **shared,
        )
        self.n_batches += 1
        self.n_rows += len(rows)
        alone_and_plain = plain or (len(batch) == 1 and not shared)
        return rows, [False] * len(rows) if alone_and_plain else chooser.near_ties(rows)


def _to_answer(prompt: Prompt, row: RowState, *, near_tie: bool) -> Answer:
    ids = row.ids[:-1] if row.ids and row.ids[-1] in prompt.eos_ids else row.ids
    text = row.text if row.text is not None else prompt.chat.decode(ids)
    return Answer(tuple(row.ids), text, "stop" if row.reason == "stop" else "length", near_tie)


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "can't allocate memory" in str(error) or "out of memory" in str(error).lower()
