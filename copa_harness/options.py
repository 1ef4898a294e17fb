"""The plugin's options, their twins in the environment and the ini file, and what was given of them.

Like `plugin.py` this module imports pytest and the standard library only. It reads and passes on; what a value means
is decided in `session/settings.py`.
"""

from __future__ import annotations

import os
import re
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from copa_harness.session.settings import Setting, Settings

OPTIONS: dict[str, tuple[str, str]] = {
    "budget": (
        "LEVEL",
        "ceiling of each optimization run: light (400 calls), medium (1,600), heavy (6,400), or "
        "ceilings such as calls=500,usd=2,tokens=1e6,seconds=600 [default: light]",
    ),
    "total-budget": (
        "CEILINGS",
        "ceiling on what all tests and xdist workers of this session pay together, written "
        "like --copa-budget [default: none]",
    ),
    "lm": (
        "MODEL",
        "base model: embedded, hf:<path or id>, or a name DSPy knows, such as openai/<name> [default: embedded]",
    ),
    "prompt-lm": ("MODEL", "model that proposes instructions [default: none]"),
    "seed": ("N", "seed of every random choice [default: 0]"),
    "threads": ("N", "examples in flight at once [default: 32]"),
    "repeat": ("K", "answer every test example K times and report which answers are unstable [default: 1]"),
    "cache-dir": ("DIR", "answers, finished stages, LoRA adapters and artifacts [default: .copa_cache in the rootdir]"),
    "report-dir": ("DIR", "latest.json, latest.md and numbered copies [default: reports in the rootdir]"),
    "baseline-dir": ("DIR", "accepted results, one file per task and strategy [default: baselines in the rootdir]"),
    "device": ("DEVICE", "where a local model runs: cpu, cuda, cuda:1 [default: a GPU if there is one]"),
    "dtype": ("TYPE", "arithmetic of a local model: float32, bfloat16 or float16 [default: float32, which is exact]"),
    "chat-template": ("FILE", "Jinja chat template of a local model, instead of its own [default: its own]"),
    "api-base": ("URL", "endpoint of the model, when it has one [default: DSPy's]"),
    "base-weights": (
        "MODEL",
        "hf:<path or id>: a copy of the weights that a vLLM server runs as --copa-lm; LoRA "
        "adapters are trained on it here and served there [default: none]",
    ),
    "served-lora-path": ("PATH", "where the vLLM server sees the folder 'lora' of --copa-cache-dir [default: there]"),
}
"""Name, metavar and help of every option with a value; each has an ini and an environment twin."""

SWITCHES: dict[str, str] = {
    "constrain": "output fields typed Literal, enum or bool get the likeliest allowed value instead of a generated "
    "text; local models only [default: off]",
    "allow-pickled-weights": "read weights that come as a pickle only (pytorch_model.bin), once, with torch's "
    "restricted unpickler, and keep them as safetensors [default: off, they are refused]",
    "sequential": "evaluate examples in a random order and stop as soon as the gates are decided [default: off]",
}
"""Name and help of options without a value that have twins too."""

GATE_NAMES = (
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
"""Gates with a default in the ini file, `copa_<name>`; a marker overrules it."""

MARKER = (
    "copa(strategy='p -> w -> p', ...): optimize the task's program before the test and gate the result; keywords "
    "only. What: strategy, budget, lm, prompt_lm, seed, threads, constrain. "
    "Gates: min_score, max_regression, better_than, max_calls, max_tokens, max_usd, max_seconds, max_cost_per_answer, "
    "max_error_rate, min_pass_all, undecided_fails. "
    "Search: max_cycles, epsilon, constraints, prefer, sampler, patience, adoption_p, max_demos, "
    "n_demo_sets, bootstrap, pass_score, n_proposed, groundings, n_reflected, transfer, n_rounds, n_checkpoints, "
    "epochs_with_demos, epochs_bare, bare_share, optimizer_kwargs, lora. "
    "What each means: copa_harness.session.settings.MarkerArguments."
)
"""What `pytest --markers` says; the names are those of `MarkerArguments`, which this module must not import."""

RUN_ID = pytest.StashKey[str]()


def add_options(parser: pytest.Parser) -> None:
    """Register `--copa-*`, with ini twins `copa_*`."""
    group = parser.getgroup("copa", "copa: improve and gate DSPy programs (command line > COPA_* > ini > marker)")
    for name, (metavar, text) in OPTIONS.items():
        group.addoption(f"--copa-{name}", metavar=metavar, default=None, help=text)
        parser.addini(f"copa_{name.replace('-', '_')}", help=f"like --copa-{name}", default=None)
    for name, text in SWITCHES.items():
        group.addoption(f"--copa-{name}", action="store_const", const="true", default=None, help=text)
        parser.addini(f"copa_{name.replace('-', '_')}", help=f"like --copa-{name}", default=None)
    for name in GATE_NAMES:
        parser.addini(f"copa_{name}", help=f"gate {name} of every copa_run whose marker does not name it", default=None)
    group.addoption("--copa-disable", action="store_true", default=None, help="skip every copa test [default: off]")
    parser.addini("copa_disable", help="like --copa-disable", type="bool", default=False)
    for name, text in (
        ("bless", "accept the results as new baselines [default: off; command line only]"),
        ("plan", "look into the cache only: make no call, say what a run would pay [default: off; command line only]"),
    ):
        group.addoption(f"--copa-{name}", action="store_true", default=False, help=text)


def is_disabled(config: pytest.Config) -> bool:
    """Whether copa tests are to be skipped."""
    if config.getoption("copa_disable"):
        return True
    variable = os.environ.get("COPA_DISABLE", "").strip().lower()
    return variable not in ("0", "false", "no", "off") if variable else bool(config.getini("copa_disable"))


def settings_of(config: pytest.Config) -> Settings:
    """The settings that were given.

    Raises:
        ConfigurationError: A value cannot be used; the message names its source.
    """
    from copa_harness.session.settings import Setting, Settings

    gates = {
        name: Setting(str(value), f"ini option copa_{name}")
        for name in GATE_NAMES
        if (value := config.getini(f"copa_{name}")) not in (None, "")
    }
    return Settings.from_given(
        _given(config),
        root=config.rootpath,
        bless=bool(config.getoption("copa_bless")),
        plan=bool(config.getoption("copa_plan")),
        gates=gates,
        worker=worker_number(config),
        run_id=run_id(config),
    )


def run_id(config: pytest.Config) -> str:
    """Names this session: the same in all its processes."""
    workerinput = getattr(config, "workerinput", None)
    if workerinput is not None:
        return str(workerinput["testrunuid"])
    return config.stash.setdefault(RUN_ID, uuid.uuid4().hex)


def worker_number(config: pytest.Config) -> int | None:
    """pytest-xdist's number of this process (`gw3`: 3); None without workers."""
    workerinput = getattr(config, "workerinput", None)
    if workerinput is None:
        return None
    digits = re.search(r"\d+$", str(workerinput["workerid"]))
    return int(digits[0]) if digits else 0  # `--tx` may give names of its own


def _given(config: pytest.Config) -> dict[str, Setting]:
    """Option values by name, from the strongest source that has one."""
    from copa_harness.session.settings import Setting

    given = {}
    for option in (*OPTIONS, *SWITCHES):
        name = option.replace("-", "_")
        variable = f"COPA_{name.upper()}"
        if (value := config.getoption(f"copa_{name}")) is not None:
            given[name] = Setting(_from_here(config, name, value), f"--copa-{option}")
        elif value := os.environ.get(variable):
            given[name] = Setting(_from_here(config, name, value), f"environment variable {variable}")
        elif (value := config.getini(f"copa_{name}")) not in (None, ""):
            given[name] = Setting(str(value), f"ini option copa_{name}")
    return given


def _from_here(config: pytest.Config, name: str, value: str) -> str:
    """A path typed in a shell is relative to where it was typed (one in an ini file to the rootdir)."""
    return str(Path(config.invocation_params.dir, value)) if name.endswith("_dir") or name == "chat_template" else value
