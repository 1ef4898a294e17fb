"""Everything one optimization is configured with, in one record.

What a user may choose among by name in a search, and the one message for a name that is none of them.

Plain words, so that a wrong one is refused where it is written, before anything heavy is loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from copa_harness.errors import ConfigurationError, did_you_mean
from copa_harness.results import Budget
from copa_harness.tune.settings import LoraSettings
from copa_harness.wording import amount

SAMPLERS: tuple[str, ...] = ("tpe", "random", "gp")
"""Optuna's samplers; see `samplers`."""

GROUNDINGS: tuple[str, ...] = ("all", "data", "program", "examples", "history", "weighty", "none")
"""What the writer of instructions is shown beside the step and its current instruction: everything, one thing, or
nothing; see `writing`."""


@dataclass(frozen=True, slots=True)
class ProposalSettings:
    """What is proposed.

    Attributes:
        max_demos: Demonstrations in the largest sets; 0 proposes none.
        n_demo_sets: Sets per predictor and source; None proposes about as many as the round can look at.
        bootstrap: Run the program on training examples for demonstrations from passing traces. None does so exactly
            when a predictor has an output that the examples do not hold (reasoning, intermediate steps): where they
            hold all of them, a bootstrapped demonstration is the labelled one again, and not worth a call.
        min_score: Score from which a trace passes, 0..1.
        n_proposed: Instructions asked of the prompt LM, per predictor and phase.
        groundings: What the prompt LM may be shown, see `choices.GROUNDINGS`; which of them is learned.
        n_reflected: Training examples the incumbent is run on to find mistakes to reflect on; 0 turns reflection off.
        transfer: Whether bare instructions are tried on training examples to see which demonstrations they make
            redundant. Rules are followed without a model, and cost nothing either way.
        n_rounds: Rounds of proposing and searching in a prompt step; later rounds use what earlier ones learned.
    """

    max_demos: int = 9
    n_demo_sets: int | None = None
    bootstrap: bool | None = None
    min_score: float = 1.0
    n_proposed: int = 4
    groundings: tuple[str, ...] = GROUNDINGS
    n_reflected: int = 8
    transfer: bool = True
    n_rounds: int = 2


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """How a study searches.

    Attributes:
        sampler: Optuna sampler by name, see `samplers`.
        seed: Of the sampler.
        max_trials: Trials at most, free ones included.
        patience: Trials in a row without a new incumbent that end the study; None never does.
        p_threshold: Level of the racing rule, 0..1; 0 turns its statistical part off.
        stop_without_headroom: Whether a study ends when enough looks have shown nothing to gain.
    """

    sampler: str = "tpe"
    seed: int = 0
    max_trials: int = 2000
    patience: int | None = 40
    p_threshold: float = 0.1
    stop_without_headroom: bool = True


@dataclass(frozen=True, slots=True)
class WeightsSettings:
    """How a weights step trains.

    Attributes:
        lora: Settings of the LoRA adapter: all of them, or those by name that differ from the step's own (the trainer's
            defaults with `epochs_with_demos` or `epochs_bare` epochs and the run's seed). None takes the step's own.
        epochs_with_demos: Passes over the rows when they carry demonstrations, whose answers are learned from too (see
            `LoraSettings.learn_from_demos`). Fewer suffice than for bare rows: a row teaches ten answers, the
            demonstrations do part of the work, and every pass sees new ones.
        epochs_bare: Passes over bare rows.
        n_demos: Demonstrations per row when the incumbent has none but a prompt step follows.
        n_variants: Renderings per example with different demonstrations; None is one per epoch.
        bare_share: Share of the rows rendered once more without demonstrations, 0..1.
        held_out_share: Share of the rows kept for early stopping; 0 turns it off.
        min_score: Score from which a trace becomes a row when labels do not give the rows, 0..1.
    """

    lora: LoraSettings | Mapping[str, Any] | None = None
    epochs_with_demos: int = 4
    epochs_bare: int = 12
    n_demos: int = 9
    n_variants: int | None = None
    bare_share: float = 0.2
    held_out_share: float = 0.0
    min_score: float = 1.0

    def lora_settings(self, *, with_demos: bool, seed: int) -> LoraSettings:
        """Settings of a training on rows with or without demonstrations."""
        if isinstance(self.lora, LoraSettings):
            return self.lora
        epochs = self.epochs_with_demos if with_demos else self.epochs_bare
        return LoraSettings(epochs=epochs, seed=seed, learn_from_demos=with_demos).replaced(self.lora or {})


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Everything an optimization is configured with; see `COPA` for the meanings."""

    seed: int
    threads: int
    max_cycles: int
    epsilon: float
    search: SearchSettings
    proposals: ProposalSettings
    weights: WeightsSettings
    n_checkpoints: int = 1
    adoption_p: float = 0.2
    optimizer_kwargs: Mapping[str, Any] = field(default_factory=dict)


def check_sampler(name: Any) -> None:
    """Raise `ConfigurationError` unless `name` is a sampler's."""
    if name not in SAMPLERS:
        raise ConfigurationError(f"got {name!r} as the sampler; expected one of {', '.join(SAMPLERS)}")


def check_groundings(names: Any) -> None:
    """Raise `ConfigurationError` unless `names` are one or more groundings, each once."""
    listed = list(names) if isinstance(names, Sequence) and not isinstance(names, str) else []
    if not listed or len(set(map(str, listed))) < len(listed) or any(name not in GROUNDINGS for name in listed):
        raise ConfigurationError(
            f"got groundings={names!r}; expected a list of one or more of {', '.join(GROUNDINGS)}, each once"
        )


LEVELS: dict[str, int] = {"light": 400, "medium": 1600, "heavy": 6400}
"""Model calls per optimization run that each level allows."""


CEILINGS = tuple(entry.name for entry in fields(Budget) if entry.name != "name")
"""What a ceiling can be put on, as written in `calls=500,usd=2`."""


_WHOLE = frozenset(CEILINGS) - {"usd", "seconds"}


def parse_budget(value: Budget | int | str) -> Budget:
    """A budget from a level name, ceilings, a number of calls, or a `Budget` (returned as it is).

    Ceilings are written `name=number`, separated by commas: `calls`, `tokens` (in and out), `input_tokens`,
    `output_tokens`, `usd`, `seconds`, `train_steps`. A level may stand among them: `light,usd=2`.

    Raises:
        ConfigurationError: None of these, an unknown or repeated ceiling, or a number that is not positive (and whole,
            except dollars and seconds).
    """
    if isinstance(value, Budget):
        return value
    if isinstance(value, bool):
        raise ConfigurationError(f"got {value!r} as the budget; {_EXPECTED}")
    if isinstance(value, int):
        return Budget(calls=_number(str(value), "calls", value), name=f"calls={value}")
    if isinstance(value, str):
        text = value.strip().lower()
        if text == "unlimited":
            return Budget()
        if text in LEVELS:
            return Budget(calls=LEVELS[text], name=text)
        return _from_clauses(text, value)
    raise ConfigurationError(f"got {value!r} as the budget; {_EXPECTED}")


def describe_budget(budget: Budget) -> str:
    """The budget's name with the ceilings it means: ``light (at most 400 optimization calls per task)``."""
    ceilings = budget.ceilings
    if not ceilings:
        return f"{budget.name} (no ceiling)"
    units = {
        "calls": "optimization calls",
        "usd": "dollars",
        "train_steps": "training steps",
        "input_tokens": "input tokens",
        "output_tokens": "output tokens",
    }
    parts = [f"{amount(ceiling)} {units.get(name, name)}" for name, ceiling in ceilings.items()]
    return f"{budget.name} (at most {', '.join(parts)} per task)"


_EXPECTED = (
    "expected "
    + ", ".join(f"'{name}' ({calls:,} calls)" for name, calls in LEVELS.items())
    + " or ceilings such as 'calls=500' or 'calls=500,usd=2,tokens=1e6,seconds=600'"
)


def _from_clauses(text: str, value: str) -> Budget:
    found: dict[str, float] = {}
    # 1,000 is one number; a comma in front of anything but three digits separates ceilings.
    for clause in re.split(r",(?!\d{3}(?:\D|$))", text):
        clause = clause.strip()
        match = re.fullmatch(r"(?:([a-z_]+)\s*=\s*)?(\d[\d_,]*(?:\.\d*)?(?:e[+]?\d+)?|\.\d+)", clause)
        if clause in LEVELS:
            name, amount = "calls", float(LEVELS[clause])
        elif match is not None:
            name = match.group(1) or "calls"
            amount = float(re.sub(r"[_,]", "", match.group(2)))
        else:
            raise ConfigurationError(f"got {value!r} as the budget; {_EXPECTED}")
        if name not in CEILINGS:
            raise ConfigurationError(
                f"got a ceiling on {name!r} in the budget {value!r}; expected one of {', '.join(CEILINGS)}"
            )
        if name in found:
            raise ConfigurationError(f"got two ceilings on {name} in the budget {value!r}; expected one")
        found[name] = _number(clause, name, amount)
    name = ",".join(f"{ceiling}={_plain(amount)}" for ceiling, amount in found.items())
    level = next((word for word in LEVELS if re.search(rf"\b{word}\b", text)), None)
    if level is not None:
        name = name.replace(f"calls={LEVELS[level]}", level)
    return replace(Budget(name=name), **found)  # type: ignore[arg-type]


def _number(clause: str, name: str, amount: float) -> float:
    if not (amount > 0 and math.isfinite(amount)) or (name in _WHOLE and not float(amount).is_integer()):
        wanted = "a whole number of at least 1" if name in _WHOLE else "a number above 0"
        raise ConfigurationError(f"got a budget of {clause!r} {'' if '=' in clause else name}; expected {wanted}")
    return int(amount) if name in _WHOLE else float(amount)


def _plain(amount: float) -> str:
    return f"{amount:g}" if amount != int(amount) else str(int(amount))


OBJECTIVES = {"cheapest": "usd", "fastest": "seconds", "shortest": "prompt_tokens"}
"""Word -> what is minimized; without prices "cheapest" means the fewest tokens, in and out."""


_GRAMMAR = re.compile(r"(cheapest|fastest|shortest) within (\d+(?:\.\d+)?) points? of (?:the )?best")


@dataclass(frozen=True, slots=True)
class Preference:
    """Which of the good candidates is returned: the one that minimizes `objective` within `within` of the best."""

    objective: str
    within: float

    def __str__(self) -> str:
        word = next(word for word, objective in OBJECTIVES.items() if objective == self.objective)
        return f"{word} within {100 * self.within:g} point{'' if self.within == 0.01 else 's'} of best"


def parse_preference(text: str | None) -> Preference | None:
    """The preference in words, `"cheapest within 1 point of best"`; None or "best" for the best score.

    Raises:
        ConfigurationError: None of the known forms.
    """
    if text is None or text == "best":
        return None
    match = _GRAMMAR.fullmatch(" ".join(text.lower().split())) if isinstance(text, str) else None
    if match is None:
        raise ConfigurationError(
            f"got prefer={text!r}; expected 'best' or '<{'|'.join(OBJECTIVES)}> within <number> points of best', for "
            "instance 'cheapest within 1 point of best'"
        )
    return Preference(OBJECTIVES[match.group(1)], float(match.group(2)) / 100)


LIMITS: tuple[str, ...] = (
    "max_prompt_tokens",
    "forbidden_text",
    "required_text",
    "max_usd_per_answer",
    "max_seconds_per_answer",
)
"""What may be limited; the attributes of `Constraints`."""


def parse_limits(given: Any) -> dict[str, Any]:
    """Checked limits by name; texts as tuples, and none that is None.

    Args:
        given: A dictionary with some of `LIMITS`.

    Raises:
        ConfigurationError: An unknown name or an impossible value.
    """
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"got constraints={given!r}; expected a dictionary with some of {', '.join(LIMITS)}")
    if unknown := sorted(map(str, set(given) - set(LIMITS))):
        raise ConfigurationError(
            f"got constraints {unknown}; expected some of {', '.join(LIMITS)}{did_you_mean(unknown[0], LIMITS)}"
        )
    values: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        values[name] = _texts(name, value) if name.endswith("_text") else _limit(name, value)
    for text in values.get("required_text", ()):
        for forbidden in values.get("forbidden_text", ()):
            if forbidden.casefold() in text.casefold():
                raise ConfigurationError(
                    f"got {text!r} as required and {forbidden!r} as forbidden text: no prompt keeps both"
                )
    return values


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else ()
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ConfigurationError(f"got {name}={value!r}; expected a text or a list of texts, none of them empty")
    return texts


def _limit(name: str, value: Any) -> float:
    whole = name == "max_prompt_tokens"
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    if not number or (whole and not (isinstance(value, int) and value >= 1)):
        wanted = "a whole number of at least 1" if whole else "a number of at least 0"
        raise ConfigurationError(f"got {name}={value!r}; expected {wanted}")
    return value  # type: ignore[no-any-return]
