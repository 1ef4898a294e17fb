"""What travels with a call beside its request: one frozen `CallContext`.

    open_scope    whose budget pays        booked_as   the phase it is billed to
    repeated      which repeat of a run    dry_run     count what would be paid, pay nothing
    observing     who is told the costs    evaluate()  whether log-probabilities of labels are wanted
         |
         v   `in_context(...)`: a copy with that changed, for the time of a block
    ONE entry of DSPy's settings           DSPy runs programs in threads of its own and hands them its settings and
         |                                 nothing else, so a context variable alone would be lost on the way
         v   `MeteredLM.__call__`: a copy with the rollout id and the constrained fields of this call
    ONE context variable                   set while the call runs; DSPy makes a call in the thread that asked for it
         |                                 (or hands its context over, for `acall`)
         v   `Gateway.call`: reads who pays and who is told; adds the seconds the budget leaves
    the engine, which may ask `time_left_s()`

Threads that DSPy starts for fine-tuning inherit neither; calls there are charged to the innermost scope that is open
anywhere in the process.

**Observing.** The meter of a scope books what is *paid*, and a replay costs nothing; a search that prefers cheap
programs must see what an answer costs when it is bought. So the gateway tells an `Observer`, beside its bookkeeping,
the usage, the price and the seconds that were stored with the answer when it was.

**Dry runs.** The program runs against the cache alone. Every call whose answer is not stored is counted with the most
it can cost, and refused with `NotCachedError`. What a program or an optimizer would ask *because of* the missing
answers cannot be known, so a dry run is a lower bound for the calls of an optimization and exact for an evaluation with
one call per example.

**Asking afresh.** Stored answers are asked for again, to see whether a model still gives them: the new answer is
charged and given back, and what is stored stays. Answers younger than `Afresh.before` are replayed.

**Repeats** of a whole run: every call inside is stored and sampled under its repeat, so repeats are independent, and
each is cached: running them again asks nothing. Repeat 0 is the plain run and shares its answers.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import dspy

from copa_harness.errors import ConfigurationError
from copa_harness.lm.budget.cost import Cost
from copa_harness.lm.budget.scope import Scope
from copa_harness.lm.constrained import OutputField
from copa_harness.lm.provider_errors import EngineError
from copa_harness.results import Budget, Phase, Usage

_Result = TypeVar("_Result")


class Completions:
    """How many completions of one call have arrived: DSPy asks for its `n` one after another."""

    __slots__ = ("n_arrived",)

    def __init__(self) -> None:
        self.n_arrived = 0


@dataclass(frozen=True, slots=True)
class CallContext:
    """What travels with a call.

    Attributes:
        scope: Who pays; None for the innermost scope open in the process.
        phase: What it is billed to, None for the phase the scope is in.
        repeat: Which repeat of a run it belongs to; 0 is the plain run.
        dry_run: Counts what would be paid, and nothing is.
        observer: Is told what the answer cost when it was bought.
        label_scores: Whether predictions shall carry the log-probability of every allowed value of a constrained field,
            as with the LM's own `logprobs=True`.
        rollout_id: DSPy's rollout id together with the repeat, or None. From here on known during a call only.
        fields: The output fields of a constrained answer.
        completions: How many of the call's completions have arrived.
        time_left_s: Seconds the budget leaves it.
        json_fallback: Whether a program asks again in JSON when an answer does not parse; outside of calls only.
        requests: Collects the cache keys of what is asked, for whoever wants to know whether two runs ask the same.
        gives_way: Whether its `max_tokens` is a ceiling of ours, which gives way to what room the context leaves.
        opened: Where scopes are listed as they are opened, see `scopes_opened`.
        afresh: Stored answers that it covers are asked for again.
    """

    scope: Scope | None = None
    phase: Phase | None = None
    repeat: int = 0
    dry_run: DryRun | None = None
    observer: Observer | None = None
    label_scores: bool = False
    rollout_id: object = None
    fields: tuple[OutputField, ...] | None = None
    completions: Completions | None = None
    time_left_s: float = math.inf
    gives_way: bool = False
    json_fallback: bool = False
    requests: list[str] | None = None
    opened: list[Scope] | None = None
    afresh: Afresh | None = None

    def for_call(
        self, rollout_id: object, fields: tuple[OutputField, ...] | None, *, gives_way: bool = False
    ) -> CallContext:
        """The same for one call; written out, since `replace` takes longer than the rest of what a call needs here."""
        around = (self.scope, self.phase, self.repeat, self.dry_run, self.observer, self.label_scores)
        return CallContext(
            *around, rollout_id, fields, Completions(), gives_way=gives_way, requests=self.requests, afresh=self.afresh
        )


SETTING = "copa_context"
"""Name of the context in DSPy's settings."""

_NOTHING = CallContext()

_call: ContextVar[CallContext | None] = ContextVar("copa_call", default=None)


def current_context() -> CallContext:
    """The context of calls made here and now."""
    found = dspy.settings.get(SETTING)
    return found if isinstance(found, CallContext) else _NOTHING


@contextmanager
def in_context(**changes: Any) -> Iterator[CallContext]:
    """Change fields of the context for the block, in whatever thread DSPy runs what is in it.

    Also the way to take a context into a thread of one's own: `with in_context(scope=scope): ...`.
    """
    context = replace(current_context(), **changes)
    with dspy.context(**{SETTING: context}):
        yield context


def current_call() -> CallContext | None:
    """The context of the call under way in this thread, None outside calls."""
    return _call.get()


class calling:
    """Have a context be that of the call under way, for the block and this thread."""

    __slots__ = ("_context", "_token")

    def __init__(self, context: CallContext) -> None:
        self._context = context

    def __enter__(self) -> None:
        self._token = _call.set(self._context)

    def __exit__(self, *error: object) -> None:
        _call.reset(self._token)


def time_left_s() -> float:
    """Seconds the budget leaves the call under way."""
    context = _call.get()
    return math.inf if context is None else context.time_left_s


def ceiling_gives_way() -> bool:
    """Whether `max_tokens` of the call under way gives way to what room the context leaves."""
    context = _call.get()
    return context is not None and context.gives_way


# -- scopes

_stack_lock = threading.Lock()

_stack: list[Scope] = []

_default = Scope("process")


def scope_of(context: CallContext) -> Scope:
    """Who pays for a call: the context's scope, else the innermost one open in the process, else an unlimited one."""
    if context.scope is not None:
        return context.scope
    with _stack_lock:
        return _stack[-1] if _stack else _default


def is_counted(context: CallContext) -> bool:
    """Whether somebody opened a scope that a call is charged to, and can read there what became of it."""
    return scope_of(context) is not _default


def current_scope() -> Scope:
    """The scope calls are charged to here and now."""
    return scope_of(current_context())


@contextmanager
def open_scope(name: str, *, budget: Budget | None = None) -> Iterator[Scope]:
    """Open a scope for the duration of the block, and end it afterwards.

    Args:
        name: Shown in messages.
        budget: The ceilings; unlimited by default.

    Yields:
        The scope; its usage stays readable after the block.
    """
    scope = Scope(name, budget=budget)
    if (opened := current_context().opened) is not None:
        opened.append(scope)
    with _stack_lock:
        _stack.append(scope)
    try:
        with in_context(scope=scope):
            yield scope
    finally:
        with _stack_lock:
            _stack.remove(scope)
        scope.close()


@contextmanager
def scopes_opened() -> Iterator[list[Scope]]:
    """The scopes opened in the block, in their order: what was paid there can be told however it ended."""
    opened: list[Scope] = []
    with in_context(opened=opened):
        yield opened


@contextmanager
def booked_as(phase: Phase) -> Iterator[None]:
    """Stamp every call inside the block with `phase`, whatever phase the scope is in.

    For calls that hide in something else: what a metric asks a judge model is booked as `Phase.METRIC`.
    """
    with in_context(phase=phase):
        yield


# -- repeats


@contextmanager
def repeated(index: int) -> Iterator[None]:
    """Make every call inside the block belong to repeat `index`.

    Args:
        index: From 0; 0 is the plain run.

    Raises:
        ConfigurationError: Not a whole number of at least 0.
    """
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise ConfigurationError(f"got the repeat {index!r}, expected a whole number from 0 up")
    with in_context(repeat=index):
        yield


# -- observing


@dataclass(frozen=True, slots=True)
class Observed:
    """One call: tokens in and out, dollars, seconds; None for what nobody knows."""

    input_tokens: int | None
    output_tokens: int | None
    usd: float | None
    seconds: float | None


class Observer:
    """Collects what calls cost. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: list[Observed] = []

    def add(self, observed: Observed) -> None:
        """Note one call."""
        with self._lock:
            self._seen.append(observed)

    @property
    def seen(self) -> tuple[Observed, ...]:
        """The calls so far, in any order."""
        with self._lock:
            return tuple(self._seen)


@contextmanager
def observing() -> Iterator[Observer]:
    """Note every call inside the block: what its answer cost, the same whether bought now or replayed."""
    observer = Observer()
    with in_context(observer=observer):
        yield observer


# -- asking afresh


@dataclass(frozen=True, slots=True)
class Afresh:
    """Stored answers are asked for again.

    Attributes:
        before: Unix seconds; answers stored later are no old ones, and are replayed.
        stored_s: When each answer that is asked for again was stored, None where nobody noted it.
        varying: Phases in which a model was asked that may answer otherwise the next time.
    """

    before: float
    stored_s: list[float | None] = field(default_factory=list)
    varying: set[Phase | None] = field(default_factory=set)

    def takes(self, phase: Phase | None, *, stored_s: float | None, varies: bool) -> bool:
        """Whether an answer is an old one; it is noted then."""
        if stored_s is not None and stored_s >= self.before:
            return False
        self.stored_s.append(stored_s)
        self.varying.update([phase] if varies else [])
        return True


# -- dry runs


class NotCachedError(EngineError):
    """Only a plan is being made: the answer is not stored, and nothing is paid for it now."""

    kind = "not cached"


class DryRun:
    """What a run would ask and pay. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._missing: dict[str, Cost] = {}
        self._known: dict[str, Cost | None] = {}
        self._n_unbounded = 0

    def add_known(self, key: str, worst: Cost | None = None) -> None:
        """Count a distinct call whose answer is stored, with the most it could have cost, None when nobody knows."""
        with self._lock:
            self._known[key] = worst

    def add_missing(self, key: str, worst: Cost | None) -> None:
        """Count a distinct call that would be paid, with the most it can cost, None when nobody knows."""
        with self._lock:
            if key not in self._missing:
                self._missing[key] = Cost(calls=1) if worst is None else worst
                self._n_unbounded += worst is None

    @property
    def usage(self) -> Usage:
        """What would be paid at most: calls, tokens, dollars; `estimated_calls` are those nobody can bound."""
        with self._lock:
            total = sum(self._missing.values(), Cost())
            return Usage(
                paid_calls=total.calls,
                cached_calls=len(self._known),
                input_tokens=total.input_tokens,
                output_tokens=total.output_tokens,
                usd=total.usd,
                estimated_calls=self._n_unbounded,
            )

    @property
    def each(self) -> Cost | None:
        """What a call of this kind can cost at most, the mean over those counted; None when nobody knows."""
        with self._lock:
            bounds = [*self._missing.values(), *self._known.values()]
            if not bounds or self._n_unbounded or None in bounds:
                return None
            total = sum((bound for bound in bounds if bound is not None), Cost())
            n = len(bounds)
            return Cost(1, total.input_tokens // n, total.output_tokens // n, total.picodollars // n)


@contextmanager
def dry_run() -> Iterator[DryRun]:
    """Pay for nothing inside the block, and count what would have been paid."""
    run = DryRun()
    with in_context(dry_run=run):
        yield run


def in_threads(jobs: Sequence[Callable[[], _Result]], *, threads: int) -> tuple[_Result, ...]:
    """The jobs' results in their order; the first exception cancels what has not started and is raised.

    The threads are daemons, since nobody waits for them once this one is interrupted (Ctrl-C): a request under way may
    take minutes, and Python waits for the threads of its own pools even when it ends.
    """
    # A context can be entered once at a time, so every job gets a copy of its own.
    contexts = [copy_context() for _ in jobs]
    if min(threads, len(jobs)) == 1:
        return tuple(context.run(job) for context, job in zip(contexts, jobs, strict=True))
    waiting, stops = deque(range(len(jobs))), threading.Event()
    results: dict[int, _Result] = {}
    failures: dict[int, BaseException] = {}

    def work() -> None:
        while not stops.is_set():
            try:
                index = waiting.popleft()
            except IndexError:
                return
            try:
                results[index] = contexts[index].run(jobs[index])
            except BaseException as error:  # noqa: BLE001 - it is raised where the results are awaited
                failures[index] = error
                stops.set()

    workers = [
        threading.Thread(target=work, name=f"copa-{number}", daemon=True) for number in range(min(threads, len(jobs)))
    ]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        stops.set()
    if failures:
        raise failures[min(failures)]
    return tuple(results[index] for index in range(len(jobs)))
