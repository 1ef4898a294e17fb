"""How each DSPy optimizer is built and sized to a number of calls; the user's own arguments always win.

Symbols: B = calls it may use, V and T = calls of one pass over the validation and the training examples. A full
evaluation costs V, bootstrapping at most T in all, and mostly far less (the same example asked again is free in one
scope); so it is left out of the sizes: an optimizer that would be equal to its rivals uses its whole budget, and what
overshoots is stopped by the step's scope with the best program kept. Those that write instructions (MIPROv2, COPRO,
GEPA, SIMBA, InferRules) write with the prompt LM if there is one, else with the task model (GEPA refuses that).

Written for the constructors of DSPy 3.4.1.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import dspy
import optuna
from dspy import teleprompt
from dspy.teleprompt import mipro_optimizer_v2
from dspy.teleprompt.gepa.instruction_proposal import InstructionProposer

from copa_harness.errors import ConfigurationError
from copa_harness.evaluate.metrics import takes_arguments
from copa_harness.formatting import counted
from copa_harness.optimize.dspy_optimizers.contract import (
    MAX_ERRORS,
    Built,
    OptimizerJob,
    data_of,
    parameters_of,
    sized,
    split_kwargs,
    teacher_for,
)
from copa_harness.optimize.dspy_optimizers.kwargs import KNN_KWARGS, check_kwargs
from copa_harness.optimize.dspy_optimizers.student import tolerant
from copa_harness.optimize.propose.reflection import expected_feedback, feedback_in
from copa_harness.optimize.propose.schema import is_fully_labelled


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
    from copa_harness.optimize.dspy_optimizers.knn import NeighboursOptimizer

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
    from copa_harness.optimize.dspy_optimizers.finetune import FinetuneStep

    return Built(FinetuneStep(job), {"trainset": list(job.trainset)}, tunes_weights=True)


def _together(job: OptimizerJob) -> Built:
    from copa_harness.optimize.dspy_optimizers.finetune import FinetuneStep, PromptStep

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
        "bootstrap_fewshot_random_search",
        "bootstrap_fewshot_optuna",
        "miprov2",
        "copro",
        "gepa",
        "infer_rules",
        "better_together",
    }
)
"""Not LabeledFewShot, BootstrapFewShot, KNNFewShot and BootstrapFinetune, which evaluate nothing, and not SIMBA, which
evaluates on training examples."""


def _mipro(job: OptimizerJob) -> Built:
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


def _copro(job: OptimizerJob) -> Built:
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


def _gepa(job: OptimizerJob) -> Built:
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
            adapter=tolerant(dspy.JSONAdapter(), program=job.incumbent.template, count=job.proposals)
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
        said = ""
        if takes_arguments(job.metric, 5):  # only such a metric can be made to give feedback
            said = feedback_in(job.metric(gold, pred, trace, pred_name, pred_trace))
        return dspy.Prediction(score=score, feedback=said or expected_feedback(gold, score, say=str))

    return metric


def _simba(job: OptimizerJob) -> Built:
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


def _infer_rules(job: OptimizerJob) -> Built:
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


class SeededDemoStudy(teleprompt.BootstrapFewShotWithOptuna):
    """As DSPy's: every trial shows each predictor one of the demonstrations that BootstrapFewShot made.

    Attributes:
        seed: Of the sampler.
    """

    seed = 0

    def objective(self, trial: optuna.Trial) -> float:
        """The mean score, 0..100, of one choice of demonstrations."""
        program = self.student.reset_copy()
        pairs = zip(self.compiled_teleprompter.named_predictors(), program.predictors(), strict=True)
        for (name, compiled), predictor in pairs:
            if compiled.demos:
                chosen = trial.suggest_int(f"demo_index_for_{name}", 0, len(compiled.demos) - 1)
                predictor.demos = [dict(compiled.demos[chosen])]
        evaluate = dspy.Evaluate(
            devset=self.valset,
            metric=self.metric,
            num_threads=self.num_threads,
            display_table=False,
            display_progress=False,
        )
        score = float(evaluate(program).score)
        trial.set_user_attr("program", program)
        return score

    def compile(
        self,
        student: dspy.Module,
        *,
        teacher: dspy.Module | None = None,
        max_demos: int,
        trainset: list[dspy.Example],
        valset: list[dspy.Example] | None = None,
    ) -> dspy.Module:
        """The best of `num_candidate_programs` choices."""
        self.trainset, self.valset = trainset, valset or trainset
        self.student = student.reset_copy()
        self.teacher = teacher.deepcopy() if teacher is not None else student.reset_copy()
        bootstrap = teleprompt.BootstrapFewShot(
            metric=self.metric,
            max_bootstrapped_demos=max_demos,
            max_labeled_demos=self.max_labeled_demos,
            teacher_settings=self.teacher_settings,
            max_rounds=self.max_rounds,
        )
        self.compiled_teleprompter = bootstrap.compile(self.student, teacher=self.teacher, trainset=self.trainset)
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=self.seed))
        study.optimize(self.objective, n_trials=self.num_candidate_sets)
        best: Any = study.best_trial.user_attrs["program"]
        assert isinstance(best, dspy.Module)
        return best


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
