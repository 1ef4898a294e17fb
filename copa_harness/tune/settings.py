"""What a person may set about a LoRA training, with the defaults that proved themselves on the embedded model."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from copa_harness.errors import ConfigurationError

PRECISIONS = ("float32", "bfloat16")
DEMONSTRATIONS = ("mix", "keep", "drop")

_TINY = sys.float_info.min

_NUMBERS = (
    ("learning_rate", _TINY, math.inf, "a number above 0"),
    ("max_grad_norm", _TINY, math.inf, "a number above 0"),
    ("warmup_steps", 0, math.inf, "a number of at least 0"),
    ("weight_decay", 0, math.inf, "a number of at least 0"),
    ("seed", 0, math.inf, "a number of at least 0"),
    ("held_out_share", 0, 1, "a number from 0 to below 1"),
)
"""Name, least value, first value too large, and what to say."""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Settings of one training; every field is part of the adapter's recipe.

    Attributes:
        rank, alpha: size and scale (alpha / rank) of the low-rank update.
        target_modules: `all-linear`, or names of the modules to adapt.
        epochs: passes over the examples; with several variants per example, each pass takes the next one.
        learning_rate: peak; reached after `warmup_steps`, then falling linearly to zero.
        batch_size: rows per optimizer step.
        micro_batch_size: rows in the memory of a device at once (gradients are accumulated); None is `batch_size`.
        max_length: longest row in tokens; longer ones are left out and counted. None is the model's context.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        seed: of initial weights and row order.
        early_stop_patience: epochs without a better held-out loss before training stops (only with held-out rows;
            the best epoch's weights are kept).
        learn_from_demos: let loss fall on the demonstrations' answers too. A prompt with k demonstrations then teaches
            k + 1 answers, behind 0 to k demonstrations, for the price of one; held-out loss is on the last one only.
        demonstrations: what the weights step does with the demonstrations that will be served: `mix` (rows behind them
            and a share of bare ones), `keep` (only behind them) or `drop` (only bare ones). A `LoraTrainer` takes
            its rows as they are. Measured with `p -> w -> p`, a light budget and the embedded model on the four
            development tasks, 3 draws of each: mean test score .913, .913, .914; paired differences to `mix`
            .000 [-.010, +.010] and +.001 [-.023, +.027]. No difference is shown, so `mix` stays the default: it serves
            programs with and without demonstrations.
        held_out_share: share of the rows, 0..1, the weights step keeps for early stopping; 0 trains all epochs.
        precision: `float32`, or `bfloat16`: products are computed in bfloat16 (autocast), LoRA weights and optimizer
            stay in float32. Faster on GPUs and on CPUs with bfloat16 units; other weights come out.

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
    demonstrations: Literal["mix", "keep", "drop"] = "mix"
    held_out_share: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "epochs", "batch_size", "micro_batch_size", "max_length", "early_stop_patience"):
            value = getattr(self, name)
            if value is None and name in ("micro_batch_size", "max_length"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"LoRA setting {name}: got {value!r}; expected a whole number of at least 1")
        for name, least, most, said in _NUMBERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < most:
                raise ConfigurationError(f"LoRA setting {name}: got {value!r}; expected {said}")
        if not isinstance(self.learn_from_demos, bool):
            raise ConfigurationError(
                f"LoRA setting learn_from_demos: got {self.learn_from_demos!r}; expected True or False"
            )
        for name, known in (("precision", PRECISIONS), ("demonstrations", DEMONSTRATIONS)):
            if getattr(self, name) not in known:
                raise ConfigurationError(
                    f"LoRA setting {name}: got {getattr(self, name)!r}; expected one of {', '.join(known)}"
                )
        if not isinstance(self.target_modules, (str, list, tuple)):
            raise ConfigurationError(
                f"LoRA setting target_modules: got {self.target_modules!r}; expected 'all-linear' or names of modules"
            )
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))

    def replaced(self, changes: Mapping[str, Any]) -> LoraSettings:
        """These settings with some changed by name.

        Raises:
            ConfigurationError: a name that is no setting, or a value out of range.
        """
        known = [field.name for field in dataclasses.fields(self)]
        unknown = sorted(set(changes) - set(known), key=str)
        if unknown:
            near = difflib.get_close_matches(str(unknown[0]), known, n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigurationError(
                f"got the LoRA settings {', '.join(map(str, unknown))}{meant}; expected some of {', '.join(known)}"
            )
        return dataclasses.replace(self, **changes)


def check_lora(changes: Any) -> None:
    """Check settings given by name, as a marker or `COPA(lora=...)` has them.

    Raises:
        ConfigurationError: not a mapping, a name that is no setting, or a value out of range.
    """
    if not isinstance(changes, Mapping):
        raise ConfigurationError(
            f"got lora={changes!r}; expected a dictionary of LoRA settings, for instance {{'rank': 8, 'epochs': 3}}"
        )
    LoraSettings().replaced(changes)
