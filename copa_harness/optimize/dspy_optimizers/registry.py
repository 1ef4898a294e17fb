"""DSPy's optimizers by name, run under the same budget and meter as everything else.

What DSPy 3.4 does on its own, and what is done about it here:

* Demo optimizers refuse a program marked compiled, and drop the predictors' models: the mark is cleared and models are
  kept (`student.ready`), so a `p` after a `w` works on the tuned model, and every stage on its own.
* A spent budget must stop an optimizer that swallows exceptions: `BudgetExhausted` is no `Exception`, and the best
  program of its complete evaluations is recovered through a callback.
* BetterTogether logs a failed step and returns a program flagged `flag_compilation_error_occurred`: raised here.
* InferRules writes instructions into the signature class its candidates share, so what it returns is its last
  candidate, not its best: the recorded evaluation of the best is taken instead.
* An instruction proposal that does not parse ends MIPROv2, COPRO and InferRules: see `student.tolerant`.
* Prints, progress bars and loggers go to our logger at DEBUG.

How each optimizer is built and sized is in `builders`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import dspy

from copa_harness.errors import BudgetExhausted, ConfigurationError, CopaError
from copa_harness.evaluate.runner import default_adapter
from copa_harness.lm.call_context import current_scope
from copa_harness.optimize.checks import check_metered
from copa_harness.optimize.dspy_optimizers.contract import MAX_ERRORS, Built, OptimizerJob, OptimizerOutcome
from copa_harness.optimize.dspy_optimizers.student import Evaluations, models_in, ready, silence_logs, tolerant
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.step_budget import step_scope
from copa_harness.results import Phase

logger = logging.getLogger("copa_harness")


def run_optimizer(job: OptimizerJob) -> OptimizerOutcome:
    """Run a DSPy optimizer within its allowance.

    Returns:
        Its result as a candidate, or the best program it had fully evaluated when the budget ended it.

    Raises:
        ConfigurationError: It needs something that is not there (a prompt LM, a model that can be tuned).
        CopaError: It failed.
    """
    from copa_harness.optimize.dspy_optimizers.builders import build

    for lm in models_in(job.kwargs):
        check_metered(lm)
    student = ready(job.incumbent.program())
    notes: list[str] = []
    count = job.proposals
    adapter = tolerant(default_adapter(), program=student, count=count)
    keeps_lms = False
    seen = Evaluations(
        job.valset,
        allowance=job.allowance,
        calls_per_example=job.calls_per_example,
        known=job.known,
        settings_of=lambda program: _settings_of(program, job, keep_lms=keeps_lms),
    )
    with (
        current_scope().phase(Phase.SEARCH),
        step_scope(job.allowance, name=job.name),
        dspy.context(
            lm=job.task_lm,
            adapter=adapter,
            callbacks=[*(dspy.settings.callbacks or []), seen],
            num_threads=job.threads,
            max_errors=MAX_ERRORS,
            disable_history=True,
        ),
        silence_logs(job.name),
    ):
        built = build(job)
        keeps_lms = built.tunes_weights
        if built.note:
            notes.append(built.note)
        try:
            program = _compile(job, built, student)
        except BudgetExhausted:
            found = seen.best_first
            n, ending = seen.n_complete, "the best of them is kept" if found else "nothing to keep"
            notes.append(
                f"its share of the budget ended it after {n} complete evaluation{'' if n == 1 else 's'} on validation; "
                + ending
            )
            return _outcome(found[0] if found else None, notes, seen)
    if count.n_unusable:
        notes.append(f"{count.n_unusable} of {count.n_asked} instruction proposals were unusable and left out")
    if getattr(program, "flag_compilation_error_occurred", False):
        raise CopaError(
            f"{job.name}: DSPy reports that a step failed (flag_compilation_error_occurred); its reason is in the "
            "copa_harness log at level DEBUG"
        )
    if built.takes_best_evaluation and seen.best_first:
        return _outcome(seen.best_first[0], notes, seen)
    program._compiled = False
    candidate = _settings_of(program, job, structure=built.structure, keep_lms=built.tunes_weights)
    return _outcome(candidate, notes, seen)


def _outcome(candidate: Candidate | None, notes: Sequence[str], seen: Evaluations) -> OptimizerOutcome:
    found = seen.best_first
    others = tuple(one for one in found if candidate is None or one.key != candidate.key)
    return OptimizerOutcome(
        candidate, tuple(notes), others, evaluated=frozenset(one.key for one in found), covers_all=seen.covers_all
    )


def _compile(job: OptimizerJob, built: Built, student: dspy.Module) -> dspy.Module:
    try:
        program = built.optimizer.compile(student, **built.compile_kwargs)
    except CopaError:
        raise
    except Exception as error:
        raise CopaError(f"the optimizer {job.name} failed with {type(error).__name__}: {error}") from error
    if not isinstance(program, dspy.Module):
        raise CopaError(f"{job.name} returned {type(program).__name__}; expected a program")
    return program


def _settings_of(program: dspy.Module, job: OptimizerJob, *, structure: str = "", keep_lms: bool = False) -> Candidate:
    """A program's settings now, as a candidate; on the incumbent's models unless it brought its own."""
    # A demo optimizer inside BetterTogether works on whatever model is set here, with the predictors' own dropped.
    lm = (dspy.settings.lm if keep_lms else None) or job.task_lm
    candidate = Candidate.of(program, lm=lm, structure=structure or job.incumbent.structure)
    names = [part.predictor for part in candidate.parts]
    expected = [part.predictor for part in job.incumbent.parts]
    if names != expected and not structure:
        raise ConfigurationError(f"{job.name} changed the program's predictors from {expected} to {names}")
    if not structure:
        candidate = Candidate(job.incumbent.template, candidate.parts, candidate.structure)
    return candidate if keep_lms else candidate.with_lms(job.incumbent.lms)
