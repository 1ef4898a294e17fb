"""Settings of a session and arguments of the `copa` marker: checked, typed, and merged by one rule.

Precedence: command line > environment > ini file > marker > default. So a suite's marker says what is meant, and
whoever runs the suite can overrule it. Knows nothing of pytest, models or files; imports nothing heavy.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from copa_harness.errors import ConfigurationError
from copa_harness.optimize.budgets import parse_budget
from copa_harness.optimize.strategy import parse_strategy
from copa_harness.results import Budget

DEFAULT_STRATEGY = "p -> w -> p"
DEFAULT_LM = "embedded"


@dataclass(frozen=True, slots=True)
class Setting:
    """A value as somebody wrote it, and where: `Setting("light", "--copa-budget")`."""

    value: str
    source: str


@dataclass(frozen=True, slots=True)
class Settings:
    """What every run of a session shares.

    Attributes:
        root: Directory that relative paths in reports are relative to (pytest's rootdir).
        cache_dir: Responses, finished stages, LoRA adapters and artifacts.
        report_dir: `latest.json`, `latest.md` and numbered copies.
        budget: Ceiling of each optimization run.
        lm: The base model: `embedded`, `hf:<path or id>`, or a name DSPy knows.
        prompt_lm: Model that proposes instructions; None proposes without one.
        seed: Seed of every random choice.
        threads: Examples in flight at once.
        api_base: URL of the endpoint, for models that have one.
        bless: Accept the results as the new baselines.
        forced: Names given on the command line, in the environment or in the ini file; a marker cannot change them.
    """

    root: Path
    cache_dir: Path
    report_dir: Path
    budget: Budget = field(default_factory=lambda: parse_budget("light"))
    lm: str = DEFAULT_LM
    prompt_lm: str | None = None
    seed: int = 0
    threads: int = 32
    api_base: str | None = None
    bless: bool = False
    forced: frozenset[str] = frozenset()

    @classmethod
    def from_given(cls, given: Mapping[str, Setting], *, root: Path, bless: bool = False) -> Settings:
        """Settings from what was written somewhere, by option name (`"budget"`, `"cache_dir"`, ...).

        Raises:
            ConfigurationError: A value cannot be used; the message names its source.
        """
        values: dict[str, Any] = {"cache_dir": root / ".copa_cache", "report_dir": root / "reports"}
        for name, setting in given.items():
            try:
                values[name] = _PARSERS[name](setting.value)
            except ConfigurationError as error:
                raise ConfigurationError(f"{setting.source}: {error}") from None
        for name in ("cache_dir", "report_dir"):
            values[name] = (root / values[name]).absolute()
        return cls(root=root, bless=bless, forced=frozenset(given), **values)

    def merged(self, marker: MarkerArguments) -> Settings:
        """These settings with what the marker says and nobody overruled."""
        changes: dict[str, Any] = {
            name: getattr(marker, name)
            for name in ("lm", "prompt_lm", "seed", "threads")
            if getattr(marker, name) is not None and name not in self.forced
        }
        if marker.budget is not None and "budget" not in self.forced:
            changes["budget"] = parse_budget(marker.budget)
        return replace(self, **changes) if changes else self

    def describe(self) -> str:
        """One line for the terminal: the ceilings in force, the model, the seed, where things are kept."""
        calls = f"{self.budget.calls:,.0f}" if self.budget.calls != float("inf") else "unlimited"
        overruled = "" if "budget" in self.forced else " (unless a marker says otherwise)"
        cache = self.cache_dir.relative_to(self.root) if self.cache_dir.is_relative_to(self.root) else self.cache_dir
        return (
            f"copa: budget {self.budget.name} = {calls} calls per run{overruled}, lm {self.lm}, seed {self.seed}, "
            f"cache {cache}"
        )


@dataclass(frozen=True, slots=True)
class MarkerArguments:
    """What `@pytest.mark.copa(...)` may say; None leaves it to the settings.

    Attributes:
        strategy: How weights and prompts are searched, for instance `"p -> w -> p"`.
        budget: `"light"`, `"medium"`, `"heavy"`, `"calls=500"` or a number of calls.
        min_score: Gate: the mean test score must reach this, 0..1.
        max_regression: Gate: the largest drop below the baseline that is acceptable, 0..1.
        max_calls: Gate: model calls the run may have paid for.
        max_error_rate: Gate: share of test examples that may lack a score, 0..1.
        lm: Base model.
        prompt_lm: Model that proposes instructions.
        seed: Seed of every random choice.
        threads: Examples in flight at once.
        max_cycles: Rounds of an alternating strategy at most.
        epsilon: Improvement per round below which an alternating strategy has converged, 0..1.
        optimizer_kwargs: Arguments of DSPy optimizers by name: `{"miprov2": {"num_trials": 5}}`.
        undecided_fails: Whether gates that are undecided or not comparable fail the test.
    """

    strategy: str | None = None
    budget: str | int | None = None
    min_score: float | None = None
    max_regression: float | None = None
    max_calls: int | None = None
    max_error_rate: float | None = None
    lm: str | None = None
    prompt_lm: str | None = None
    seed: int | None = None
    threads: int | None = None
    max_cycles: int | None = None
    epsilon: float | None = None
    optimizer_kwargs: Mapping[str, Any] | None = None
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
        known = [entry.name for entry in fields(cls)]
        for name, value in keywords.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                meant = f" Did you mean {near[0]!r}?" if near else ""
                raise ConfigurationError(
                    f"copa marker: unknown argument {name!r}.{meant} Known arguments: {', '.join(known)}."
                )
            accepts, expected = _CHECKS[name]
            if value is not None and not accepts(value):
                raise ConfigurationError(f"copa marker: {name}={value!r}; expected {expected}.")
        marker = cls(**keywords)
        try:
            if marker.strategy is not None:
                parse_strategy(marker.strategy)
            if marker.budget is not None:
                parse_budget(marker.budget)
        except ConfigurationError as error:
            raise ConfigurationError(f"copa marker: {error}") from None
        return marker


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value <= 1.0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_positive(value: Any) -> bool:
    return _is_count(value) and value > 0


_SHARE = (_is_share, "a number from 0 to 1")
_COUNT = (_is_count, "a whole number, 0 or more")
_POSITIVE = (_is_positive, "a whole number, 1 or more")
_MODEL = (_is_text, "a model, for instance 'embedded', 'hf:<path>' or 'openai/<name>'")

_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "strategy": (_is_text, "a strategy, for instance 'p -> w -> p'"),
    "budget": (
        lambda value: _is_text(value) or _is_positive(value),
        "'light', 'medium', 'heavy', 'calls=500' or a number",
    ),
    "min_score": _SHARE,
    "max_regression": _SHARE,
    "max_calls": _COUNT,
    "max_error_rate": _SHARE,
    "lm": _MODEL,
    "prompt_lm": _MODEL,
    "seed": _COUNT,
    "threads": _POSITIVE,
    "max_cycles": _POSITIVE,
    "epsilon": _SHARE,
    "optimizer_kwargs": (
        lambda value: isinstance(value, Mapping) and all(isinstance(part, Mapping) for part in value.values()),
        "a dictionary of keyword arguments by optimizer, for instance {'miprov2': {'num_trials': 5}}",
    ),
    "undecided_fails": (lambda value: isinstance(value, bool), "True or False"),
}


def _text(value: str) -> str:
    if not value.strip():
        raise ConfigurationError("got an empty value; leave it out or say something.")
    return value.strip()


def _whole(least: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            number = least - 1
        if number < least:
            raise ConfigurationError(f"got {value!r}, expected a whole number, {least} or more.")
        return number

    return parse


_PARSERS: dict[str, Callable[[str], Any]] = {
    "budget": parse_budget,
    "lm": _text,
    "prompt_lm": _text,
    "seed": _whole(0),
    "threads": _whole(1),
    "cache_dir": _text,
    "report_dir": _text,
    "api_base": _text,
}
