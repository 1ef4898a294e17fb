"""DSPy's fine-tuning interface over `LoraTrainer`: `lm.finetune(...)`, `BootstrapFinetune`, `BetterTogether`.

DSPy runs `Provider.finetune` on a thread of its own, takes the model name it returns and copies the LM under that name.
An exception outside `Exception` would end that thread without a word and leave `job.result()` waiting for ever; here it
is carried to whoever asks for the result. A model that a vLLM server runs is trained on the copy of its weights that
its engine holds, and the server is made to serve the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspy.clients.provider import Provider, TrainingJob

from copa_harness.errors import ConfigurationError, TrainingError
from copa_harness.lm.endpoint.replicas import ReplicaEngine
from copa_harness.lm.endpoint.vllm import VllmEngine
from copa_harness.tune.checkpoints import is_finished
from copa_harness.tune.options import LoraSettings, is_large, suited
from copa_harness.tune.rows import TrainingRow
from copa_harness.tune.trainer import LoraAdapter, LoraTrainer

if TYPE_CHECKING:
    from copa_harness.lm.local.engine import TransformersEngine
    from copa_harness.lm.metered import MeteredLM

    TrainableEngine = TransformersEngine | VllmEngine | ReplicaEngine

_SERVED = (VllmEngine, ReplicaEngine)


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
        engine: a local one, or a vLLM server's with a copy of its weights.
        directory: where LoRA adapters are kept; give the engine's `lora_dir`.
        settings: defaults, else those that suit the model; DSPy's `train_kwargs` change single ones by name.

    An LM that is fine-tuned already is trained anew from the base: an adapter never stands on another.
    """

    def __init__(self, engine: TrainableEngine, *, directory: Path, settings: LoraSettings | None = None) -> None:
        super().__init__()
        self.finetunable = True
        self.TrainingJob = LoraTrainingJob
        self.engine = engine
        self.settings = settings
        self.trainer = LoraTrainer(_weights_of(engine), directory=directory)

    def __deepcopy__(self, memo: dict[int, Any]) -> LoraProvider:
        """Itself: DSPy deep-copies programs with their models and providers."""
        return self

    def launch(self, lm: Any, launch_kwargs: dict[str, Any] | None = None) -> None:
        """Nothing to do: an engine loads a model, and has its server load an adapter, when it is asked."""

    def kill(self, lm: Any, launch_kwargs: dict[str, Any] | None = None) -> None:
        """Take the model's adapter off the server, if one serves it; it comes back when the model is asked."""
        if isinstance(self.engine, _SERVED):
            self.engine.unload(lm.model)

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
            own = {} if self.settings else suited(self.trainer.engine.directory, n_rows=len(rows))
            settings = (self.settings or LoraSettings()).replaced({**own, **changes})
            adapter = _train(self.engine, self.trainer, rows, settings=settings, held_out=(), served_with=served_with)
            return adapter.model
        except Exception:
            raise
        except BaseException as error:
            raise _Carried(f"{type(error).__name__}: {error}") from error


def attach_provider(lm: MeteredLM, *, directory: Path | None = None, settings: LoraSettings | None = None) -> MeteredLM:
    """A copy of `lm` that DSPy can fine-tune.

    Args:
        lm: local, or a vLLM server's with base weights (`build_lm(..., base_weights=)`).
        directory: where adapters are kept; the engine's `lora_dir` by default.
        settings: defaults of its trainings; without any, those that suit the model.

    Raises:
        ConfigurationError: its engine is neither.
    """
    engine = _trainable(lm)
    provider = LoraProvider(engine, directory=directory or engine.lora_dir, settings=settings)
    return lm.copy(provider=provider)


def suited_to(lm: MeteredLM, *, n_rows: int, with_demos: bool) -> Mapping[str, Any]:
    """Settings by name that suit the base of `lm`, see `suited`."""
    return suited(_weights_of(_trainable(lm)).directory, n_rows=n_rows, with_demos=with_demos)


def is_large_model(lm: MeteredLM) -> bool:
    """Whether the base of `lm` is large, see `options.is_large`."""
    return is_large(_weights_of(_trainable(lm)).directory)


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
    adapter = train_lora(lm, rows, directory=directory, served_with=served_with, settings=settings, held_out=held_out)
    return lm.copy(model=adapter.model)


def train_lora(
    lm: MeteredLM,
    rows: Sequence[TrainingRow | Mapping[str, Any]],
    *,
    directory: Path,
    served_with: str,
    settings: LoraSettings | None = None,
    held_out: Sequence[TrainingRow | Mapping[str, Any]] = (),
) -> LoraAdapter:
    """Train an adapter of the base of `lm`, whether it runs here or on a vLLM server. See `LoraTrainer.train`.

    Without settings those that suit the model are taken. `lm.copy(model=adapter.model)` answers with it.
    """
    engine = _trainable(lm)
    own = {} if settings else suited(_weights_of(engine).directory, n_rows=len(rows))
    return _train(
        engine,
        LoraTrainer(_weights_of(engine), directory=directory),
        _rows(rows),
        settings=settings or LoraSettings().replaced(own),
        held_out=_rows(held_out),
        served_with=served_with,
    )


def _train(
    engine: TrainableEngine,
    trainer: LoraTrainer,
    rows: Sequence[TrainingRow],
    *,
    settings: LoraSettings,
    held_out: Sequence[TrainingRow],
    served_with: str,
) -> LoraAdapter:
    """`trainer.train`; a server is asked before whether it will take the adapter, and made to serve it afterwards.

    With an adapter that is there already the server is left alone: all answers may be known, and if one is not, it is
    loaded then.
    """
    if isinstance(engine, _SERVED) and rows:
        recipe = trainer.recipe(rows, settings=settings, held_out=held_out, served_with=served_with)
        if not is_finished(trainer.directory, recipe):
            engine.check_training()
    adapter = trainer.train(rows, settings=settings, held_out=held_out, served_with=served_with)
    if adapter.trained_now:
        engine.add_lora(adapter.directory)
    return adapter


def _rows(rows: Sequence[TrainingRow | Mapping[str, Any]]) -> list[TrainingRow]:
    return [row if isinstance(row, TrainingRow) else TrainingRow.from_chat(row) for row in rows]


def _weights_of(engine: TrainableEngine) -> TransformersEngine:
    return engine.weights if isinstance(engine, _SERVED) else engine


def _trainable(lm: MeteredLM) -> TrainableEngine:
    from copa_harness.lm.local.engine import TransformersEngine

    engine = lm.engine
    if not (isinstance(engine, (TransformersEngine, *_SERVED)) and engine.takes_lora):
        raise ConfigurationError(
            f"got the LM {lm.model!r}, whose engine is {type(engine).__name__}; expected a local one (embedded or "
            "hf:...), or a vLLM server's with base weights, the only kinds whose weights can be trained here"
        )
    return engine
