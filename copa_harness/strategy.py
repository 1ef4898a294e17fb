"""The language of strategies: `"p -> w -> p"` in, steps out, or an error that says what is known.

Grammar: steps joined by `->` (or `→`, `>`), in any case and spacing.

    none                    the program as written
    w, p                    weights only, prompts only; any sequence of them
    demos -> instructions   the alternating loop, repeated until it converges (as a whole strategy only)
    joint                   one search over weights and prompts at once
    miprov2, gepa, ...      a DSPy optimizer by name, alone or inside a sequence
    p -> ensemble           the run's best programs asked together (as the last step)
    auto                    whatever suits the number of examples, the model and the budget (see `auto`)
    advise                  `p -> w`, and a word on what the task needs: prompts, weights, both, rows, another model
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from copa_harness.errors import ConfigurationError, did_you_mean


class StepKind(str, Enum):
    """What a step of a strategy does."""

    NONE = "none"
    WEIGHTS = "w"
    PROMPTS = "p"
    ALTERNATE = "demos -> instructions"
    JOINT = "joint"
    OPTIMIZER = "optimizer"
    ENSEMBLE = "ensemble"
    AUTO = "auto"
    ADVISE = "advise"


@dataclass(frozen=True, slots=True)
class Step:
    """One step: its kind, and for `OPTIMIZER` the DSPy optimizer's registered name."""

    kind: StepKind
    name: str

    def __str__(self) -> str:
        return self.name


OPTIMIZER_NAMES: tuple[str, ...] = (
    "labeled_fewshot",
    "bootstrap_fewshot",
    "bootstrap_fewshot_random_search",
    "bootstrap_fewshot_optuna",
    "knn_fewshot",
    "miprov2",
    "copro",
    "gepa",
    "simba",
    "infer_rules",
    "bootstrap_finetune",
    "better_together",
)
"""DSPy optimizers known by name; `copa_harness.optimize.dspy_optimizers.registry` runs them."""

_ALIASES = {
    "mipro": "miprov2",
    "bootstrapfewshotwithrandomsearch": "bootstrap_fewshot_random_search",
    "bootstraprs": "bootstrap_fewshot_random_search",
    "bootstrapfewshotwithoptuna": "bootstrap_fewshot_optuna",
    "inferrules": "infer_rules",
}
_KINDS = {kind.value: kind for kind in StepKind if kind not in (StepKind.ALTERNATE, StepKind.OPTIMIZER)}
_ALONE = (StepKind.NONE, StepKind.JOINT, StepKind.AUTO, StepKind.ADVISE)
_LONG = {"weights": "w", "prompts": "p", "prompt": "p", "weight": "w"}


def parse_strategy(text: str, *, optimizers: Iterable[str] = OPTIMIZER_NAMES) -> tuple[Step, ...]:
    """The steps of a strategy.

    Args:
        text: A strategy as described at the top of this module.
        optimizers: Names of optimizers that may occur as steps.

    Returns:
        One or more steps, in order.

    Raises:
        ConfigurationError: An unknown name, an empty step, or a combination that means nothing.
    """
    known = tuple(optimizers)
    if not isinstance(text, str) or not text.strip():
        raise ConfigurationError(f"got {text!r} as the strategy; expected {_expected(known)}")
    words = [word.strip().lower() for word in re.split(r"->|→|>", text)]
    if any(not word for word in words):
        raise ConfigurationError(f"got an empty step in the strategy {text!r}; expected names joined by '->'")
    if words == ["demos", "instructions"]:
        return (Step(StepKind.ALTERNATE, StepKind.ALTERNATE.value),)
    if "demos" in words or "instructions" in words:
        raise ConfigurationError(
            f"got {text!r}; 'demos -> instructions' is a whole strategy (it repeats both until they converge): "
            "use it alone, or 'p' as the prompt step of a sequence"
        )
    steps = tuple(_step(word, known, text) for word in words)
    kinds = [step.kind for step in steps]
    if len(steps) > 1 and any(kind in _ALONE for kind in kinds):
        raise ConfigurationError(f"got {text!r}; 'none', 'joint', 'auto' and 'advise' stand alone, without '->'")
    if StepKind.ENSEMBLE in kinds and (len(kinds) == 1 or StepKind.ENSEMBLE in kinds[:-1]):
        raise ConfigurationError(f"got {text!r}; 'ensemble' is a last step, after one that searches: 'p -> ensemble'")
    return steps


def _step(word: str, known: tuple[str, ...], text: str) -> Step:
    word = _LONG.get(word, word)
    if word in _KINDS:
        return Step(_KINDS[word], word)
    squeezed = re.sub(r"[\s_\-]+", "", word)
    squeezed_names = {re.sub(r"_", "", name): name for name in known}
    name = squeezed_names.get(squeezed) or _ALIASES.get(squeezed)
    if name in known:
        return Step(StepKind.OPTIMIZER, str(name))
    candidates = [*_KINDS, *known, "demos -> instructions"]
    meant = did_you_mean(word, candidates) or "."
    raise ConfigurationError(f"got {word!r} in the strategy {text!r}; expected {_expected(known)}{meant}")


def _expected(known: tuple[str, ...]) -> str:
    return (
        "'none', 'w', 'p', a sequence such as 'p -> w -> p', 'demos -> instructions', 'joint', 'auto', 'advise', "
        f"or a DSPy optimizer ({', '.join(known)})"
    )
