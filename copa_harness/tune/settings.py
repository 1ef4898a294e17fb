"""What a person may set about a LoRA training, with the defaults that proved themselves on the embedded model.

Knows nothing of torch: settings are hashed into the recipe of an adapter, and that must cost nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from copa_harness.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Settings of one training; every field is part of the adapter's recipe.

    Attributes:
        rank, alpha: size and scale (alpha / rank) of the low-rank update.
        target_modules: `all-linear`, or names of the modules to adapt.
        epochs: passes over the examples; with several variants per example, each pass takes the next one.
        learning_rate: peak; reached after `warmup_steps`, then falling linearly to zero.
        batch_size: rows per optimizer step.
        micro_batch_size: rows in memory at once (gradients are accumulated); None is `batch_size`.
        max_length: longest row in tokens; longer ones are left out and counted. None is the model's context.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        seed: of initial weights and row order.
        early_stop_patience: epochs without a better held-out loss before training stops (only with held-out rows;
            the best epoch's weights are kept).
        learn_from_demos: let loss fall on the demonstrations' answers too. A prompt with k demonstrations then teaches
            k + 1 answers, behind 0 to k demonstrations, for the price of one; held-out loss is on the last one only.

    Raises:
        ConfigurationError: a value out of range.
    """

    rank: int = 16
    alpha: int = 32
    target_modules: str | tuple[str, ...] = "all-linear"
    epochs: int = 6
    learning_rate: float = 3e-3
    batch_size: int = 16
    micro_batch_size: int | None = None
    max_length: int | None = None
    warmup_steps: int = 5
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 0
    early_stop_patience: int = 2
    learn_from_demos: bool = False

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "epochs", "batch_size", "micro_batch_size", "max_length", "early_stop_patience"):
            value = getattr(self, name)
            if value is None and name in ("micro_batch_size", "max_length"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"LoRA setting {name}: got {value!r}; expected a whole number of at least 1")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"LoRA setting {name}: got {getattr(self, name)!r}; expected a number above 0")
        if self.warmup_steps < 0 or self.weight_decay < 0 or self.seed < 0:
            raise ConfigurationError(
                "LoRA settings warmup_steps, weight_decay and seed: expected numbers of at least 0"
            )
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))

    def replaced(self, changes: Mapping[str, Any]) -> LoraSettings:
        """These settings with some changed by name.

        Raises:
            ConfigurationError: a name that is no setting, or a value out of range.
        """
        known = [field.name for field in dataclasses.fields(self)]
        unknown = sorted(set(changes) - set(known))
        if unknown:
            raise ConfigurationError(f"got the LoRA settings {', '.join(unknown)}; expected some of {', '.join(known)}")
        return dataclasses.replace(self, **changes)
