"""How each DSPy optimizer is built and sized to a number of calls; the user's own arguments always win.

Symbols: B = calls it may use, V and T = calls of one pass over the validation and the training examples. A full
evaluation costs V, bootstrapping at most T in all, and mostly far less (the same example asked again is free in one
scope); so it is left out of the sizes: an optimizer that would be equal to its rivals uses its whole budget, and what
overshoots is stopped by the step's scope with the best program kept. Knows constructor signatures of DSPy 3.4.1.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import dspy
from dspy import teleprompt

from copa_harness.errors import ConfigurationError
from copa_harness.evaluate.metrics import takes_arguments
from copa_harness.optimize.registry import MAX_ERRORS, Built, OptimizerJob


def build(job: OptimizerJob) -> Built:
    """The optimizer `job.name` stands for, sized to the job's allowance.

    Raises:
        ConfigurationError: Unknown name, unknown keyword arguments, or something it needs is missing.
    """
    if job.name not in _BUILDERS:
        raise ConfigurationError(f"got {job.name!r}; expected one of {', '.join(_BUILDERS)}")
    return _BUILDERS[job.name](job)


def _data(job: OptimizerJob) -> dict[str, Any]:
    return {"trainset": list(job.trainset), "valset": list(job.valset)}


def _split_kwargs(
    job: OptimizerJob, kind: Any, *, ours: dict[str, Any], at_compile: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """(optimizer, compile arguments): the user's kwargs go wherever DSPy takes them.

    Raises:
        ConfigurationError: A kwarg that neither constructor nor `compile` knows.
    """
    known = _parameters(kind.__init__)
    known_at_compile = _parameters(inspect.unwrap(kind.compile))
    constructor, compile_kwargs = dict(ours), dict(at_compile)
    for name, value in job.kwargs.items():
        if name in known and name != "metric":
            constructor[name] = value
        elif name in known_at_compile and name not in ("student", "trainset", "valset"):
            compile_kwargs[name] = value
        else:
            raise ConfigurationError(
                f"got optimizer_kwargs {name!r} for {job.name}; expected some of "
                f"{', '.join(sorted((known | known_at_compile) - {'self', 'metric', 'student', 'trainset', 'valset'}))}"
            )
    return kind(**constructor), compile_kwargs


def _parameters(function: Callable[..., Any]) -> set[str]:
    return {name for name in inspect.signature(function).parameters if name != "self"}


def _labeled(job: OptimizerJob) -> Built:
    optimizer, kwargs = _split_kwargs(
        job, teleprompt.LabeledFewShot, ours={"k": job.n_demos}, at_compile={"trainset": list(job.trainset)}
    )
    return Built(optimizer, kwargs)


def _bootstrap(job: OptimizerJob) -> Built:
    ours = {
        "metric": job.scored,
        "max_bootstrapped_demos": min(4, job.n_demos),
        "max_labeled_demos": job.n_demos,
        "max_errors": MAX_ERRORS,
    }
    optimizer, kwargs = _split_kwargs(
        job, teleprompt.BootstrapFewShot, ours=ours, at_compile={"trainset": list(job.trainset)}
    )
    return Built(optimizer, kwargs)


def _random_search(job: OptimizerJob, *, calls: int | None = None) -> Built:
    # Three programs (as it is without demonstrations, labelled, bootstrapped) are scored besides the candidates.
    n = max(1, min(64, (job.calls if calls is None else calls) // job.val_cost - 3))
    ours = {
        "metric": job.scored,
        "max_bootstrapped_demos": min(4, job.n_demos),
        "max_labeled_demos": job.n_demos,
        "num_candidate_programs": n,
        "num_threads": job.threads,
        "max_errors": MAX_ERRORS,
    }
    optimizer, kwargs = _split_kwargs(
        job, teleprompt.BootstrapFewShotWithRandomSearch, ours=ours, at_compile=_data(job)
    )
    return Built(optimizer, kwargs, note=f"sized to {n} + 3 candidate programs")


def _optuna(job: OptimizerJob) -> Built:
    n = max(1, min(64, job.calls // job.val_cost))
    ours = {
        "metric": job.scored,
        "max_bootstrapped_demos": max(1, min(8, job.n_demos)),
        "max_labeled_demos": job.n_demos,
        "num_candidate_programs": n,
        "num_threads": job.threads,
    }
    optimizer, kwargs = _split_kwargs(
        job,
        teleprompt.BootstrapFewShotWithOptuna,
        ours=ours,
        at_compile={**_data(job), "max_demos": max(1, min(4, job.n_demos))},
    )
    return Built(optimizer, kwargs, note=f"sized to {n} trials")


def _knn(job: OptimizerJob) -> Built:
    from copa_harness.optimize.neighbours import NeighboursOptimizer

    known = {"k", "vectorizer", "max_bootstrapped_demos", "max_labeled_demos"}
    unknown = sorted(set(job.kwargs) - known)
    if unknown:
        raise ConfigurationError(f"got optimizer_kwargs {unknown} for {job.name}; expected some of {sorted(known)}")
    k = int(job.kwargs.get("k", max(1, job.n_demos)))
    optimizer = NeighboursOptimizer(
        trainset=job.trainset, metric=job.scored, **{**job.kwargs, "k": min(k, len(job.trainset))}
    )
    return Built(optimizer, structure=f"knn_fewshot {optimizer.name}")


def _mipro(job: OptimizerJob) -> Built:
    # Without a prompt LM the task model writes the instructions. The cheapest proposal prompts are used then: data
    # summaries and program descriptions by a model that cannot write them cost calls and help nobody.
    writes_itself = job.prompt_lm is None
    n_predictors = len(job.incumbent.parts)
    n_trials = max(1, min(200, (job.calls - 4 * n_predictors) // job.val_cost - 1))
    n_candidates = max(2, min(18, math.ceil(n_trials / 1.5)))
    ours = {
        "metric": job.scored,
        "prompt_model": job.prompt_lm or job.task_lm,
        "task_model": job.task_lm,
        "auto": None,
        "num_candidates": n_candidates,
        "max_bootstrapped_demos": min(4, job.n_demos),
        "max_labeled_demos": job.n_demos,
        "num_threads": job.threads,
        "max_errors": MAX_ERRORS,
        # `seed or self.seed` in compile: 0 would silently become the constructor's.
        "seed": job.seed + 1,
        "track_stats": True,
    }
    at_compile = {**_data(job), "num_trials": n_trials, "minibatch": False}
    if writes_itself:
        proposers = ("program_aware_proposer", "data_aware_proposer", "tip_aware_proposer", "fewshot_aware_proposer")
        at_compile |= dict.fromkeys(proposers, False)
    if "auto" in job.kwargs and job.kwargs["auto"] is not None:
        ours["num_candidates"] = None
        at_compile.pop("num_trials")
    optimizer, kwargs = _split_kwargs(job, teleprompt.MIPROv2, ours=ours, at_compile=at_compile)
    by = "by the task model itself (no prompt LM given)" if writes_itself else "by the prompt LM"
    return Built(optimizer, kwargs, note=f"sized to {n_trials} trials, {n_candidates} candidates; instructions {by}")


def _copro(job: OptimizerJob) -> Built:
    depth = 2
    per_round = max(1, job.val_cost * len(job.incumbent.parts) + 1)
    breadth = max(2, min(10, job.calls // (per_round * depth)))
    ours = {"metric": job.scored, "prompt_model": job.prompt_lm or job.task_lm, "breadth": breadth, "depth": depth}
    # COPRO scores its candidates on what it calls trainset.
    at_compile = {
        "trainset": list(job.valset),
        "eval_kwargs": {"num_threads": job.threads, "display_progress": False},
    }
    optimizer, kwargs = _split_kwargs(job, teleprompt.COPRO, ours=ours, at_compile=at_compile)
    return Built(optimizer, kwargs, note=f"sized to breadth {breadth}, depth {depth}")


def _gepa(job: OptimizerJob) -> Built:
    if job.prompt_lm is None:
        raise ConfigurationError(
            "gepa reflects with a prompt LM and none is given; pass prompt_lm=... (or --copa-prompt-lm)"
        )
    # Its own budget counts program runs, not calls, and overshoots by a few minibatches.
    n_runs = max(len(job.valset) + 6, int(0.9 * job.calls / job.calls_per_example) - 6)
    ours: dict[str, Any] = {
        "metric": _with_feedback(job),
        "reflection_lm": job.prompt_lm,
        "max_metric_calls": n_runs,
        "num_threads": job.threads,
        "seed": job.seed,
        "warn_on_score_mismatch": False,
    }
    if {"auto", "max_full_evals"} & set(job.kwargs):
        ours["max_metric_calls"] = None
    optimizer, kwargs = _split_kwargs(job, dspy.GEPA, ours=ours, at_compile=_data(job))
    return Built(optimizer, kwargs, note=f"sized to {n_runs} program runs")


def _with_feedback(job: OptimizerJob) -> Callable[..., Any]:
    """The user's metric with the five arguments GEPA wants; feedback is the metric's own, or the expected labels."""

    def metric(gold: dspy.Example, pred: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None) -> Any:
        score = job.scored(gold, pred, trace)
        feedback = None
        if takes_arguments(job.metric, 5):  # only such a metric can be made to give feedback
            feedback = getattr(job.metric(gold, pred, trace, pred_name, pred_trace), "feedback", None)
        if not feedback:
            labels = {key: value for key, value in gold.items() if key not in gold.inputs()}
            said = ", ".join(f"{key} = {value}" for key, value in labels.items())
            feedback = f"Score {score:g} of 1. The right answer: {said}."
        return dspy.Prediction(score=score, feedback=feedback)

    return metric


def _simba(job: OptimizerJob) -> Built:
    # Each step runs c programs on a batch twice; at the end the winners run on all training examples.
    batch = max(1, min(8, len(job.trainset)))
    n = 3
    per_step = (2 * n + 1) * batch * job.calls_per_example
    steps = 1
    while steps < 12 and (steps + 1) * per_step + min(steps + 2, n + 1) * job.train_cost <= job.calls:
        steps += 1
    ours = {
        "metric": job.scored,
        "bsize": batch,
        "num_candidates": n,
        "max_steps": steps,
        "max_demos": min(4, job.n_demos),
        "prompt_model": job.prompt_lm or job.task_lm,
        "num_threads": job.threads,
    }
    optimizer, kwargs = _split_kwargs(
        job, teleprompt.SIMBA, ours=ours, at_compile={"trainset": list(job.trainset), "seed": job.seed}
    )
    return Built(optimizer, kwargs, note=f"sized to {steps} steps of {n} candidates on batches of {batch}")


def _infer_rules(job: OptimizerJob) -> Built:
    n = max(1, min(10, job.calls // (job.val_cost + len(job.incumbent.parts))))
    ours: dict[str, Any] = {
        "metric": job.scored,
        "num_candidates": n,
        "num_rules": 5,
        "num_threads": job.threads,
        "max_bootstrapped_demos": min(4, job.n_demos),
        "max_labeled_demos": job.n_demos,
        "max_errors": MAX_ERRORS,
    }
    if job.prompt_lm is not None:
        ours["teacher_settings"] = {"lm": job.prompt_lm}
    known = _parameters(teleprompt.InferRules.__init__) | _parameters(teleprompt.BootstrapFewShot.__init__)
    unknown = sorted(set(job.kwargs) - known)
    if unknown:
        raise ConfigurationError(f"got optimizer_kwargs {unknown} for {job.name}; expected some of {sorted(known)}")
    optimizer = teleprompt.InferRules(**{**ours, **job.kwargs})
    return Built(optimizer, _data(job), takes_best_evaluation=True, note=f"sized to {n} candidates")


def _finetune(job: OptimizerJob) -> Built:
    from copa_harness.optimize.together import FinetuneStep

    return Built(FinetuneStep(job), {"trainset": list(job.trainset)}, tunes_weights=True)


def _together(job: OptimizerJob) -> Built:
    from copa_harness.optimize.together import FinetuneStep, PromptStep

    known = _parameters(inspect.unwrap(teleprompt.BetterTogether.compile)) - {"student", "trainset", "valset"}
    unknown = sorted(set(job.kwargs) - known)
    if unknown:
        raise ConfigurationError(f"got optimizer_kwargs {unknown} for {job.name}; expected some of {sorted(known)}")
    strategy = str(job.kwargs.get("strategy", "p -> w -> p"))
    n_prompt_steps = max(1, strategy.split(" -> ").count("p"))
    # It scores every intermediate program itself, and the weights step traces the training examples.
    n_evaluations = 1 + len(strategy.split(" -> "))
    free = job.calls - job.train_cost - n_evaluations * job.val_cost
    bare = replace(job, kwargs={})
    prompt = _random_search(bare, calls=free // n_prompt_steps)
    optimizer = teleprompt.BetterTogether(metric=job.scored, p=PromptStep(prompt.optimizer), w=FinetuneStep(bare))
    kwargs = {
        **_data(job),
        "strategy": strategy,
        "num_threads": job.threads,
        "max_errors": MAX_ERRORS,
        "seed": job.seed,
        **job.kwargs,
    }
    return Built(optimizer, kwargs, tunes_weights=True, note=f"{strategy}; each p {prompt.note}")


_BUILDERS: dict[str, Callable[[OptimizerJob], Built]] = {
    "labeled_fewshot": _labeled,
    "bootstrap_fewshot": _bootstrap,
    "bootstrap_fewshot_random_search": _random_search,
    "bootstrap_fewshot_optuna": _optuna,
    "knn_fewshot": _knn,
    "miprov2": _mipro,
    "copro": _copro,
    "gepa": _gepa,
    "simba": _simba,
    "infer_rules": _infer_rules,
    "bootstrap_finetune": _finetune,
    "better_together": _together,
}
