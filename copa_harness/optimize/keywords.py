"""Which arguments DSPy's optimizers take, read from DSPy's source without importing it.

A marker is read when tests are collected, and importing DSPy takes seconds; reading two signatures from one file takes
milliseconds and holds for whatever version is installed. What cannot be found this way is not checked here: the
optimizer refuses it when it is built (`arguments`). Knows names only; knows nothing of values.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

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
        for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind
        for method in node.body if isinstance(method, ast.FunctionDef) and method.name in ("__init__", "compile")
    }  # fmt: skip
    if "__init__" not in methods:
        return set()
    return {one.arg for args in methods.values() for one in (*args.posonlyargs, *args.args, *args.kwonlyargs)}
