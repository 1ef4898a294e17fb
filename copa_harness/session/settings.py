"""Settings of a session: checked, typed, and merged with the marker's arguments by one rule.

Precedence: command line > environment > ini file > marker > default. So a suite's marker says what is meant, and
whoever runs the suite can overrule it. Gates alone are the other way round: what an ini file says of them is a default
that a marker overrules. Knows nothing of pytest, models or files; imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from copa_harness.errors import ConfigurationError
from copa_harness.lm.local_devices import checked_device, checked_dtype
from copa_harness.optimize.budgets import parse_budget
from copa_harness.results import Budget
from copa_harness.session.checking import parse_gate
from copa_harness.session.marker import DEFAULT_STRATEGY, GATES, MarkerArguments

__all__ = ["DEFAULT_LM", "DEFAULT_STRATEGY", "MarkerArguments", "Setting", "Settings"]

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
            "cache_dir": root / ".copa_cache", "report_dir": root / "reports", "baseline_dir": root / "baselines",
        }  # fmt: skip
        for name, setting in given.items():
            values[name] = _from_source(setting, _PARSERS[name])
        for name in ("cache_dir", "report_dir", "baseline_dir"):
            values[name] = (root / values[name]).absolute()
        if "chat_template" in values:
            values["chat_template"] = (root / values["chat_template"]).absolute()
        defaults = {
            name: _from_source(setting, partial(parse_gate, name))
            for name, setting in (gates or {}).items()
        }
        settings = cls(
            root=root, bless=bless, plan=plan, gates=defaults, worker=worker, run_id=run_id, forced=frozenset(given),
            **values,
        )  # fmt: skip
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
    parts = [
        f"${amount:,g}" if name == "usd" else f"{amount:,.10g} {name.replace('_', ' ')}"
        for name, amount in budget.ceilings.items()
    ]
    return ", ".join(parts) or "unlimited calls"


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
