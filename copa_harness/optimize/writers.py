"""How DSPy's optimizers that write instructions are built and sized: MIPROv2, COPRO, GEPA, SIMBA, InferRules.

They write with the prompt LM if there is one, else with the task model (GEPA refuses that). Symbols as in `builders`:
B = calls it may use, V and T = calls of one pass over the validation and the training examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import dspy
from dspy import teleprompt
from dspy.teleprompt.gepa.instruction_proposal import InstructionProposer

from copa_harness.errors import ConfigurationError
from copa_harness.evaluate.metrics import takes_arguments
from copa_harness.judge.messages import counted
from copa_harness.optimize.arguments import data_of, parameters_of, sized, split_kwargs, teacher_for
from copa_harness.optimize.forgiving import forgiving
from copa_harness.optimize.limits import check_kwargs
from copa_harness.optimize.registry import MAX_ERRORS, Built, OptimizerJob


def mipro(job: OptimizerJob) -> Built:
    """MIPROv2 with full evaluations of every trial."""
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
    at_compile = {**data_of(job), "num_trials": n_trials, "minibatch": False}
    if writes_itself:
        proposers = ("program_aware_proposer", "data_aware_proposer", "tip_aware_proposer", "fewshot_aware_proposer")
        at_compile |= dict.fromkeys(proposers, False)
    if "auto" in job.kwargs and job.kwargs["auto"] is not None:
        ours["num_candidates"] = None
        at_compile.pop("num_trials")
    optimizer, kwargs = split_kwargs(job, teleprompt.MIPROv2, ours=ours, at_compile=at_compile)
    by = "by the task model itself (no prompt LM given)" if writes_itself else "by the prompt LM"
    to = f"{counted(n_trials, 'trial')}, {counted(n_candidates, 'candidate')}"
    size = sized(job, to, "auto", "num_trials", "num_candidates")
    return Built(optimizer, kwargs, note=f"{size}; instructions {by}")


def copro(job: OptimizerJob) -> Built:
    """COPRO, scored on the validation examples."""
    depth = 2
    per_round = max(1, job.val_cost * len(job.incumbent.parts) + 1)
    breadth = max(2, min(10, job.calls // (per_round * depth)))
    ours = {"metric": job.scored, "prompt_model": job.prompt_lm or job.task_lm, "breadth": breadth, "depth": depth}
    # COPRO scores its candidates on what it calls trainset.
    at_compile = {
        "trainset": list(job.valset),
        "eval_kwargs": {"num_threads": job.threads, "display_progress": False},
    }
    optimizer, kwargs = split_kwargs(job, teleprompt.COPRO, ours=ours, at_compile=at_compile)
    return Built(optimizer, kwargs, note=sized(job, f"breadth {breadth}, depth {depth}", "breadth", "depth"))


def gepa(job: OptimizerJob) -> Built:
    """GEPA, sized in program runs."""
    if job.prompt_lm is None:
        raise ConfigurationError(
            "gepa reflects with a prompt LM and none is given; pass prompt_lm=... (or --copa-prompt-lm)"
        )
    if job.kwargs.get("log_dir") is not None:
        raise ConfigurationError(
            "got log_dir for gepa, which keeps its state there as a pickle; leave it out: a run that is started again "
            "replays its answers from the cache and pays only for what is missing"
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
        # Its proposals come in JSON through an adapter of its own, and one that does not parse is only logged.
        "instruction_proposer": InstructionProposer(
            adapter=forgiving(dspy.JSONAdapter(), program=job.incumbent.template, count=job.proposals)
        ),
    }
    if {"auto", "max_full_evals"} & set(job.kwargs):
        ours["max_metric_calls"] = None
    optimizer, kwargs = split_kwargs(job, dspy.GEPA, ours=ours, at_compile=data_of(job))
    note = sized(job, f"{n_runs} program runs", "auto", "max_full_evals", "max_metric_calls")
    return Built(optimizer, kwargs, note=note)


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


def simba(job: OptimizerJob) -> Built:
    """SIMBA on small batches of the training examples."""
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
    optimizer, kwargs = split_kwargs(
        job, teleprompt.SIMBA, ours=ours, at_compile={"trainset": list(job.trainset), "seed": job.seed}
    )
    size = f"{counted(steps, 'step')} of {counted(n, 'candidate')} on batches of {batch}"
    return Built(optimizer, kwargs, note=sized(job, size, "max_steps", "num_candidates", "bsize"))


def infer_rules(job: OptimizerJob) -> Built:
    """InferRules; its best recorded evaluation is taken, not what it returns."""
    n = max(1, min(10, job.calls // (job.val_cost + len(job.incumbent.parts))))
    ours: dict[str, Any] = {
        "metric": job.scored,
        "num_candidates": n,
        "num_rules": 5,
        "num_threads": job.threads,
        "max_bootstrapped_demos": min(4, job.n_demos),
        "max_labeled_demos": job.n_demos,
        "max_errors": MAX_ERRORS,
        "metric_threshold": job.min_score,
    }
    if job.prompt_lm is not None:
        ours["teacher_settings"] = {"lm": job.prompt_lm}
    known = parameters_of(teleprompt.InferRules.__init__) | parameters_of(teleprompt.BootstrapFewShot.__init__)
    check_kwargs(job.name, job.kwargs, known=known)
    given = {**ours, **job.kwargs}
    kwargs = {**data_of(job), "teacher": teacher_for(job, settings=given.get("teacher_settings"))}
    note = sized(job, counted(n, "candidate"), "num_candidates")
    return Built(teleprompt.InferRules(**given), kwargs, takes_best_evaluation=True, note=note)
