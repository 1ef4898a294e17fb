"""The names in `optimizer_kwargs={...}`, checked where they are written, without importing DSPy.

A marker is read when tests are collected, and importing DSPy takes seconds; reading two signatures from its source
takes milliseconds and holds for whatever version is installed (`keywords_of`). What cannot be found this way is refused
when the optimizer is built (`contract.split_kwargs`).
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from copa_harness.errors import ConfigurationError, did_you_mean
from copa_harness.strategy import OPTIMIZER_NAMES

_SOURCES: dict[str, tuple[tuple[str, str], ...]] = {
    "labeled_fewshot": (("vanilla.py", "LabeledFewShot"),),
    "bootstrap_fewshot": (("bootstrap.py", "BootstrapFewShot"),),
    "bootstrap_fewshot_random_search": (("random_search.py", "BootstrapFewShotWithRandomSearch"),),
    "bootstrap_fewshot_optuna": (("teleprompt_optuna.py", "BootstrapFewShotWithOptuna"),),
    "miprov2": (("mipro_optimizer_v2.py", "MIPROv2"),),
    "copro": (("copro_optimizer.py", "COPRO"),),
    "gepa": (("gepa/gepa.py", "GEPA"),),
    "simba": (("simba.py", "SIMBA"),),
    "infer_rules": (("infer_rules.py", "InferRules"), ("bootstrap.py", "BootstrapFewShot")),
    "bootstrap_finetune": (("bootstrap_finetune.py", "BootstrapFinetune"),),
    "better_together": (("bettertogether.py", "BetterTogether"),),
}
"""Optimizer -> file below `dspy/teleprompt` and class of everything whose arguments it takes."""

_NOT_THE_USERS = frozenset({"self", "metric", "student", "trainset", "valset"})


@cache
def keywords_of(optimizer: str) -> frozenset[str] | None:
    """Names of the arguments that an optimizer's constructor or `compile` takes; None when they cannot be read.

    Args:
        optimizer: Registered name.
    """
    spec = importlib.util.find_spec("dspy")  # of a package at the top, so nothing is imported
    if optimizer not in _SOURCES or spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "teleprompt"
    names: set[str] = set()
    for file, kind in _SOURCES[optimizer]:
        try:
            tree = ast.parse((folder / file).read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            return None  # another DSPy keeps it elsewhere
        found = _arguments_in(tree, kind)
        if not found:
            return None
        names |= found
    return frozenset(names - _NOT_THE_USERS)


def _arguments_in(tree: ast.Module, kind: str) -> set[str]:
    """Parameters of `__init__` and `compile` of a class; nothing when it has no constructor of its own."""
    methods = {
        method.name: method.args
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == kind
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name in ("__init__", "compile")
    }
    if "__init__" not in methods:
        return set()
    return {one.arg for args in methods.values() for one in (*args.posonlyargs, *args.args, *args.kwonlyargs)}


KNN_KWARGS: tuple[str, ...] = ("k", "vectorizer", "max_bootstrapped_demos", "max_labeled_demos")
"""Arguments of `knn_fewshot`, which is ours."""

ENSEMBLE_KWARGS: tuple[str, ...] = ("size", "reduce")
"""Arguments of the step `ensemble`, which is ours."""

_OURS: dict[str, tuple[str, ...]] = {"knn_fewshot": KNN_KWARGS, "ensemble": ENSEMBLE_KWARGS}


def check_optimizer_kwargs(given: Mapping[str, Any]) -> None:
    """Raise unless every name is a known optimizer's and its arguments are a dictionary with names.

    Names of arguments are checked as far as they are known without DSPy: all of ours, and what `keywords_of` can read.

    Raises:
        ConfigurationError: The first that is not, with the nearest known one.
    """
    known = (*OPTIMIZER_NAMES, "ensemble")
    if unknown := sorted(map(str, set(given) - set(known))):
        raise ConfigurationError(
            f"got optimizer_kwargs for {unknown}; expected some of {', '.join(known)}{did_you_mean(unknown[0], known)}"
        )
    for name, arguments in given.items():
        if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
            raise ConfigurationError(
                f"got optimizer_kwargs {arguments!r} for {name}; expected a dictionary of its arguments by name"
            )
        known_here = _OURS.get(name) or keywords_of(name)
        if known_here is not None:
            check_kwargs(name, arguments, known=known_here)


def check_kwargs(name: str, given: Iterable[str], *, known: Iterable[str]) -> None:
    """Raise `ConfigurationError` unless every argument of the optimizer `name` is a known one."""
    wanted = sorted(known)
    if unknown := sorted(set(given) - set(wanted)):
        raise ConfigurationError(
            f"got optimizer_kwargs {unknown} for {name}; expected some of {', '.join(wanted)}"
            f"{did_you_mean(unknown[0], wanted)}"
        )
