"""DSPy's fine-tuning interface over `LoraTrainer`: `lm.finetune(...)`, `BootstrapFinetune`, `BetterTogether`.

DSPy runs `Provider.finetune` on a thread of its own, takes the model name it returns and copies the LM under that name.
An exception outside `Exception` would end that thread without a word and leave `job.result()` waiting for ever; here it
is carried to whoever asks for the result. Knows nothing of how training works.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspy.clients.provider import Provider, TrainingJob

from copa_harness.errors import ConfigurationError, TrainingError
from copa_harness.tune.rows import TrainingRow
from copa_harness.tune.settings import LoraSettings
from copa_harness.tune.trainer import LoraTrainer

if TYPE_CHECKING:
    from copa_harness.lm.local import TransformersEngine
    from copa_harness.lm.metered import MeteredLM


class _Carried(Exception):
    """Carries a BaseException out of DSPy's training thread; the cause is the one that counts."""


class LoraTrainingJob(TrainingJob):
    """DSPy's future of one training. As DSPy has it, `result()` *returns* an ordinary exception."""

    def status(self) -> str:
        """`done` or `running`."""
        return "done" if self.done() else "running"

    def result(self, timeout: float | None = None) -> Any:
        """The fine-tuned LM, or the exception that prevented it.

        Raises:
            BaseException: what is not an `Exception` (a spent budget, Ctrl-C) is raised, as without threads.
        """
        value = super().result(timeout)
        if isinstance(value, _Carried) and value.__cause__ is not None:
            raise value.__cause__
        return value


class LoraProvider(Provider):
    """Fine-tunes an engine's base model.

    Args:
        engine: the local engine.
        directory: where LoRA adapters are kept; give the engine's `lora_dir`.
        settings: defaults; DSPy's `train_kwargs` change single ones by name.

    An LM that is fine-tuned already is trained anew from the base: an adapter never stands on another.
    """

    def __init__(self, engine: TransformersEngine, *, directory: Path, settings: LoraSettings | None = None) -> None:
        super().__init__()
        self.finetunable = True
        self.TrainingJob = LoraTrainingJob
        self.engine = engine
        self.settings = settings or LoraSettings()
        self.trainer = LoraTrainer(engine, directory=directory)

    def __deepcopy__(self, memo: dict[int, Any]) -> LoraProvider:
        """Itself: DSPy deep-copies programs with their models and providers."""
        return self

    def launch(self, lm: Any, launch_kwargs: dict[str, Any] | None = None) -> None:
        """Nothing to do: the engine loads a model when it is asked."""

    def kill(self, lm: Any, launch_kwargs: dict[str, Any] | None = None) -> None:
        """Nothing to do: training shares the weights in memory with the engine."""

    def finetune(
        self,
        job: TrainingJob,
        model: str,
        train_data: list[dict[str, Any]],
        train_data_format: Any,
        train_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """Train on DSPy's chat rows; returns the fine-tuned model's name.

        Args:
            job: DSPy's future of this training.
            model: the LM's model name; its base is trained.
            train_data: `{"messages": [...]}` each.
            train_data_format: `chat`.
            train_kwargs: `LoraSettings` by name, and `served_with`.

        Raises:
            TrainingError, ConfigurationError: see `LoraTrainer.train` and `LoraSettings`.
        """
        try:
            kind = getattr(train_data_format, "value", train_data_format)
            if kind not in (None, "chat"):
                raise TrainingError(
                    f"got training data in the format {kind!r}; expected chat rows; remedy: dspy.ChatAdapter"
                )
            changes: dict[str, Any] = dict(train_kwargs or {})
            served_with = str(changes.pop("served_with", "as in the rows"))
            rows = [TrainingRow.from_chat(row) for row in train_data]
            return self.trainer.train(rows, settings=self.settings.replaced(changes), served_with=served_with).model
        except Exception:
            raise
        except BaseException as error:
            raise _Carried(f"{type(error).__name__}: {error}") from error


def attach_provider(lm: MeteredLM, *, directory: Path, settings: LoraSettings | None = None) -> MeteredLM:
    """A copy of `lm` that DSPy can fine-tune.

    Raises:
        ConfigurationError: its engine is not a local one.
    """
    provider = LoraProvider(_local_engine(lm), directory=directory, settings=settings)
    return lm.copy(provider=provider)


def finetune(
    lm: MeteredLM,
    rows: Sequence[TrainingRow | Mapping[str, Any]],
    *,
    directory: Path,
    served_with: str,
    settings: LoraSettings | None = None,
    held_out: Sequence[TrainingRow | Mapping[str, Any]] = (),
) -> MeteredLM:
    """Fine-tune the base of `lm` on rows (or `{"messages": [...]}`); returns the tuned LM. See `LoraTrainer.train`."""
    adapter = LoraTrainer(_local_engine(lm), directory=directory).train(
        _rows(rows), settings=settings, held_out=_rows(held_out), served_with=served_with
    )
    return lm.copy(model=adapter.model)


def _rows(rows: Sequence[TrainingRow | Mapping[str, Any]]) -> list[TrainingRow]:
    return [row if isinstance(row, TrainingRow) else TrainingRow.from_chat(row) for row in rows]


def _local_engine(lm: MeteredLM) -> TransformersEngine:
    from copa_harness.lm.local import TransformersEngine

    engine = lm.engine
    if not isinstance(engine, TransformersEngine):
        raise ConfigurationError(
            f"got the LM {lm.model!r}, whose engine is {type(engine).__name__}; expected a local one (embedded or "
            "hf:...), the only kind whose weights can be trained here"
        )
    return engine
