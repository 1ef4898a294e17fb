"""How each DSPy optimizer is built and sized to a number of calls; the user's own arguments always win.

Symbols: B = calls it may use, V and T = calls of one pass over the validation and the training examples. A full
evaluation costs V, bootstrapping at most T in all, and mostly far less (the same example asked again is free in one
scope); so it is left out of the sizes: an optimizer that would be equal to its rivals uses its whole budget, and what
overshoots is stopped by the step's scope with the best program kept. Knows constructor signatures of DSPy 3.4.1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from dspy import teleprompt
from dspy.teleprompt import mipro_optimizer_v2

from copa_harness.errors import ConfigurationError
from copa_harness.judge.messages import counted
from copa_harness.optimize import writers
from copa_harness.optimize.arguments import data_of, parameters_of, sized, split_kwargs, teacher_for
from copa_harness.optimize.limits import KNN_KWARGS, check_kwargs
from copa_harness.optimize.registry import MAX_ERRORS, Built, OptimizerJob
from copa_harness.optimize.schema import is_fully_labelled


def build(job: OptimizerJob) -> Built:
    """The optimizer `job.name` stands for, sized to the job's allowance.

    Raises:
        ConfigurationError: Unknown name, unknown keyword arguments, or something it needs is missing.
    """
    if job.name not in _BUILDERS:
        raise ConfigurationError(f"got {job.name!r}; expected one of {', '.join(_BUILDERS)}")
    return _BUILDERS[job.name](job)


def scores_its_result(name: str, kwargs: Mapping[str, Any], *, n_validation: int) -> bool:
    """Whether an optimizer returns a program that it has evaluated on the whole validation split itself.

    Scoring its result afterwards then costs no further call.

    Args:
        name: Registered name.
        kwargs: The user's own arguments for it.
        n_validation: Validation examples; MIPROv2's `auto` draws some of many.
    """
    if name == "miprov2" and kwargs.get("auto") is not None:
        sizes = mipro_optimizer_v2.AUTO_RUN_SETTINGS.get(str(kwargs["auto"]), {"val_size": 0})
        return n_validation <= int(sizes["val_size"])
    return name in _SCORE_THEIR_RESULT


def _labeled(job: OptimizerJob) -> Built:
    optimizer, kwargs = split_kwargs(
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
    optimizer, kwargs = split_kwargs(
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
    optimizer, kwargs = split_kwargs(
        job, teleprompt.BootstrapFewShotWithRandomSearch, ours=ours, at_compile=data_of(job)
    )
    return Built(optimizer, kwargs, note=sized(job, f"{n} + 3 candidate programs", "num_candidate_programs"))


def _optuna(job: OptimizerJob) -> Built:
    from copa_harness.optimize.demo_study import SeededDemoStudy

    n = max(1, min(64, job.calls // job.val_cost))
    ours = {
        "metric": job.scored,
        "max_bootstrapped_demos": max(1, min(8, job.n_demos)),
        "max_labeled_demos": job.n_demos,
        "num_candidate_programs": n,
        "num_threads": job.threads,
    }
    optimizer, kwargs = split_kwargs(
        job, SeededDemoStudy, ours=ours, at_compile={**data_of(job), "max_demos": max(1, min(4, job.n_demos))}
    )
    optimizer.seed = job.seed
    return Built(optimizer, kwargs, note=sized(job, counted(n, "trial"), "num_candidate_programs"))


def _knn(job: OptimizerJob) -> Built:
    from copa_harness.optimize.neighbours import NeighboursOptimizer

    check_kwargs(job.name, job.kwargs, known=KNN_KWARGS)
    k = min(int(job.kwargs.get("k", max(1, job.n_demos))), len(job.trainset))
    # Labels show all there is unless a predictor has outputs that the examples lack (reasoning, an earlier stage's).
    signatures = [predictor.signature for _, predictor in job.incumbent.template.named_predictors()]
    wanted = 0 if all(is_fully_labelled(signature, job.trainset) for signature in signatures) else k
    n_bootstrapped = int(job.kwargs.get("max_bootstrapped_demos", wanted))
    affordable = job.train_cost <= job.calls
    optimizer = NeighboursOptimizer(
        job,
        k=k,
        vectorizer=job.kwargs.get("vectorizer"),
        max_bootstrapped_demos=n_bootstrapped if affordable else 0,
        max_labeled_demos=job.kwargs.get("max_labeled_demos"),
        teacher=teacher_for(job),
    )
    note = optimizer.name
    if n_bootstrapped and not affordable:
        note += f" (running the {len(job.trainset)} training examples is not affordable)"
    return Built(optimizer, structure=f"knn_fewshot {optimizer.name}", note=note)


def _finetune(job: OptimizerJob) -> Built:
    from copa_harness.optimize.together import FinetuneStep

    return Built(FinetuneStep(job), {"trainset": list(job.trainset)}, tunes_weights=True)


def _together(job: OptimizerJob) -> Built:
    from copa_harness.optimize.together import FinetuneStep, PromptStep

    known = parameters_of(inspect.unwrap(teleprompt.BetterTogether.compile)) - {"student", "trainset", "valset"}
    check_kwargs(job.name, job.kwargs, known=known)
    strategy = str(job.kwargs.get("strategy", "p -> w -> p"))
    n_prompt_steps = max(1, strategy.split(" -> ").count("p"))
    # It scores every intermediate program itself, and the weights step traces the training examples.
    n_evaluations = 1 + len(strategy.split(" -> "))
    free = job.calls - job.train_cost - n_evaluations * job.val_cost
    bare = replace(job, kwargs={})
    prompt = _random_search(bare, calls=free // n_prompt_steps)
    optimizer = teleprompt.BetterTogether(metric=job.scored, p=PromptStep(prompt.optimizer), w=FinetuneStep(bare))
    kwargs = {
        **data_of(job),
        "teacher": teacher_for(job),
        "strategy": strategy,
        "num_threads": job.threads,
        "max_errors": MAX_ERRORS,
        "seed": job.seed,
        **job.kwargs,
    }
    return Built(optimizer, kwargs, tunes_weights=True, note=f"{strategy}; each p {prompt.note}")


_SCORE_THEIR_RESULT = frozenset(
    {
        "bootstrap_fewshot_random_search", "bootstrap_fewshot_optuna", "miprov2", "copro", "gepa", "infer_rules",
        "better_together",
    }
)  # fmt: skip
"""Not LabeledFewShot, BootstrapFewShot, KNNFewShot and BootstrapFinetune, which evaluate nothing, and not SIMBA, which
evaluates on training examples."""

_BUILDERS: dict[str, Callable[[OptimizerJob], Built]] = {
    "labeled_fewshot": _labeled,
    "bootstrap_fewshot": _bootstrap,
    "bootstrap_fewshot_random_search": _random_search,
    "bootstrap_fewshot_optuna": _optuna,
    "knn_fewshot": _knn,
    "miprov2": writers.mipro,
    "copro": writers.copro,
    "gepa": writers.gepa,
    "simba": writers.simba,
    "infer_rules": writers.infer_rules,
    "bootstrap_finetune": _finetune,
    "better_together": _together,
}
