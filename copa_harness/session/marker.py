"""Arguments of the `copa` marker: which there are, what they mean, and which of them are gates.

Not reachable on purpose: what belongs to the task (`metric`, `finetune_data`, `teacher`), to the session (`journal`,
`on_progress`), and `held_out_share`, which is a LoRA setting (`lora={"held_out_share": .1}`). Knows nothing of pytest,
models or files; imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from copa_harness.errors import ConfigurationError
from copa_harness.optimize.budgets import parse_budget
from copa_harness.optimize.choices import check_groundings, check_sampler
from copa_harness.optimize.limits import check_optimizer_kwargs, parse_limits
from copa_harness.optimize.pareto import parse_preference
from copa_harness.optimize.strategy import parse_strategy
from copa_harness.session.checking import check_arguments
from copa_harness.tune.settings import check_lora

DEFAULT_STRATEGY = "p -> w -> p"

GATES = (
    "min_score", "max_regression", "better_than", "max_calls", "max_tokens", "max_usd", "max_seconds",
    "max_cost_per_answer", "max_error_rate", "min_pass_all", "undecided_fails",
)  # fmt: skip
"""Marker arguments that are gates; each has an ini default `copa_<name>`."""

SEARCH = (
    "max_cycles", "epsilon", "constraints", "prefer", "sampler", "patience", "adoption_p", "trials_at_once",
    "max_demos", "n_demo_sets", "bootstrap", "pass_score", "n_proposed", "groundings", "n_reflected", "transfer",
    "n_rounds", "n_checkpoints", "epochs_with_demos", "epochs_bare", "bare_share", "optimizer_kwargs", "lora",
)  # fmt: skip
"""Marker arguments that are `COPA`'s and say how it searches."""

_MEANINGS: Mapping[str, Callable[[Any], object]] = {
    "strategy": parse_strategy,
    "prefer": parse_preference,
    "budget": parse_budget,
    "lora": check_lora,
    "sampler": check_sampler,
    "groundings": check_groundings,
    "constraints": parse_limits,
    "optimizer_kwargs": check_optimizer_kwargs,
}
"""What reads an argument, and refuses it when it means nothing."""

_NAMES_IN_COPA = {"pass_score": "min_score"}  # a suite's min_score is a gate

COMPARING = ("max_regression", "better_than")
"""Gates that compare example by example; those of a suite share one error rate."""


def comparisons_in(code: Any) -> frozenset[str]:
    """The comparing gates that a test function names when it calls `check()`, read from its code.

    Keyword names of a call are constants of the code that makes it, so nothing is run. Gates that a helper elsewhere
    asks for, or that come as `**gates`, are not seen.

    Args:
        code: `__code__` of a function.
    """
    if "check" not in code.co_names:
        return frozenset()
    names = {name for constant in code.co_consts if isinstance(constant, tuple) for name in constant}
    return frozenset(name for name in COMPARING if name in names)


@dataclass(frozen=True, slots=True)
class MarkerArguments:
    """What `@pytest.mark.copa(...)` may say; None leaves it to the settings.

    Attributes:
        strategy: How weights and prompts are searched, for instance `"p -> w -> p"`.
        budget: `"light"`, `"medium"`, `"heavy"`, `"calls=500"` or a number of calls.
        min_score: Gate: the mean test score must reach this, 0..1.
        max_regression: Gate: the largest drop below the baseline that is acceptable, 0..1.
        better_than: Gate: a strategy run earlier, or a baseline, that must be beaten.
        max_calls: Gate: distinct model calls the optimization may make.
        max_tokens: Gate: tokens the optimization may pay for.
        max_usd: Gate: dollars the optimization may cost.
        max_seconds: Gate: seconds the optimization may take.
        max_cost_per_answer: Gate: dollars one answer of the final program may cost.
        max_error_rate: Gate: share of test examples that may lack a score, 0..1.
        min_pass_all: Gate: share of test examples that must pass every repeat, 0..1.
        lm: Base model.
        prompt_lm: Model that proposes instructions.
        seed: Seed of every random choice.
        threads: Examples in flight at once.
        constrain: Whether output fields with a list of allowed values get the likeliest of them.
        max_cycles: Rounds of an alternating strategy at most.
        epsilon: Improvement per round below which an alternating strategy has converged, 0..1.
        constraints: Limits the returned program keeps: `{"max_prompt_tokens": 800, "forbidden_text": ["..."]}`.
        prefer: `"best"`, or `"cheapest within 1 point of best"` (also `shortest`, `fastest`).
        sampler: Optuna's sampler: `"tpe"`, `"random"` or `"gp"`.
        patience: Trials in a row without improvement that end a study.
        adoption_p: Level of the paired test that the result must pass against the program as written, 0..1.
        trials_at_once: Candidates that race the best one together; more for processes that share a search.
        max_demos: Demonstrations in the largest sets.
        n_demo_sets: Demonstration sets proposed per predictor and round.
        bootstrap: Whether demonstrations are taken from the program's own passing traces.
        pass_score: Score from which a trace passes, 0..1 (`COPA`'s min_score).
        n_proposed: Instructions asked of the prompt model per predictor and round.
        groundings: What the prompt model may be shown: `["data", "history"]`; which of them is learned.
        n_reflected: Examples whose wrong answers the prompt model reflects on; 0 does not.
        transfer: Whether bare instructions are tried, to see which demonstrations they make redundant.
        n_rounds: Rounds of proposing and searching in a prompt or joint step.
        n_checkpoints: Earlier epochs of a training offered as weights besides its last.
        epochs_with_demos: Passes over training rows that carry demonstrations.
        epochs_bare: Passes over training rows without.
        bare_share: Share of the rows also rendered bare when rows carry demonstrations, 0..1.
        optimizer_kwargs: Arguments of DSPy optimizers by name: `{"miprov2": {"num_trials": 5}}`.
        lora: Settings of the fine-tuning by name: `{"rank": 8, "epochs": 3}`; see `LoraSettings`.
        undecided_fails: Whether gates that are undecided or not comparable fail the test.
    """

    strategy: str | None = None
    budget: str | int | None = None
    min_score: float | None = None
    max_regression: float | None = None
    better_than: str | None = None
    max_calls: int | None = None
    max_tokens: float | None = None
    max_usd: float | None = None
    max_seconds: float | None = None
    max_cost_per_answer: float | None = None
    max_error_rate: float | None = None
    min_pass_all: float | None = None
    lm: str | None = None
    prompt_lm: str | None = None
    seed: int | None = None
    threads: int | None = None
    constrain: bool | None = None
    max_cycles: int | None = None
    epsilon: float | None = None
    constraints: Mapping[str, Any] | None = None
    prefer: str | None = None
    sampler: str | None = None
    patience: int | None = None
    adoption_p: float | None = None
    trials_at_once: int | None = None
    max_demos: int | None = None
    n_demo_sets: int | None = None
    bootstrap: bool | None = None
    pass_score: float | None = None
    n_proposed: int | None = None
    groundings: Sequence[str] | None = None
    n_reflected: int | None = None
    transfer: bool | None = None
    n_rounds: int | None = None
    n_checkpoints: int | None = None
    epochs_with_demos: int | None = None
    epochs_bare: int | None = None
    bare_share: float | None = None
    optimizer_kwargs: Mapping[str, Any] | None = None
    lora: Mapping[str, Any] | None = None
    undecided_fails: bool | None = None

    @classmethod
    def from_marker(cls, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> MarkerArguments:
        """Checked arguments of a marker.

        Raises:
            ConfigurationError: An unknown or ill-typed argument, by name, with the nearest known one.
        """
        if arguments:
            raise ConfigurationError(
                f"copa marker: got the positional argument {arguments[0]!r}; expected keywords, "
                f"for instance copa(strategy={arguments[0]!r})."
            )
        check_arguments(keywords, known=[entry.name for entry in fields(cls)], where="copa marker")
        marker = cls(**keywords)
        try:
            for name, check in _MEANINGS.items():
                if (value := getattr(marker, name)) is not None:
                    check(value)
        except ConfigurationError as error:
            raise ConfigurationError(f"copa marker: {error}") from None
        return marker

    def search_settings(self) -> dict[str, Any]:
        """Arguments of `COPA` by name, and no word about what is left to the optimizer."""
        given = {_NAMES_IN_COPA.get(name, name): getattr(self, name) for name in SEARCH}
        return {name: value for name, value in given.items() if value is not None}
