"""Settings of a session and of a test: read from where they were written, checked, and merged by one rule.

Precedence: command line > environment > ini file > marker > default. So a suite's marker says what is meant, and
whoever runs the suite can overrule it. Gates and search options are the other way round as far as an ini file goes:
what it says of them is a default that a marker overrules. Gates have no environment variables.

Not reachable from a suite on purpose: what belongs to the task (`metric`, `finetune_data`, `teacher`) and to the
session (`journal`, `on_progress`), and `held_out_share`, which is a LoRA setting (`lora={"held_out_share": .1}`).

The pytest plugin imports this module to register the options, so it loads nothing heavy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from copa_harness.errors import ConfigurationError
from copa_harness.formatting import ceiling
from copa_harness.judge.options import Gates
from copa_harness.optimize.options import SearchOptions, parse_budget
from copa_harness.option_fields import (
    COUNT,
    PATH,
    POSITIVE,
    SWITCH,
    Check,
    Option,
    Place,
    check_arguments,
    choice_check,
    option,
    options_in,
    options_of,
    same_option,
    text_check,
)
from copa_harness.results import Budget
from copa_harness.strategy import parse_strategy
from copa_harness.tune.options import LoraSettings

COMPARING = ("max_regression", "better_than")
"""Gates that compare example by example; those of a suite that ask the same question share one error rate."""


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


# The options of a session


def _check_device(name: Any) -> None:
    from copa_harness.lm.local.devices import checked_device

    checked_device(name)


def _check_dtype(name: Any) -> None:
    from copa_harness.lm.local.devices import checked_dtype

    checked_dtype(name)


def _check_shared(address: Any) -> None:
    if not address.startswith(("postgresql://", "postgres://")):
        raise ConfigurationError(
            "--copa-shared: got an address of another kind; expected postgresql://user:password@host:port/database"
        )


DEFAULT_LM = "embedded"

_MODEL = text_check("a model, for instance 'embedded', 'hf:<path>' or 'openai/<name>'")

_BUDGET = Check(
    lambda value: (
        isinstance(value, Budget) or (isinstance(value, str) and bool(value.strip())) or POSITIVE.accepts(value)
    ),
    "'light', 'medium', 'heavy', 'calls=500,usd=2' or a number",
    meaning=parse_budget,
)

_given = partial(option, places=Place.COMMAND_LINE | Place.ENVIRONMENT | Place.INI)
_ANYWHERE = Place.MARKER | Place.COMMAND_LINE | Place.ENVIRONMENT | Place.INI
_given_or_marked = partial(option, places=_ANYWHERE)


@dataclass(frozen=True, slots=True)
class Settings:
    """What every run of a session shares, or, merged with a test's marker, what holds for that test.

    Attributes:
        root: Directory that relative paths are relative to (pytest's rootdir).
        gates: Gates by name: those of the marker, and the ini file's where it says nothing.
        search: Search options that somebody gave, by name; what is left to `COPA` is not among them.
        families: By the name of a comparing gate, how many of it the test's suite (its folder) declares; of one that
            the test does not declare, how many tests there are, for any of them could ask `check()` for it.
        is_whole_suite: Whether the suite's folder was collected as a whole, whatever `-k` left of it.
        one_of_many: Whether other processes run tests of this session too.
        worker: This process's number among those of the session, from 0; None if it is the only one.
        run_id: The same in every process of the session, another in every session.
        forced: Names of options that a marker cannot change, because somebody overruled it.
    """

    root: Path
    strategy: str = option(
        "p -> w -> p",
        check=text_check("a strategy, for instance 'p -> w -> p'", meaning=parse_strategy),
        help="how weights and prompts are searched",
        places=Place.MARKER,
    )
    budget: Budget = _given_or_marked(
        parse_budget("light"),
        check=_BUDGET,
        default_words="light",
        metavar="LEVEL",
        help="ceiling of each optimization run: light (400 calls), medium (1,600), heavy (6,400), or ceilings such as "
        "calls=500,usd=2,tokens=1e6,seconds=600",
    )
    total_budget: Budget | None = _given(
        None,
        check=_BUDGET,
        metavar="CEILINGS",
        help="ceiling on what all tests and xdist workers of this session pay together, written like --copa-budget; "
        "what it cuts short is undecided, with exit status 6",
    )
    lm: str = _given_or_marked(
        DEFAULT_LM,
        check=_MODEL,
        metavar="MODEL",
        help="base model: embedded, smollm2, hf:<path or id>, gguf:<path>, or a name DSPy knows, such as openai/<name>",
    )
    models: str | None = _given_or_marked(
        None,
        check=text_check("names or patterns of models, for instance 'embedded', 'smollm2, hf:*' or '!embedded'"),
        default_words="all",
        metavar="PATTERNS",
        help="base models the tests are meant for ('!' before one they are not meant for); on others they are skipped",
    )
    prompt_lm: str | None = _given_or_marked(
        None, check=_MODEL, metavar="MODEL", help="model that proposes instructions"
    )
    seed: int = same_option(SearchOptions, "seed", metavar="N", places=_ANYWHERE)
    threads: int = same_option(SearchOptions, "threads", metavar="N", places=_ANYWHERE)
    repeat: int = _given(
        1,
        check=POSITIVE,
        metavar="K",
        help="answer every test example K times and report which answers are unstable",
    )
    canaries: int = _given(
        0,
        check=COUNT,
        default_words="none",
        metavar="N",
        help="ask for the stored answers of N test rows of every run again, paid and not stored, to find out whether "
        "the model still gives them (20 will do)",
    )
    cache_dir: Path = _given(
        Path(".copa_cache"),
        check=PATH,
        default_words=".copa_cache in the rootdir",
        metavar="DIR",
        help="answers, finished stages, LoRA adapters and artifacts",
    )
    shared: str | None = _given(
        None,
        check=text_check("postgresql://user@host/database", meaning=_check_shared),
        default_words="this machine's cache directory",
        metavar="URL",
        help="PostgreSQL database in which several machines share answers, budgets and finished optimizations; needs "
        "copa-harness[shared]; with a password better as COPA_SHARED",
    )
    shared_files: str | None = _given(
        None,
        check=text_check("a folder, or an address such as s3://bucket/prefix"),
        default_words="they stay on the machine that made them",
        metavar="URL",
        help="folder that several machines see, or an address that fsspec knows, where LoRA adapters and artifacts are "
        "kept too",
    )
    run: str | None = _given(
        None,
        check=text_check("a name of letters, digits, '.', '_' or '-'"),
        default_words="every session is its own",
        metavar="NAME",
        help="name of the run whose payments --copa-total-budget bounds, the same on every machine that takes part",
    )
    report_dir: Path = _given(
        Path("reports"),
        check=PATH,
        default_words="reports in the rootdir",
        metavar="DIR",
        help="latest.html, latest.json, comment.md and numbered copies",
    )
    report: str = _given(
        "short",
        check=choice_check("short", "full"),
        metavar="short|full",
        help="what the terminal shows at the end: one table and what needs attention, or (also by -v) every table; the "
        "page always has all",
    )
    mlflow: str | None = _given(
        None,
        check=text_check("a tracking URI, for instance 'http://localhost:5000' or 'sqlite:///mlflow.db'"),
        metavar="URI",
        help="log every run to MLflow there: parameters, scores with intervals, costs, the artifact",
    )
    baseline_dir: Path = _given(
        Path("baselines"),
        check=PATH,
        default_words="baselines in the rootdir",
        metavar="DIR",
        help="accepted results, one file per task and strategy",
    )
    missing_baseline: str | None = _given(
        None,
        check=Check(lambda value: value in ("fail", "pass"), "'fail' or 'pass'"),
        default_words="fail if the environment says CI=true, without --copa-against, else pass",
        metavar="WHAT",
        help="what becomes of a test whose max_regression has no baseline, or one of other data: it fails, or passes "
        "as not comparable",
    )
    device: str | None = _given(
        None,
        check=text_check("a device, for instance 'cuda:1'", meaning=_check_device),
        default_words="a GPU if there is one",
        metavar="DEVICE",
        help="where a local model runs: cpu, cuda, cuda:1",
    )
    ray: str | None = _given(
        None,
        check=text_check("auto, or the address of a cluster"),
        default_words="this process alone",
        metavar="auto|ADDRESS",
        help="Ray cluster whose devices answer for a local model, one engine each; needs copa-harness[ray]",
    )
    dtype: str | None = _given(
        None,
        check=text_check("float32, bfloat16 or float16", meaning=_check_dtype),
        default_words="float32, which is exact",
        metavar="TYPE",
        help="arithmetic of a local model: float32, bfloat16 or float16",
    )
    chat_template: Path | None = _given(
        None,
        check=PATH,
        default_words="its own",
        metavar="FILE",
        help="Jinja chat template of a local model, instead of its own",
    )
    api_base: str | None = _given(
        None,
        check=text_check("a URL, or several separated by commas"),
        default_words="DSPy's",
        metavar="URL",
        help="endpoint of the model, when it has one; given several times, requests are spread over servers of the "
        "same model",
        repeated=True,
    )
    base_weights: str | None = _given(
        None,
        check=_MODEL,
        metavar="MODEL",
        help="hf:<path or id>: a copy of the weights that a vLLM server runs as --copa-lm; LoRA adapters are trained "
        "on it here and served there",
    )
    served_lora_path: str | None = _given(
        None,
        check=text_check("a path on the server"),
        default_words="there",
        metavar="PATH",
        help="where the vLLM server sees the folder 'lora' of --copa-cache-dir",
    )
    constrain: bool = _given_or_marked(
        False,
        check=SWITCH,
        help="the layout of answers is given: output fields typed Literal, enum or bool get the likeliest allowed "
        "value, others are generated under their names; local models only",
    )
    answer_tokens: int | None = _given_or_marked(
        None,
        check=COUNT,
        default_words="what the output fields need",
        metavar="N",
        help="most tokens of one answer of a model without max_tokens of its own; by default labels and numbers by "
        "their length, free text 512 per field; 0 for no ceiling (not to be mistaken for the gate max_tokens)",
    )
    json_fallback: bool = _given_or_marked(
        False,
        check=SWITCH,
        help="ask again in JSON when an answer does not parse, as DSPy does by default; such answers cost two calls",
    )
    allow_pickled_weights: bool = _given(
        False,
        check=SWITCH,
        default_words="off, they are refused",
        help="read weights that come as a pickle only (pytorch_model.bin), once, with torch's restricted unpickler, "
        "and keep them as safetensors",
    )
    sequential: bool = _given(
        False, check=SWITCH, help="evaluate examples in a random order and stop as soon as the gates are decided"
    )
    disable: bool = _given(False, check=SWITCH, help="skip every copa test")
    against: str | None = option(
        None,
        check=text_check("a git ref, or merge-base"),
        default_words="the accepted baselines",
        metavar="REF",
        help="run the suite of that commit (merge-base: where this branch left the main one) with the same cache and "
        "seed, and compare every run with it; max_regression=0.05 where no gate says otherwise",
        places=Place.COMMAND_LINE | Place.ENVIRONMENT,
    )
    bless: bool = option(
        False,
        check=SWITCH,
        default_words="off; command line only",
        help="accept the results as the baselines that max_regression compares with",
        places=Place.COMMAND_LINE,
    )
    plan: bool = option(
        False,
        check=SWITCH,
        default_words="off; command line only",
        help="look into the cache only: make no call, say what a run would pay",
        places=Place.COMMAND_LINE,
    )
    gates: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)
    families: Mapping[str, int] = field(default_factory=dict)
    is_whole_suite: bool = True
    one_of_many: bool = False
    worker: int | None = None
    run_id: str = "run"
    forced: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name in ("budget", "total_budget"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, parse_budget(value))
        for name in ("cache_dir", "report_dir", "baseline_dir", "chat_template"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, (self.root / value).absolute())

    @classmethod
    def from_given(
        cls, given: Mapping[str, Setting], *, root: Path, worker: int | None = None, run_id: str = "run"
    ) -> Settings:
        """Settings from what was written somewhere, by option name (`"budget"`, `"cache_dir"`, `"min_score"`, ...).

        The rest as in `Settings`.

        Raises:
            ConfigurationError: A value cannot be used, or two do not go together; the message names the source.
        """
        own, gates, search = (
            {name: setting.read(known[name]) for name, setting in given.items() if name in known}
            for known in (options_of(cls), _reachable("Gates"), _reachable("SearchOptions"))
        )
        forced = frozenset(name for name, setting in given.items() if name in own or setting.overrules_marker)
        run_id = own.get("run") or run_id
        settings = cls(root=root, gates=gates, search=search, worker=worker, run_id=run_id, forced=forced, **own)
        if settings.against is not None and settings.bless:
            raise ConfigurationError(
                "--copa-against compares with another commit, --copa-bless accepts results; expected one of the two."
            )
        if settings.sequential and (settings.bless or settings.repeat > 1):
            other = (
                "--copa-bless needs the scores of all examples"
                if settings.bless
                else "--copa-repeat evaluates all of them"
            )
            raise ConfigurationError(
                f"--copa-sequential stops before all examples are evaluated, and {other}; expected one of the two."
            )
        return settings

    def merged(self, **said: Any) -> Settings:
        """These settings with what a marker says and nobody overruled.

        Args:
            **said: Checked arguments of a marker, see `marker_arguments`; None leaves it to the settings.
        """
        free = {name: value for name, value in said.items() if value is not None and name not in self.forced}
        own, gates, search = (
            {name: value for name, value in free.items() if name in known}
            for known in (options_in(type(self), Place.MARKER), _reachable("Gates"), _reachable("SearchOptions"))
        )
        return replace(self, gates={**self.gates, **gates}, search={**self.search, **search}, **own)

    @property
    def why_skipped(self) -> str | None:
        """Why a test with these settings is not meant for its base model; None if it is."""
        patterns = re.split(r"[,\s]+", (self.models or "*").strip())
        unmeant = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
        meant = [pattern for pattern in patterns if not pattern.startswith("!")]
        is_unmeant, is_meant = (any(fnmatchcase(self.lm, one) for one in some) for some in (unmeant, meant))
        if not is_unmeant and (is_meant or not meant):
            return None
        said = f"not meant for {self.lm}" if is_unmeant else f"meant for {' or '.join(meant)}, not for {self.lm}"
        return f"{said} (models={self.models!r}); --copa-models='*' runs them all the same"

    @property
    def needs_baselines(self) -> bool:
        """Whether a test fails that has nothing to compare itself with though it asks for it."""
        if self.bless or self.missing_baseline is not None:
            return not self.bless and self.missing_baseline == "fail"
        # Compared with another commit, a test that is new here has no other side, and that is said.
        return self.against is None and os.environ.get("CI", "").lower() in ("true", "1")

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
                (f"{self.canaries} canaries a run", self.canaries > 0),
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


@dataclass(frozen=True, slots=True)
class Setting:
    """A value as somebody wrote it, and where.

    Attributes:
        value: The text.
        source: "--copa-budget", for messages.
        overrules_marker: Whether a marker cannot change it, where it is a gate or a search option.
    """

    value: str
    source: str
    overrules_marker: bool = True

    def read(self, known: Option) -> Any:
        """What it means.

        Raises:
            ConfigurationError: It cannot be used; the message names its source.
        """
        try:
            return known.check.from_text(self.value)
        except ConfigurationError as error:
            raise ConfigurationError(f"{self.source}: {error}") from None


# The marker

OPTION_KINDS: dict[str, type] = {
    "Settings": Settings,
    "Gates": Gates,
    "SearchOptions": SearchOptions,
    "LoraSettings": LoraSettings,
}
"""Every dataclass of options by name."""


def _reachable(kind: str) -> dict[str, Option]:
    """The options of a dataclass that a marker may name."""
    return options_in(OPTION_KINDS[kind], Place.MARKER)


def marker_options() -> dict[str, Option]:
    """What `@pytest.mark.copa(...)` may say, by name."""
    return _reachable("Settings") | _reachable("Gates") | _reachable("SearchOptions")


def marker_arguments(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Checked arguments of a marker.

    Raises:
        ConfigurationError: An unknown or ill-typed argument, by name, with the nearest known one.
    """
    if arguments:
        raise ConfigurationError(
            f"copa marker: got the positional argument {arguments[0]!r}; expected keywords, "
            f"for instance copa(strategy={arguments[0]!r})."
        )
    check_arguments(keywords, marker_options(), where="copa marker")
    return dict(keywords)


def check_gates(given: Mapping[str, Any], *, where: str) -> None:
    """Raise `ConfigurationError` unless all are gates with usable values."""
    check_arguments(given, _reachable("Gates"), where=where)
