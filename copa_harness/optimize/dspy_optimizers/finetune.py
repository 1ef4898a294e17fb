"""DSPy's weight optimizers made to survive: steps for BootstrapFinetune and BetterTogether.

BootstrapFinetune crashes on one example that does not parse or gets no answer, and trains on nothing when no example
passes; so it is given only examples the program was seen to get right (their answers are cached, the second run is
free). BetterTogether's demo optimizers drop the models, so the `p` after a `w` would run on the base model;
`PromptStep` puts them back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dspy
from dspy import teleprompt
from dspy.teleprompt.teleprompt import Teleprompter

from copa_harness.errors import ConfigurationError, TrainingError
from copa_harness.evaluate.runner import default_adapter, run_examples
from copa_harness.optimize.dspy_optimizers.contract import teacher_for
from copa_harness.optimize.dspy_optimizers.student import ready
from copa_harness.optimize.search.candidate import model_name
from copa_harness.results import Phase

if TYPE_CHECKING:
    from copa_harness.optimize.dspy_optimizers.contract import OptimizerJob


class FinetuneStep(Teleprompter):
    """BootstrapFinetune on the examples the program gets right, with a provider for local models."""

    def __init__(self, job: OptimizerJob) -> None:
        super().__init__()
        self._job = job

    def compile(
        self, student: dspy.Module, trainset: list[dspy.Example], teacher: Any = None, **kwargs: Any
    ) -> dspy.Module:
        """A tuned copy of `student`.

        Raises:
            TrainingError: The program gets no training example right.
            ConfigurationError: A model cannot be fine-tuned.
        """
        job = self._job
        student = student.deepcopy()
        student._compiled = False
        # One object per model: DSPy trains a model once for every object it meets.
        tuned_lms: dict[str, Any] = {}
        for _, predictor in student.named_predictors():
            lm = predictor.lm or dspy.settings.lm
            predictor.lm = tuned_lms.setdefault(model_name(lm), finetunable(lm))
        teacher = teacher_for(job, given=teacher)
        runs = run_examples(
            teacher or student,
            trainset,
            metric=job.scored,
            split="train",
            phase=Phase.BOOTSTRAP,
            threads=job.threads,
        )
        passing = [e for e, run in zip(trainset, runs, strict=True) if (run.result.score or 0.0) >= job.min_score]
        if not passing:
            raise TrainingError(
                f"the program gets none of {len(trainset)} training examples right, so there is nothing to fine-tune "
                "on; use a strategy that optimizes prompts first, or 'w', which trains on labels"
            )
        # It refuses to train with fewer threads than there are models. No metric: what comes in has passed.
        ours = {"num_threads": max(job.threads, len(student.predictors())), "adapter": default_adapter()}
        optimizer = teleprompt.BootstrapFinetune(**{**ours, **job.kwargs})
        tuned: dspy.Module = optimizer.compile(student, trainset=passing, teacher=teacher)
        tuned._compiled = False
        return tuned


class PromptStep(Teleprompter):
    """Any prompt optimizer, with the program's models kept: what goes in on the tuned model comes out on it."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__()
        self._optimizer = optimizer

    def compile(
        self,
        student: dspy.Module,
        *,
        trainset: list[dspy.Example],
        teacher: Any = None,
        valset: list[dspy.Example] | None = None,
        **kwargs: Any,
    ) -> dspy.Module:
        """The optimizer's result on the student's own models."""
        lms = {name: predictor.lm or dspy.settings.lm for name, predictor in student.named_predictors()}
        given = {} if teacher is None else {"teacher": teacher[0] if isinstance(teacher, list) else teacher}
        with dspy.context(lm=next(iter(lms.values()))):
            program: dspy.Module = self._optimizer.compile(ready(student), trainset=trainset, valset=valset, **given)
        program._compiled = False
        for name, predictor in program.named_predictors():
            predictor.lm = lms[name]
        return program


def finetunable(lm: Any) -> Any:
    """The model with a provider that fine-tunes it.

    Raises:
        ConfigurationError: It cannot be fine-tuned.
    """
    if getattr(getattr(lm, "provider", None), "finetunable", False):
        return lm
    directory = getattr(getattr(lm, "engine", None), "lora_dir", None)
    if directory is None:
        raise ConfigurationError(
            f"got the model {model_name(lm)!r}, which cannot be fine-tuned; expected 'embedded', 'hf:<path or id>', "
            "or a DSPy model whose provider fine-tunes"
        )
    from copa_harness.tune.dspy_provider import attach_provider

    return attach_provider(lm, directory=directory)
