"""Programs made ready for DSPy's optimizers: their predictors keep the models they run on.

DSPy's demo optimizers `reset` predictors, which drops each one's model: from there on every stage runs on the one model
of the settings, and a program of several models is bootstrapped and scored on the wrong ones. SIMBA cannot name "the"
model of such a program at all. Here predictors keep their model when reset, and where there are several, asking the
program for its model gives the first and setting one (SIMBA: the same model under another rollout and temperature)
changes those, and not the model. Knows programs and models; knows nothing of optimizers' sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import dspy

from copa_harness.optimize.candidate import model_name
from copa_harness.optimize.checks import check_metered

_SAMPLING = ("rollout_id", "temperature")
"""What a resampling copy of a model differs in."""


def ready(program: dspy.Module) -> dspy.Module:
    """The program itself, changed so that its predictors' models survive DSPy's optimizers; not marked compiled.

    Copies of it behave alike. Meant for throw-away students: their settings are taken, not they themselves.
    """
    program._compiled = False
    for _, predictor in program.named_predictors():
        predictor.__class__ = _keeping_its_model(type(predictor))
    if len({model_name(predictor.lm) for predictor in program.predictors()}) > 1:
        program.__class__ = _of_several_models(type(program))
    return program


def teacher_of(teacher: dspy.Module, *, lm: Any) -> dspy.Module:
    """A copy of a teacher whose predictors run on models of their own, or on `lm`.

    Raises:
        ConfigurationError: One of its models is not metered.
    """
    copy = teacher.deepcopy()
    for _, predictor in copy.named_predictors():
        predictor.lm = predictor.lm or lm
        check_metered(predictor.lm)
    was_compiled = copy._compiled  # DSPy shows labelled demonstrations to teachers that are not
    ready(copy)
    copy._compiled = was_compiled
    return copy


def models_in(arguments: Any) -> Iterator[Any]:
    """Every language model among arguments, mappings and sequences looked into."""
    if isinstance(arguments, dspy.BaseLM):
        yield arguments
    elif isinstance(arguments, dspy.Module):
        yield from (predictor.lm for predictor in arguments.predictors() if predictor.lm is not None)
    elif isinstance(arguments, Mapping):
        for value in arguments.values():
            yield from models_in(value)
    elif isinstance(arguments, (list, tuple)):
        for value in arguments:
            yield from models_in(value)


def _keeping_its_model(kind: Any) -> Any:
    class Keeping(kind):
        """A predictor whose model survives a reset."""

        def reset(self) -> None:
            """As DSPy's, but for the model."""
            kept: Any = vars(self)["lm"]
            super().reset()
            self.lm = kept

    return _disguised(Keeping, kind)


def _of_several_models(kind: Any) -> Any:
    class SeveralModels(kind):
        """A program of several models that can be asked for one, and resampled."""

        def get_lm(self) -> Any:
            """The first predictor's."""
            return self.predictors()[0].lm

        def set_lm(self, lm: Any) -> None:
            """Every predictor's own model, sampled as `lm` is; or `lm` itself where it is another model (a teacher)."""
            if model_name(lm) != model_name(self.get_lm()):
                super().set_lm(lm)
                return
            sampling = {name: lm.kwargs[name] for name in _SAMPLING if name in lm.kwargs}
            for predictor in self.predictors():
                predictor.lm = predictor.lm.copy(**sampling)

    return _disguised(SeveralModels, kind)


def _disguised(kind: Any, original: Any) -> Any:
    """Named as the original: MIPROv2's proposer shows the writer the source of the class of that name."""
    kind.__name__, kind.__qualname__, kind.__module__ = original.__name__, original.__qualname__, original.__module__
    kind.__doc__ = original.__doc__
    return kind
