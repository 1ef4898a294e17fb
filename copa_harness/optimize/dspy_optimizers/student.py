"""A DSPy optimizer's student: its models kept, its writers tolerated, its output silenced, its evaluations recorded.

**Models** (`ready`). DSPy's demo optimizers `reset` predictors, which drops each one's model: from there on every stage
runs on the one model of the settings, and a program of several models is bootstrapped and scored on the wrong ones.
SIMBA cannot name "the" model of such a program at all. Here predictors keep their model when reset, and where there are
several, asking the program for its model gives the first and setting one (SIMBA: the same model under another rollout
and temperature) changes those, and not the model.

**Writers** (`tolerant`). MIPROv2, COPRO and InferRules die of the first proposal that does not parse or whose prompt
does not fit the model, GEPA asks again and again and says nothing, and a small model is seldom understood and soon
full. Under a tolerant adapter such a proposal becomes the instruction it was to improve (no proposal), its other fields
become empty, and it is counted. Answers of the user's own program stay as strict as ever.

**Output** (`silence_logs`). Prints, progress bars and loggers go to the `copa_harness` logger at level DEBUG.

**Evaluations** (`Evaluations`, a DSPy callback). The programs of complete evaluations are remembered, so that the best
of them outlives a spent budget. An evaluation on validation that cannot be paid is refused before it starts; one that
perhaps can is run row by row: which rows a budget pays for then never depends on the timing of threads.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback
from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError

from copa_harness.errors import BudgetExhausted
from copa_harness.optimize.checks import check_metered
from copa_harness.optimize.search.candidate import Candidate, model_name
from copa_harness.optimize.step_budget import CallBudget

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


_CURRENT = ("basic_instruction", "current_instruction", "instruction")
"""Input fields under which DSPy's proposers state the instruction to be improved."""


class ProposalCount:
    """How many answers to proposal prompts there were, and how many were unusable. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.n_asked = 0
        self.n_unusable = 0

    def add(self, *, usable: bool) -> None:
        """Count one answer."""
        with self._lock:
            self.n_asked += 1
            self.n_unusable += not usable


def tolerant(adapter: Any, *, program: dspy.Module, count: ProposalCount) -> Any:
    """A copy of `adapter` that never fails on signatures the program does not have.

    Args:
        adapter: The prompt adapter in use.
        program: Its predictors' signatures keep failing loudly.
        count: Told of every answer to another signature.
    """
    own = {_shape(predictor.signature) for _, predictor in program.named_predictors()}
    fallback = next((predictor.signature.instructions for _, predictor in program.named_predictors()), "")
    kind: Any = type(adapter)

    class TolerantAdapter(kind):
        """`adapter`'s class, with unusable proposals replaced."""

        def __call__(
            self, lm: Any, lm_kwargs: dict[str, Any], signature: Any, demos: list[Any], inputs: dict[str, Any]
        ) -> list[dict[str, Any]]:
            if _shape(signature) in own:
                answers: list[dict[str, Any]] = super().__call__(lm, lm_kwargs, signature, demos, inputs)
                return answers
            try:
                answers = super().__call__(lm, lm_kwargs, signature, demos, inputs)
            except (AdapterParseError, ContextWindowExceededError):
                count.add(usable=False)
                current = _current(inputs) or fallback
                return [{name: current if "instruction" in name else "" for name in signature.output_fields}]
            count.add(usable=True)
            return answers

    clone = copy.copy(adapter)
    clone.__class__ = TolerantAdapter
    return clone


def _shape(signature: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(signature.input_fields), tuple(signature.output_fields)


def _current(inputs: Mapping[str, Any]) -> str:
    return next((str(inputs[name]) for name in _CURRENT if inputs.get(name)), "")


logger = logging.getLogger("copa_harness")

NOISY = ("dspy", "optuna", "gepa")
"""Loggers silenced meanwhile; their records go to our logger at DEBUG."""

_CONTROL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|\r")


class _Lines(io.TextIOBase):
    """A text stream whose complete lines become DEBUG records."""

    def __init__(self, source: str) -> None:
        self._source, self._rest = source, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text.replace("\r", "\n")).split("\n")
        for line in lines:
            clean = _CONTROL.sub("", line).strip()
            if clean:
                logger.debug("%s: %s", self._source, clean)
        return len(text)


class _Forward(logging.Handler):
    """Hands records on to our logger at DEBUG."""

    def emit(self, record: logging.LogRecord) -> None:
        logger.debug("%s: %s", record.name, _CONTROL.sub("", record.getMessage()))


@contextlib.contextmanager
def silence_logs(source: str) -> Iterator[None]:
    """Within the block, what is printed or logged by others goes to our logger at DEBUG.

    Args:
        source: Name put before every line.
    """
    kept = []
    forward = _Forward()
    for name in NOISY:
        noisy = logging.getLogger(name)
        kept.append((noisy, list(noisy.handlers), noisy.propagate))
        noisy.handlers, noisy.propagate = [forward], False
    try:
        with (
            contextlib.redirect_stdout(_Lines(source)),
            contextlib.redirect_stderr(_Lines(source)),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for noisy, handlers, propagate in kept:
            noisy.handlers, noisy.propagate = handlers, propagate


class Evaluations(BaseCallback):
    """Remembers the programs of the complete evaluations: those on the largest part of the validation split so far.

    Minibatches are left out that way, and an optimizer that takes a part of a large split for the whole (MIPROv2's
    `auto`) is understood.

    Args:
        valset: The validation split.
        allowance: What pays for an evaluation.
        calls_per_example: Upper estimate of what one row costs.
        known: Keys of the candidates whose answers on the whole split are paid for.
        settings_of: A program's settings as a candidate.
    """

    def __init__(
        self,
        valset: Sequence[dspy.Example],
        *,
        allowance: CallBudget,
        calls_per_example: int,
        known: frozenset[str],
        settings_of: Callable[[dspy.Module], Candidate],
    ) -> None:
        self._allowance, self._calls_per_example, self._settings_of = allowance, calls_per_example, settings_of
        self._lock = threading.Lock()
        self._validation = frozenset(id(example) for example in valset)
        self._running: dict[str, tuple[Candidate, list[int], Callable[[], None]]] = {}
        self._paid: dict[str, set[int]] = {key: set(self._validation) for key in known}
        self._found: dict[str, tuple[float, Candidate]] = {}
        self._n = 0
        self.n_complete = 0

    @property
    def best_first(self) -> tuple[Candidate, ...]:
        """Different programs, the best first, of equals the earlier."""
        return tuple(candidate for _, candidate in sorted(self._found.values(), key=lambda one: -one[0]))

    @property
    def covers_all(self) -> bool:
        """Whether the complete evaluations are on every validation example."""
        return self._n == len(self._validation)

    def on_evaluate_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Refuse what cannot be paid, and see to it that what perhaps can is run in order.

        Raises:
            BudgetExhausted: Even one call per row that is new is more than there are.
        """
        program, devset = inputs.get("program"), inputs.get("devset") or instance.devset
        if not isinstance(program, dspy.Module) or not program.named_predictors():
            return
        with self._lock:
            candidate, rows = self._settings_of(program), [id(example) for example in devset]
            n_new = len(set(rows) - self._paid.get(candidate.key, set()))
            restore = _nothing
            if not self._allowance.can_afford(n_new * self._calls_per_example):
                restore = self._held_to_budget(rows, n_new, instance, fixed=inputs.get("num_threads") is not None)
            self._running[call_id] = (candidate, rows, restore)

    def _held_to_budget(self, rows: Sequence[int], n_new: int, instance: Any, *, fixed: bool) -> Callable[[], None]:
        """What to do when the evaluation is over: put the number of threads back."""
        # A new prompt is at least one new call per row, stages before it may be answered already; and training rows may
        # have been answered outside of evaluations.
        is_validation = self._validation.issuperset(rows)
        if is_validation and (fixed or not self._allowance.can_afford(n_new)):
            raise BudgetExhausted(
                f"evaluating another program on {n_new} new rows takes up to {n_new * self._calls_per_example} calls, "
                f"and {self._allowance.remaining:g} are left; raise --copa-budget to go further"
            )
        if fixed:
            return _nothing
        threads, instance.num_threads = instance.num_threads, 1
        return partial(setattr, instance, "num_threads", threads)

    def on_evaluate_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        """Remember a program that was evaluated in full."""
        with self._lock:
            if call_id not in self._running:
                return
            candidate, rows, restore = self._running.pop(call_id)
            restore()
            if outputs is None or exception is not None:
                return
            self._paid.setdefault(candidate.key, set()).update(rows)
            n = len(rows)
            if n < self._n or not self._validation.issuperset(rows):
                return
            if n > self._n:
                self._n, self.n_complete = n, 0
                self._found.clear()
            self.n_complete += 1
            score = float(outputs.score)
            if candidate.key not in self._found or score > self._found[candidate.key][0]:
                self._found[candidate.key] = (score, candidate)


def _nothing() -> None:
    """For an evaluation that was left as it was."""
