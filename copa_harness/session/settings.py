"""Settings of a session: checked, typed, and merged with the marker's arguments by one rule.

Precedence: command line > environment > ini file > marker > default. So a suite's marker says what is meant, and
whoever runs the suite can overrule it. Gates alone are the other way round: what an ini file says of them is a default
that a marker overrules.

Arguments of the `copa` marker: which there are, what they mean, and which of them are gates.

Not reachable on purpose: what belongs to the task (`metric`, `finetune_data`, `teacher`), to the session (`journal`,
`on_progress`), and `held_out_share`, which is a LoRA setting (`lora={"held_out_share": .1}`).

Checks of arguments by name and type, with a message that names the nearest known one.

They hold for the marker, for gates given to `copa_run.check(...)` and, as defaults, in the ini file.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from copa_harness.errors import ConfigurationError
from copa_harness.lm.local.devices import checked_device, checked_dtype
from copa_harness.optimize.dspy_optimizers.kwargs import check_optimizer_kwargs
from copa_harness.optimize.options import check_groundings, check_sampler, parse_budget, parse_limits, parse_preference
from copa_harness.results import Budget
from copa_harness.strategy import parse_strategy
from copa_harness.tune.settings import check_lora
from copa_harness.wording import ceiling


def check_arguments(given: Mapping[str, Any], *, known: Sequence[str], where: str) -> None:
    """Raise unless every argument is known and of a usable value; None is always usable.

    Raises:
        ConfigurationError: An unknown or ill-typed argument, by name, with the nearest known one.
    """
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigurationError(f"{where}: unknown argument {name!r}.{meant} Known arguments: {', '.join(known)}.")
        accepts, expected = _CHECKS[name]
        if value is not None and not accepts(value):
            in_percent = accepts is _is_share and type(value) in (int, float) and 1 < value <= 100
            meant = f"; write {value / 100:g} for {value:g} %" if in_percent else ""
            raise ConfigurationError(f"{where}: {name}={value!r}; expected {expected}{meant}.")


def parse_gate(name: str, text: str) -> Any:
    """A gate's value as an ini file writes it.

    Raises:
        ConfigurationError: It is none.
    """
    value: Any = text.strip()
    if name == "undecided_fails":
        value = {**dict.fromkeys(_YES, True), **dict.fromkeys(_NO, False)}.get(value.lower(), value)
    elif name != "better_than":
        try:
            number = float(value)
            value = int(number) if name == "max_calls" and number.is_integer() else number
        except ValueError:
            pass  # the check below says what was expected
    accepts, expected = _CHECKS[name]
    if not accepts(value):
        raise ConfigurationError(f"got {text!r}, expected {expected}.")
    return value


_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value <= 1.0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_amount(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_positive(value: Any) -> bool:
    return _is_count(value) and value > 0


_SHARE = (_is_share, "a number from 0 to 1")

_COUNT = (_is_count, "a whole number, 0 or more")

_AMOUNT = (_is_amount, "a number, 0 or more")

_POSITIVE = (_is_positive, "a whole number, 1 or more")

_SWITCH = (lambda value: isinstance(value, bool), "True or False")

_MODEL = (_is_text, "a model, for instance 'embedded', 'hf:<path>' or 'openai/<name>'")

_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "strategy": (_is_text, "a strategy, for instance 'p -> w -> p'"),
    "budget": (
        lambda value: _is_text(value) or _is_positive(value),
        "'light', 'medium', 'heavy', 'calls=500,usd=2' or a number",
    ),
    "min_score": _SHARE,
    "max_regression": _SHARE,
    "max_calls": _COUNT,
    "max_tokens": _AMOUNT,
    "max_usd": _AMOUNT,
    "max_seconds": _AMOUNT,
    "max_cost_per_answer": _AMOUNT,
    "max_error_rate": _SHARE,
    "min_pass_all": _SHARE,
    "better_than": (_is_text, "the name of a strategy or baseline, for instance 'none'"),
    "lm": _MODEL,
    "prompt_lm": _MODEL,
    "seed": _COUNT,
    "threads": _POSITIVE,
    "constrain": _SWITCH,
    "max_cycles": _POSITIVE,
    "epsilon": _SHARE,
    "constraints": (
        lambda value: isinstance(value, Mapping) and bool(value),
        "a dictionary of limits, for instance {'max_prompt_tokens': 800}",
    ),
    "sampler": (_is_text, "'tpe', 'random' or 'gp'"),
    "patience": _POSITIVE,
    "adoption_p": _SHARE,
    "max_demos": _COUNT,
    "n_demo_sets": _COUNT,
    "bootstrap": _SWITCH,
    "pass_score": _SHARE,
    "n_proposed": _COUNT,
    "groundings": (lambda value: isinstance(value, (list, tuple)), "a list, for instance ['data', 'history']"),
    "n_reflected": _COUNT,
    "transfer": _SWITCH,
    "n_rounds": _POSITIVE,
    "n_checkpoints": _COUNT,
    "epochs_with_demos": _POSITIVE,
    "epochs_bare": _POSITIVE,
    "bare_share": _SHARE,
    "prefer": (_is_text, "'best' or 'cheapest within 1 point of best'"),
    "optimizer_kwargs": (
        lambda value: isinstance(value, Mapping) and all(isinstance(part, Mapping) for part in value.values()),
        "a dictionary of keyword arguments by optimizer, for instance {'miprov2': {'num_trials': 5}}",
    ),
    "lora": (
        lambda value: isinstance(value, Mapping),
        "a dictionary of LoRA settings, for instance {'rank': 8, 'epochs': 3}",
    ),
    "undecided_fails": _SWITCH,
}

DEFAULT_STRATEGY = "p -> w -> p"

GATES = (
    "min_score",
    "max_regression",
    "better_than",
    "max_calls",
    "max_tokens",
    "max_usd",
    "max_seconds",
    "max_cost_per_answer",
    "max_error_rate",
    "min_pass_all",
    "undecided_fails",
)
"""Marker arguments that are gates; each has an ini default `copa_<name>`."""

SEARCH = (
    "max_cycles",
    "epsilon",
    "constraints",
    "prefer",
    "sampler",
    "patience",
    "adoption_p",
    "max_demos",
    "n_demo_sets",
    "bootstrap",
    "pass_score",
    "n_proposed",
    "groundings",
    "n_reflected",
    "transfer",
    "n_rounds",
    "n_checkpoints",
    "epochs_with_demos",
    "epochs_bare",
    "bare_share",
    "optimizer_kwargs",
    "lora",
)
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
        baseline_dir: Accepted results, `<task>/<strategy>.json`.
        budget: Ceiling of each optimization run.
        total_budget: Ceiling on what all runs of all processes of the session pay together; None for none.
        lm: The base model: `embedded`, `hf:<path or id>`, or a name DSPy knows.
        prompt_lm: Model that proposes instructions; None proposes without one.
        seed: Seed of every random choice.
        threads: Examples in flight at once.
        repeat: How often every test example is answered.
        constrain: Output fields with a list of allowed values get the likeliest of them; local models only.
        device: Where a local model runs; None leaves it to the engine.
        dtype: Arithmetic of a local model; None is float32.
        chat_template: File that replaces a local model's own chat template.
        allow_pickled_weights: Read weights that come as a pickle only, once and restrictedly.
        api_base: URL of the endpoint, for models that have one.
        base_weights: `hf:<path or id>`: a copy of the weights that a vLLM server runs as `lm`, to be fine-tuned.
        served_lora_path: Where that server sees the folder of LoRA adapters; None if it sees it where it is.
        bless: Accept the results as the new baselines.
        sequential: Stop an evaluation as soon as its gates are decided.
        plan: Look into the cache only, make no call, and say what a run would pay.
        gates: Gates that hold where a marker does not say otherwise, by name.
        n_comparisons: Gates of the session that compare example by example; they share one error rate.
        n_unannounced: Tests that may ask `check()` for a comparison nobody announced; those share one as well.
        announced: Comparing gates that are counted in `n_comparisons`, by test id.
        one_of_many: Whether other processes run tests of this session too.
        worker: This process's number among those of the session, from 0; None if it is the only one.
        run_id: The same in every process of the session, another in every session.
        forced: Names given on the command line, in the environment or in the ini file; a marker cannot change them.
    """

    root: Path
    cache_dir: Path
    report_dir: Path
    baseline_dir: Path = Path("baselines")
    budget: Budget = field(default_factory=lambda: parse_budget("light"))
    total_budget: Budget | None = None
    lm: str = DEFAULT_LM
    prompt_lm: str | None = None
    seed: int = 0
    threads: int = 32
    repeat: int = 1
    constrain: bool = False
    device: str | None = None
    dtype: str | None = None
    chat_template: Path | None = None
    allow_pickled_weights: bool = False
    api_base: str | None = None
    base_weights: str | None = None
    served_lora_path: str | None = None
    bless: bool = False
    sequential: bool = False
    plan: bool = False
    gates: Mapping[str, Any] = field(default_factory=dict)
    n_comparisons: int = 1
    n_unannounced: int = 1
    announced: Mapping[str, frozenset[str]] = field(default_factory=dict)
    one_of_many: bool = False
    worker: int | None = None
    run_id: str = "run"
    forced: frozenset[str] = frozenset()

    @classmethod
    def from_given(
        cls,
        given: Mapping[str, Setting],
        *,
        root: Path,
        bless: bool = False,
        plan: bool = False,
        gates: Mapping[str, Setting] | None = None,
        worker: int | None = None,
        run_id: str = "run",
    ) -> Settings:
        """Settings from what was written somewhere, by option name (`"budget"`, `"cache_dir"`, ...).

        Args:
            given: Options with a value.
            root: See `Settings`.
            bless: See `Settings`.
            plan: See `Settings`.
            gates: Defaults of gates by name.
            worker: See `Settings`.
            run_id: See `Settings`.

        Raises:
            ConfigurationError: A value cannot be used, or two do not go together; the message names the source.
        """
        values: dict[str, Any] = {
            "cache_dir": root / ".copa_cache",
            "report_dir": root / "reports",
            "baseline_dir": root / "baselines",
        }
        for name, setting in given.items():
            values[name] = _from_source(setting, _PARSERS[name])
        for name in ("cache_dir", "report_dir", "baseline_dir"):
            values[name] = (root / values[name]).absolute()
        if "chat_template" in values:
            values["chat_template"] = (root / values["chat_template"]).absolute()
        defaults = {name: _from_source(setting, partial(parse_gate, name)) for name, setting in (gates or {}).items()}
        settings = cls(
            root=root,
            bless=bless,
            plan=plan,
            gates=defaults,
            worker=worker,
            run_id=run_id,
            forced=frozenset(given),
            **values,
        )
        if settings.sequential and (bless or settings.repeat > 1):
            other = "--copa-bless needs the scores of all examples" if bless else "--copa-repeat evaluates all of them"
            raise ConfigurationError(
                f"--copa-sequential stops before all examples are evaluated, and {other}; expected one of the two."
            )
        return settings

    def merged(self, marker: MarkerArguments) -> Settings:
        """These settings with what the marker says and nobody overruled."""
        changes: dict[str, Any] = {
            name: getattr(marker, name)
            for name in ("lm", "prompt_lm", "seed", "threads", "constrain")
            if getattr(marker, name) is not None and name not in self.forced
        }
        if marker.budget is not None and "budget" not in self.forced:
            changes["budget"] = parse_budget(marker.budget)
        return replace(self, **changes) if changes else self

    def gates_of(self, marker: MarkerArguments) -> dict[str, Any]:
        """The gates that hold for a run, by name: the marker's, and the defaults for what it does not say."""
        said = {name: getattr(marker, name) for name in GATES if getattr(marker, name) is not None}
        return {**self.gates, **said}

    def describe(self) -> str:
        """One line for the terminal: the ceilings in force, the model, the seed, where things are kept."""
        overruled = "" if "budget" in self.forced else " (unless a marker says otherwise)"
        cache = self.cache_dir.relative_to(self.root) if self.cache_dir.is_relative_to(self.root) else self.cache_dir
        total = "" if self.total_budget is None else f", {_ceilings(self.total_budget)} for the whole session"
        modes = "".join(
            f", {text}"
            for text, is_on in (
                ("plan only: no call is made", self.plan),
                ("stopping early", self.sequential),
                ("constrained answers", self.constrain),
                (f"{self.repeat} repeats", self.repeat > 1),
            )
            if is_on
        )
        return (
            f"copa: budget {self.budget.name} = {_ceilings(self.budget)} per run{overruled}{total}, lm {self.lm}, "
            f"seed {self.seed}{modes}, cache {cache}"
        )


def _ceilings(budget: Budget) -> str:
    """`400 calls, $2, 600 seconds`, or `unlimited calls`."""
    return ", ".join(ceiling(name, value) for name, value in budget.ceilings.items()) or "unlimited calls"


def _from_source(setting: Setting, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(setting.value)
    except ConfigurationError as error:
        raise ConfigurationError(f"{setting.source}: {error}") from None


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


def _switch(value: str) -> bool:
    text = value.strip().lower()
    if text not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
        raise ConfigurationError(f"got {value!r}, expected true or false.")
    return text in ("1", "true", "yes", "on")


_PARSERS: dict[str, Callable[[str], Any]] = {
    "budget": parse_budget,
    "total_budget": parse_budget,
    "lm": _text,
    "prompt_lm": _text,
    "seed": _whole(0),
    "threads": _whole(1),
    "repeat": _whole(1),
    "sequential": _switch,
    "constrain": _switch,
    "device": checked_device,
    "dtype": checked_dtype,
    "chat_template": _text,
    "allow_pickled_weights": _switch,
    "cache_dir": _text,
    "report_dir": _text,
    "baseline_dir": _text,
    "api_base": _text,
    "base_weights": _text,
    "served_lora_path": _text,
}
