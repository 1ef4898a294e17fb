"""Finished optimizations by everything their outcome depends on: the same optimization is never made twice.

The key covers data, metric and program with whatever they reach (`store/fingerprints.py`), the prompt adapter,
fingerprints and settings of the models, strategy, budget, seed, search settings, package versions and this package's
own source. An optimization is looked up in memory, then on disk, and only then
made: under a lock, so that of several processes that need it one makes it and the others wait and find it done. One
found on disk costs no call, no training step and no import of torch or Optuna.

What a run says when the disk takes no more is one clear error, or a warning where only repetition is lost.
"""

from __future__ import annotations

import errno
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copa_harness.documents import from_json, to_json
from copa_harness.errors import ArtifactError, CacheError, ConfigurationError
from copa_harness.results import OptimizationResult, PhaseRecord, Usage
from copa_harness.session.options import Settings
from copa_harness.shared_files import current_files
from copa_harness.store.artifacts import MANIFEST
from copa_harness.tracing import span

if TYPE_CHECKING:
    import dspy

    from copa_harness.lm.metered import MeteredLM
    from copa_harness.optimize.copa import COPA
    from copa_harness.optimize.search.journal import SharedJournal
    from copa_harness.session.runs import ScoredEvaluation
    from copa_harness.shared.database import SharedDatabase
    from copa_harness.store.stages import StageStore
    from copa_harness.tasks.task import Task

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


@contextmanager
def disk_errors(directory: Path, task: str) -> Iterator[None]:
    """The block writes below `directory` for the optimization of `task`.

    Raises:
        CacheError: The disk is full or cannot be written. Other errors of the system pass as they are.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise CacheError(
            f"the optimization of {task} cannot go on: the cache directory {directory} takes no more "
            f"({error.strerror}). Next: free some space or name another folder with --copa-cache-dir, then run again "
            f"(answers it has taken are not paid for again)."
        ) from error


def keep(stages: StageStore, key: str, value: Mapping[str, Any], *, task: str) -> None:
    """Keep the result of a finished optimization; where the disk takes no more, warn and go on with the result."""
    try:
        stages.put(key, value)
    except OSError as error:
        warnings.warn(
            f"the finished optimization of {task} could not be kept in {stages.directory} "
            f"({error.strerror or error}); its result stands, and the search is made again next time. Free some space, "
            f"or name another folder with --copa-cache-dir",
            RuntimeWarning,
            stacklevel=2,
        )


def keep_scored(optimized: Optimized, evaluation: ScoredEvaluation, settings: Settings) -> None:
    """Keep the test answers with the artifact, for `copa export` and its check; warn where they cannot be kept."""
    from copa_harness.export.scored import scored_of
    from copa_harness.lm.factory import addresses_of
    from copa_harness.store.artifacts import add_scored, holds_scored
    from copa_harness.store.stages import StageStore

    scored = scored_of(
        optimized.program,
        optimized.lm,
        evaluation,
        task=evaluation.task,
        strategy=evaluation.strategy,
        api_base=next(iter(addresses_of(settings.api_base)), ""),
    )
    try:
        document = to_json(scored)
        if not holds_scored(optimized.artifact, document):  # a cache that cannot be written has them as well
            with StageStore(settings.cache_dir / "stages").exclusive(optimized.key):
                add_scored(optimized.artifact, document)
        if (files := current_files()) is not None:
            files.put(f"artifacts/{optimized.artifact.name}", optimized.artifact, anew=True)
    except (OSError, ArtifactError, TypeError) as error:
        warnings.warn(f"{optimized.artifact}: its test answers could not be kept ({error})", RuntimeWarning, 2)


PACKAGES = ("copa-harness", "dspy", "torch", "transformers", "peft", "optuna", "numpy", "scikit-learn")

_SHAPING = ("strategy.py", "lm", "evaluate", "tune", "optimize", "robustness")
"""Modules and rooms of this package that decide how an optimization runs."""


@dataclass(slots=True)
class Optimized:
    """A finished optimization.

    Attributes:
        key: Names everything it depends on.
        program: The optimized program, models attached.
        lm: The model it runs on.
        result: What the optimizer reported when it was made.
        artifact: Folder with program, LoRA adapter and manifest.
        from_disk: It was found finished, not made by this process.
        cut_short: The session's ceilings ended the search; what it found is no result.
    """

    key: str
    program: dspy.Module
    lm: MeteredLM
    result: OptimizationResult
    artifact: Path
    from_disk: bool
    cut_short: bool = False
    _told: bool = field(default=False, init=False)

    def tell_phases(self) -> tuple[PhaseRecord, ...]:
        """The phases with what they spent here and now: nothing, when they were found finished.

        It is told once: further records of the same optimization spend nothing, so a report sums up right.
        """
        told_before, self._told = self._told, True
        if not (self.from_disk or told_before):
            return self.result.phases
        where = "done earlier" if self.from_disk else "shared"
        return tuple(
            replace(
                phase,
                usage=Usage(cached_calls=phase.usage.paid_calls + phase.usage.cached_calls),
                note="; ".join(part for part in (_cost(phase.usage, where), phase.note) if part),
            )
            for phase in self.result.phases
        )


def _cost(usage: Usage, where: str) -> str:
    return f"{where} for {usage.paid_calls:,} calls, {usage.train_steps:,} steps, {usage.wall_s:.0f} s"


class Optimizations:
    """Makes optimizations, or finds them made.

    Args:
        directory: The cache directory.
        database: Where several machines keep their results, if they do.
        on_progress: Takes a line of text while an optimization runs.
    """

    def __init__(
        self,
        directory: Path,
        *,
        database: SharedDatabase | None = None,
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        from copa_harness.store.stages import StageStore

        self._directory, self._on_progress, self._database = directory, on_progress, database
        self._stages = StageStore(directory / "stages")
        if database is not None:
            from copa_harness.shared.stages import SharedStages

            self._stages = SharedStages(database)
        self._made: dict[str, Optimized] = {}

    def get(self, task: Task, *, lm: MeteredLM, prompt_lm: MeteredLM | None, settings: Settings) -> Optimized:
        """The task's program optimized as the settings say.

        The test split is not looked at.
        """
        key = _key(task, lm=lm, prompt_lm=prompt_lm, settings=settings)
        if key not in self._made:
            with disk_errors(self._directory, task.name):
                self._made[key] = self._found(key, task, lm) or self._make(key, task, lm, prompt_lm, settings)
        return self._made[key]

    def finished(
        self, task: Task, *, lm: MeteredLM, prompt_lm: MeteredLM | None, settings: Settings
    ) -> Optimized | None:
        """The same if it was made before, by whatever session; None otherwise. Never makes it."""
        key = _key(task, lm=lm, prompt_lm=prompt_lm, settings=settings)
        return self._made.get(key) or self._found(key, task, lm)

    def _found(self, key: str, task: Task, lm: MeteredLM) -> Optimized | None:
        from copa_harness.optimize.result import apply_state

        stored = self._stages.get(key)
        if stored is None:
            return None
        try:
            result = from_json(OptimizationResult, stored["result"])
            if result.state is None:
                return None
            program = apply_state(task.program, result.state, lm=lm)
        except (ConfigurationError, LookupError, TypeError, ValueError, AttributeError) as error:
            told = f"the stored optimization of {task.name} cannot be used ({error}); it is made again"
            warnings.warn(told, RuntimeWarning, stacklevel=2)
            return None
        artifact = self._folder(key, task, result)
        is_news = False
        if (files := current_files()) is not None and not (artifact / MANIFEST).exists():
            is_news = files.get(f"artifacts/{artifact.name}", artifact)
        given = (lm, *task.program.predictors())
        if not self._has_adapters(program, given=given, artifact=artifact, is_news=is_news):
            return None
        return self._finished(key, task, program, lm, result, from_disk=True)

    def _make(
        self,
        key: str,
        task: Task,
        lm: MeteredLM,
        prompt_lm: MeteredLM | None,
        settings: Settings,
    ) -> Optimized:
        """Made by this process while others that need the same wait, or found done after waiting for another."""
        from copa_harness.optimize.copa import COPA
        from copa_harness.optimize.search.progress import titled

        strategy = settings.strategy
        optimizer = COPA(
            metric=task.metric,
            strategy=strategy,
            budget=settings.budget,
            seed=settings.seed,
            lm=lm,
            prompt_lm=prompt_lm,
            threads=settings.threads,
            finetune_data=task.finetune_data,
            journal=self._journal(f"{_slug(task.name)}-{_slug(strategy)}-{key[:12]}"),
            on_progress=titled(task.name, self._on_progress),
            **settings.search,
        )
        with self._stages.exclusive(key):
            return self._found(key, task, lm) or self._made_by(optimizer, key, task, lm, settings)

    def _journal(self, name: str) -> Path | SharedJournal:
        if self._database is None:
            return self._directory / "studies" / f"{name}.jsonl"
        from copa_harness.optimize.search.journal import SharedJournal

        return SharedJournal(self._database, name)

    def _made_by(self, optimizer: COPA, key: str, task: Task, lm: MeteredLM, settings: Settings) -> Optimized:
        from copa_harness.documents import hash_json
        from copa_harness.lm.budget.ledger import current_ledger
        from copa_harness.lm.call_context import in_context

        ledger = current_ledger()
        n_refused = 0 if ledger is None else ledger.n_refused
        named = {"copa__task": task.name, "copa__strategy": settings.strategy, "gen_ai__request__model": lm.model}
        with span("copa.optimize", **named), in_context(json_fallback=settings.json_fallback):
            program = optimizer.compile(task.program, trainset=list(task.trainset), valset=list(task.valset))
        result: OptimizationResult = program.copa_result
        cut_short = result.exhausted and ledger is not None and ledger.n_refused > n_refused  # not by its own ceilings
        if cut_short:
            key = hash_json([key, "cut short", to_json(result)])  # another session may have more to spend
        if result.state is not None and not cut_short:
            keep(self._stages, key, {"task": task.name, "result": to_json(result)}, task=task.name)
        return self._finished(key, task, program, lm, result, cut_short=cut_short)

    def _finished(
        self,
        key: str,
        task: Task,
        program: dspy.Module,
        lm: MeteredLM,
        result: OptimizationResult,
        *,
        from_disk: bool = False,
        cut_short: bool = False,
    ) -> Optimized:
        models = [predictor.lm for predictor in program.predictors() if predictor.lm is not None]
        tuned = next((model for model in models if model.model == result.model), lm)
        artifact = self._saved(key, task, program, tuned, result)
        if (files := current_files()) is not None:
            files.put(f"artifacts/{artifact.name}", artifact)
        return Optimized(key, program, tuned, result, artifact, from_disk=from_disk, cut_short=cut_short)

    def _has_adapters(
        self, program: dspy.Module, *, given: Sequence[Any], artifact: Path, is_news: bool = False
    ) -> bool:
        """Whether the LoRA adapters that a finished program asks are there; a lost one is put back from its artifact.

        Args:
            program: What was found.
            given: Models, and predictors with theirs, that were there before: theirs are not ours to put back.
            artifact: Its folder.
            is_news: It has just come from another machine.
        """
        from copa_harness.lm.local.files import split_model_name
        from copa_harness.store.artifacts import load_artifact
        from copa_harness.tune.checkpoints import is_whole, restore

        known = {getattr(getattr(one, "lm", None) or one, "model", None) for one in given}
        for lm in {predictor.lm.model: predictor.lm for predictor in program.predictors()}.values():
            directory, digits = getattr(getattr(lm, "engine", None), "lora_dir", None), split_model_name(lm.model)[1]
            if digits is None or directory is None or lm.model in known or is_whole(Path(directory), digits):
                continue
            what = f"the LoRA adapter {lm.model} is lost or damaged"
            try:
                copy = load_artifact(artifact).lora_directory
                if copy is None:
                    raise ArtifactError(f"there is none in {artifact}")
                restore(Path(directory), digits, copy=copy)
            except ArtifactError as error:
                told = f"{what}, and so is its copy ({error}); it is trained again"
                warnings.warn(told, RuntimeWarning, stacklevel=2)
                return False
            if not is_news:
                warnings.warn(f"{what}; it was put back from the artifact {artifact}", RuntimeWarning, stacklevel=2)
        return True

    def _folder(self, key: str, task: Task, result: OptimizationResult) -> Path:
        return self._directory / "artifacts" / f"{_slug(task.name)}-{_slug(result.strategy)}-{key[:12]}"

    def _saved(self, key: str, task: Task, program: dspy.Module, lm: MeteredLM, result: OptimizationResult) -> Path:
        """The artifact's folder; written when it is not there yet, or damaged."""
        from copa_harness.report.provenance import versions
        from copa_harness.store.artifacts import save_artifact, verify_artifact

        folder = self._folder(key, task, result)
        try:
            verify_artifact(folder)
        except ArtifactError:
            save_artifact(
                folder,
                program_state=program.dump_state(json_mode=True),
                lora_directory=_lora_directory(lm),
                manifest={
                    "task": task.name,
                    "strategy": result.strategy,
                    "model": result.model,
                    "model_fingerprint": lm.fingerprint,
                    "seed": result.seed,
                    "validation_score": result.score_after,
                    "n_validation": result.n_validation,
                    "versions": versions(PACKAGES),
                },
            )
        return folder


def program_fingerprint(program: dspy.Module) -> str:
    """SHA-256 of a program: its class, attributes and predictors, models left out, and the user's prompt adapter."""
    from copa_harness.documents import hash_json
    from copa_harness.evaluate.runner import users_adapter
    from copa_harness.store.fingerprints import hash_source

    adapter = users_adapter()
    return hash_json([hash_source(program, models=False), None if adapter is None else hash_source(adapter)])


def task_fingerprint(task: Task) -> str:
    """SHA-256 of a task: its data, the source of its metric, its program. Its name does not count."""
    from copa_harness.documents import hash_json
    from copa_harness.store.fingerprints import hash_examples, hash_source

    return hash_json(
        {
            "trainset": hash_examples(task.trainset),
            "valset": hash_examples(task.valset),
            "testset": hash_examples(task.testset),
            "finetune_data": task.finetune_data,
            "metric": hash_source(task.metric),
            "program": program_fingerprint(task.program),
        }
    )


def fingerprints_of(task: Task, program: dspy.Module, lm: MeteredLM) -> dict[str, str]:
    """What must agree before test scores are compared (data, split, metric), and what was judged (program, lm)."""
    from copa_harness.store.fingerprints import hash_examples, hash_source

    return {
        "data": hash_examples(task.testset),
        "split": "test",
        "metric": hash_source(task.metric),
        "program": program_fingerprint(program),
        "lm": lm.fingerprint,
    }


def _key(task: Task, *, lm: MeteredLM, prompt_lm: MeteredLM | None, settings: Settings) -> str:
    from copa_harness.documents import hash_json
    from copa_harness.report.provenance import versions
    from copa_harness.store.fingerprints import hash_source
    from copa_harness.strategy import parse_strategy

    return hash_json(
        {
            "task": task_fingerprint(task),
            "lm": [lm.model, lm.fingerprint, lm.kwargs, lm.answer_tokens],
            "own_lms": [hash_source(p.lm) for p in task.program.predictors() if p.lm],
            "trained": getattr(lm.engine, "weights_fingerprint", None),  # a copy of what a server runs
            "prompt_lm": prompt_lm and [prompt_lm.model, prompt_lm.fingerprint, prompt_lm.kwargs],
            "strategy": [str(step) for step in parse_strategy(settings.strategy)],
            "budget": settings.budget.ceilings,
            "json_fallback": settings.json_fallback,
            "seed": settings.seed,
            "search": _search_key(settings.search),
            "versions": versions(PACKAGES),
            "source": _own_source(),
        }
    )


def _search_key(search: Mapping[str, Any]) -> dict[str, Any]:
    """Search options as keys hold them."""
    key = {
        name: asdict(value) if is_dataclass(value) and name != "guard" else value  # type: ignore[arg-type]
        for name, value in search.items()
    }
    if not key.get("robust"):
        key.pop("perturbations", None)  # a gate's affair
    if key.get("guard") is not None:
        from copa_harness.optimize.guard import guard_task

        key["guard"] = task_fingerprint(guard_task(search["guard"]))
    if "pass_score" in key:
        key["min_score"] = key.pop("pass_score")  # its name in `COPA` when the first keys were made
    return key


@cache
def _own_source() -> str:
    """SHA-256 of the modules that decide how an optimization runs: a changed optimizer makes new results."""
    from copa_harness.documents import hash_file, hash_json

    package = Path(__file__).parents[1]
    places = [package / name for name in _SHAPING]
    files = sorted(path for place in places for path in ([place] if place.is_file() else place.rglob("*.py")))
    return hash_json({path.relative_to(package).as_posix(): hash_file(path) for path in files})


def _lora_directory(lm: MeteredLM) -> Path | None:
    """Where the LoRA adapter of a fine-tuned local model lies; None for base weights and remote models."""
    from copa_harness.lm.local.files import find_lora, split_model_name

    digits = split_model_name(lm.model)[1]
    directory = getattr(lm.engine, "lora_dir", None)
    return find_lora(Path(directory), digits) if digits is not None and directory is not None else None


def _slug(text: str) -> str:
    plain = "".join(one if one.isalnum() or one in "_." else "-" for one in text.lower()[:50])
    return plain.strip("-").replace("--", "-")
