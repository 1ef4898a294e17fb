"""What a model's batches may do without changing an answer, tried out on a few random tokens when it is loaded.

Each check compares the logits of rows that share a batch with those each row gets from the library's model alone. Knows
nothing of requests or of how a model is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from copa_harness.lm.local_cascade import RowGroup, Unfit
from copa_harness.lm.local_loop import CascadeRun, Reader, Suffixes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExactnessChecks:
    """The checks of one model.

    Attributes:
        model: as transformers loads it.
        pad_id: any token.
        tolerance: largest difference of two logits, relative to the largest logit, that is taken for rounding.
        name: the model's, for messages.
    """

    model: Any
    pad_id: int
    tolerance: float
    name: str

    def batch_rules(self) -> tuple[bool, bool]:
        """Whether prompts of different lengths may share a batch, padded on the left; whether they may share a prefix.

        What is exact for this architecture's states, checked where it can be.
        """
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

        if getattr(self.model, "_is_stateful", False) or _rope_depends_on_length(self.model.config):
            return False, False
        kinds = {type(layer) for layer in self._new_cache().layers}
        # A multi-token continuation from a convolution state is exact in LFM2; other state-space models differ.
        if LinearAttentionLayer in kinds and kinds <= {DynamicLayer, LinearAttentionLayer}:
            return False, self.model.config.model_type == "lfm2"
        # A window holds only the prefix's last tokens, and padding behind it would push them out.
        if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
            return False, False
        rules = (True, kinds == {DynamicLayer})
        if self._padding_is_exact(n_shared=6 if rules[1] else 0):
            return rules
        logger.warning("%s answers differently when padded; its requests are batched by equal length", self.name)
        return False, False

    def cascade_is_exact(self, reader: Reader) -> bool:
        """Whether three rows, two of them behind a shared prefix kept once, give the logits they give alone."""
        import torch

        head, short, long = self._probe(6)
        tails = [short[0].tolist(), long[0].tolist(), long[0].tolist()]
        try:
            with torch.inference_mode():
                cache = self._new_cache()
                self.model(head, attention_mask=torch.ones_like(head), past_key_values=cache, use_cache=True)
                groups = [RowGroup(0, 2, cache), RowGroup(2, 3, None)]
                suffixes = Suffixes(tails, [6, 6, 0], groups)
                run = CascadeRun(reader, suffixes, device=self.model.device, pad_id=self.pad_id, room=1)
        except (Unfit, TypeError, ValueError, KeyError, RuntimeError, AttributeError) as reason:
            logger.info("%s goes without cascade attention: %s: %s", self.name, type(reason).__name__, reason)
            return False
        alone = [torch.cat([head, short], 1), torch.cat([head, long], 1), long]
        return self._same_logits(run.logits, alone)

    def _padding_is_exact(self, *, n_shared: int) -> bool:
        """Whether two short prompts behind `n_shared` shared tokens, padded, give the logits they give alone."""
        import torch

        device = self.model.device
        head, short, long = self._probe(n_shared)
        mask = torch.ones(2, n_shared + 5, dtype=torch.long, device=device)
        mask[0, n_shared : n_shared + 3] = 0
        with torch.inference_mode():
            cache = self._new_cache()
            if n_shared:
                self.model(head, attention_mask=torch.ones_like(head), past_key_values=cache, use_cache=True)
                cache.batch_repeat_interleave(2)
            together = self.model(
                torch.cat([torch.cat([torch.full((1, 3), self.pad_id, device=device), short], 1), long]),
                past_key_values=cache,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, n_shared:],
                use_cache=True,
            ).logits[:, -1]
        return self._same_logits(together, [torch.cat([head, tail], 1) for tail in (short, long)])

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def _probe(self, n_shared: int) -> list[Any]:
        """Random token ids of a shared prefix, a short and a long suffix (2 and 5 tokens), each [1, n]."""
        import torch

        vocab_size = self.model.get_input_embeddings().num_embeddings
        draw = torch.Generator().manual_seed(0)
        return [torch.randint(vocab_size, (1, n), generator=draw).to(self.model.device) for n in (n_shared, 2, 5)]

    def _same_logits(self, together: Any, prompts: Sequence[Any]) -> bool:
        """Whether the rows of `together` are the last logits of the prompts, each alone."""
        import torch

        with torch.inference_mode():
            alone = [self.model(ids, attention_mask=torch.ones_like(ids)).logits[0, -1] for ids in prompts]
        return all(
            bool((a - b).abs().max() <= self.tolerance * a.abs().max().clamp(min=1e-6))
            for a, b in zip(alone, together, strict=True)
        )


def _rope_depends_on_length(config: Any) -> bool:
    """Whether a token's position is encoded differently in longer inputs, so that longer company would change it."""
    parameters = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [parameters] if "rope_type" in parameters else [v for v in parameters.values() if isinstance(v, dict)]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)
