"""Checkpoints as levels of the weights: what every epoch of a training is good for, the study finds out.

A training keeps one servable LoRA adapter per epoch. The last one fits the training rows best, an earlier one may keep
more of what the base model could do with demonstrations or an instruction; so a few of the others, spread evenly over
the epochs, are offered beside the one that was kept. Few, because every level multiplies the space.

Measured with `joint`, a light budget and the embedded model on the development tasks of `pretrain.devtasks` (24 draws
of data; 50 training, 25 validation, 75 test rows; mean test score, difference to n = 1 paired, with a 95 % interval):

    n = 0  .911  -.009 [-.021, +.001]       n = 2  .917  -.003 [-.011, +.004]
    n = 1  .920                             n = 4  .919  -.001 [-.008, +.007]

None differs from another beyond the noise; the default is 1, the highest mean and the smallest space after none at all.
Knows adapters and candidates; knows nothing of scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copa_harness.optimize.candidate import Candidate, model_name
from copa_harness.optimize.space import WeightsLevel, level_of

if TYPE_CHECKING:
    from copa_harness.tune.adapter import LoraAdapter


def spread(epochs: Sequence[int], n: int) -> tuple[int, ...]:
    """Up to `n` of the epochs, evenly spaced, the latest of each stretch: of 1 2 3 and n = 1 it is 2."""
    if n <= 0 or not epochs:
        return ()
    n = min(n, len(epochs))
    return tuple(sorted({epochs[round((i + 1) * (len(epochs) + 1) / (n + 1)) - 1] for i in range(n)}))


def checkpoint_levels(candidate: Candidate, lms: Sequence[Any], *, n: int) -> tuple[WeightsLevel, ...]:
    """Levels for `n` other epochs of the training that tuned models came from; none for models trained elsewhere.

    Args:
        candidate: Whose prompts; only its parts' order matters.
        lms: Tuned models, one per part. Several models are taken at the same epoch.
        n: How many levels at most.
    """
    epochs: dict[str, dict[int, Any]] = {}
    for lm in lms:
        adapter = _adapter(lm) if model_name(lm) not in epochs else None
        if adapter is not None:
            others = [one for one in adapter.checkpoints if one.fingerprint != adapter.fingerprint]
            epochs[model_name(lm)] = {one.epoch: one.model for one in others}
    if not epochs:
        return ()
    shared = sorted(set.intersection(*(set(found) for found in epochs.values())))
    levels = []
    for epoch in spread(shared, n):
        copies = {name: found[epoch] for name, found in epochs.items()}
        chosen = tuple(lm.copy(model=copies[model_name(lm)]) if model_name(lm) in copies else lm for lm in lms)
        levels.append(level_of(candidate.with_lms(chosen)))
    return tuple(levels)


def _adapter(lm: Any) -> LoraAdapter | None:
    """The adapter behind a tuned model, None when it is no LoRA adapter of this project."""
    from copa_harness.lm.local_lora import find_lora, read_lora, split_model_name
    from copa_harness.tune.adapter import adapter_of

    base, digits = split_model_name(model_name(lm))
    directory = getattr(getattr(lm, "engine", None), "lora_dir", None)
    if digits is None or directory is None:
        return None
    folder = find_lora(Path(directory), digits)
    if folder is None:
        return None
    files = read_lora(folder)
    if "checkpoints" not in files.details:
        return None  # a checkpoint itself
    return adapter_of(files, base=base, trained_now=False, steps_now=0)
