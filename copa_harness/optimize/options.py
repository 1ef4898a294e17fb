"""How an optimization searches: every option once, and what the words mean that a user may write.

`SearchOptions` is what `COPA(...)` and the marker take. Below it the small languages in which options are given:
budgets (`"calls=500,usd=2"`), preferences (`"cheapest within 1 point of best"`) and limits
(`{"max_prompt_tokens": 800}`). All of it is plain Python, so that a wrong word is refused where it is written, before
anything heavy is loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from copa_harness.errors import ConfigurationError, did_you_mean
from copa_harness.option_fields import (
    COUNT,
    POSITIVE,
    SHARE,
    SWITCH,
    Check,
    Place,
    check_fields,
    mapping_check,
    option,
    text_check,
    words_check,
)
from copa_harness.results import Budget
from copa_harness.tune.options import LoraSettings, check_lora

SAMPLERS: tuple[str, ...] = ("tpe", "random", "gp")
"""Optuna's samplers; see `search.samplers`."""

GROUNDINGS: tuple[str, ...] = ("all", "data", "program", "examples", "history", "weighty", "none")
"""What the writer of instructions is shown beside the step and its current instruction: everything, one thing, or
nothing; see `propose.writer`."""


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


def _check_perturbations(names: Any) -> None:
    from copa_harness.robustness.perturbations import check_names

    check_names(names)


def _check_optimizer_kwargs(given: Any) -> None:
    from copa_harness.optimize.dspy_optimizers.kwargs import check_optimizer_kwargs

    check_optimizer_kwargs(given)


_search = partial(option, places=Place.MARKER | Place.ENVIRONMENT | Place.INI)
"""In the marker; in the environment, which overrules it; in the ini file, for what it does not say."""

_python = partial(option, places=Place(0))
"""An argument of `COPA` only."""


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How one optimization searches.

    The last fields are no options: they are varied by tests and benchmarks.

    Raises:
        ConfigurationError: A value cannot be used.
    """

    seed: int = _python(0, check=COUNT, help="seed of every random choice; same seed, same program")
    threads: int = _python(32, check=POSITIVE, help="examples in flight at once; results do not depend on it")
    max_cycles: int = _search(3, check=POSITIVE, help="cycles of `demos -> instructions` at most")
    epsilon: float = _search(
        0.01, check=SHARE, help="improvement per cycle below which `demos -> instructions` has converged"
    )
    constraints: Any = _search(
        None,
        check=mapping_check(
            "a dictionary of limits, for instance {'max_prompt_tokens': 800}",
            accepts=lambda value: isinstance(value, Mapping) or is_dataclass(value),  # `Constraints`, checked already
            meaning=lambda value: None if is_dataclass(value) else parse_limits(value),
        ),
        help="hard limits that the returned program keeps: max_prompt_tokens, forbidden_text, required_text, "
        "max_usd_per_answer, max_seconds_per_answer",
    )
    prefer: str | None = _search(
        None,
        check=text_check("'best' or 'cheapest within 1 point of best'", meaning=lambda value: parse_preference(value)),
        default_words="best",
        help="which good program is returned: the best, or the cheapest (shortest, fastest) within a number of points "
        "of the best; then the result carries the front of score and cost",
    )
    sampler: str = _search(
        "tpe", check=text_check("'tpe', 'random' or 'gp'", meaning=check_sampler), help="Optuna's sampler of the study"
    )
    patience: int | None = _search(
        40, check=POSITIVE, help="trials in a row without improvement that end a study; None (in Python) never does"
    )
    adoption_p: float = _search(
        0.2,
        check=SHARE,
        help="threshold of the paired test that the result must pass against the program as written, or that is "
        "returned; an error rate only where rows are held back, else about half of the searches in which nothing is "
        "better return something else; 1 keeps whatever is no worse, as is always done for DSPy's optimizers alone",
    )
    max_demos: int = _search(
        9,
        check=COUNT,
        help="demonstrations in the largest sets proposed, and those that a small model's weights are tuned behind "
        "when the program has none yet but a prompt step follows; 0 proposes none",
    )
    n_demo_sets: int | None = _search(
        None,
        check=COUNT,
        default_words="as many as the round can look at, 6 to 32",
        help="demonstration sets proposed per predictor and round",
    )
    bootstrap: bool | None = _search(
        None,
        check=SWITCH,
        # Where examples hold all outputs, a bootstrapped demonstration is the labelled one again, and not worth a call.
        default_words="where examples lack an output of a predictor",
        help="whether demonstrations are taken from the program's own passing traces on training examples",
    )
    pass_score: float = _search(
        1.0, check=SHARE, help="score from which a trace passes, to become a demonstration or a training row"
    )
    n_proposed: int = _search(4, check=COUNT, help="instructions asked of the prompt model per predictor and round")
    groundings: tuple[str, ...] = _search(
        GROUNDINGS,
        check=words_check("a list, for instance ['data', 'history']", meaning=check_groundings),
        help="what the prompt model may be shown beside the step and its instruction; which of them is learned",
    )
    n_reflected: int = _search(
        8,
        check=COUNT,
        help="training examples the program is run on to find mistakes the prompt model reflects on; 0 does not",
    )
    n_rounds: int = _search(
        2,
        check=POSITIVE,
        help="rounds of proposing and searching in a prompt or joint step; later ones use what earlier ones learned",
    )
    bare_share: float = _search(
        0.2, check=SHARE, help="share of the rows also rendered bare when rows carry demonstrations"
    )
    # The embedded model on three tasks of 50 to 100 rows: -.027, -.013, .000; SmolLM2 on 24 rows: +.17, +.07, +.02.
    refit: bool | None = _search(
        None,
        check=SWITCH,
        default_words="for large models that are tuned here",
        help="whether the returned weights are trained once more at the end, on training and validation rows together; "
        "validation scores are those of the weights before",
    )
    robust: bool = _search(
        False,
        check=SWITCH,
        help="whether a validation row counts as the worst of itself and its changed forms (`perturbations`), which "
        "are asked and paid for like any other row",
    )
    perturbations: tuple[str, ...] = _search(
        ("white_space", "field_order", "demo_order"),
        check=words_check("a list, for instance ['typos', 'field_order']", meaning=_check_perturbations),
        help="changes that should not change an answer, for `robust` and the gate max_violation_rate: the names in "
        "[robustness](../robustness/README.md); one named twice gives two forms of a row",
    )
    guard: Any = option(
        None,
        places=Place.MARKER,
        check=Check(
            lambda value: callable(value) or hasattr(value, "valset"),  # without importing what tasks are made of
            "a Task, or a function without arguments that makes one",
        ),
        help="another task that tuned weights must not get worse at by more than `guard_margin`: each of the weights "
        "is asked its validation rows, and those that lose more are not used; its calls count",
    )
    guard_margin: float = _search(0.05, check=SHARE, help="mean score that weights may lose on the `guard`")
    optimizer_kwargs: Mapping[str, Mapping[str, Any]] = _search(
        None,
        check=mapping_check(
            "a dictionary of keyword arguments by optimizer, for instance {'miprov2': {'num_trials': 5}}",
            accepts=lambda value: (
                isinstance(value, Mapping) and all(isinstance(part, Mapping) for part in value.values())
            ),
            meaning=_check_optimizer_kwargs,
        ),
        help="arguments of DSPy's optimizers by name",
    )
    lora: LoraSettings | Mapping[str, Any] | None = _search(
        None,
        check=mapping_check(
            "a dictionary of LoRA settings, for instance {'rank': 8, 'epochs': 3}",
            accepts=lambda value: isinstance(value, (Mapping, LoraSettings)),
            meaning=lambda value: None if isinstance(value, LoraSettings) else check_lora(value),
        ),
        help="settings of the fine-tuning by name, see `LoraSettings`; those it does not name are the weights step's "
        "own",
    )
    held_out_share: float = _python(
        0.0, check=SHARE, help="share of the training rows kept for early stopping; 0 trains all epochs"
    )
    max_trials: int = 2000
    p_threshold: float = 0.1
    stop_without_headroom: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "got {name}={value!r}; {problem}")
        object.__setattr__(self, "groundings", tuple(self.groundings))
        object.__setattr__(self, "perturbations", tuple(self.perturbations))
        object.__setattr__(self, "optimizer_kwargs", dict(self.optimizer_kwargs or {}))

    def lora_settings(
        self, *, with_demos: bool, seed: int, suited: Mapping[str, Any] = MappingProxyType({})
    ) -> LoraSettings:
        """Settings of a training on rows with or without demonstrations; `suited` are the model's own, by name."""
        if isinstance(self.lora, LoraSettings):
            return self.lora
        # Fewer suffice with demonstrations: a row teaches ten answers, and every pass sees new ones.
        own = {"epochs": 4 if with_demos else 12, "seed": seed, "learn_from_demos": with_demos, **suited}
        return LoraSettings().replaced({**own, **(self.lora or {})})


# Budgets


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
