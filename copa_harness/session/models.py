"""The session's language models, by name, behind one gateway and over one cache on disk.

A model is made when it is first asked for; making one loads no weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from copa_harness.errors import CacheError, ConfigurationError
from copa_harness.lm.local.sources.names import is_local_name
from copa_harness.report.mlflow_tracking import is_installed
from copa_harness.session.options import Settings

if TYPE_CHECKING:
    import dspy

    from copa_harness.lm.gateway import Gateway
    from copa_harness.lm.metered import MeteredLM
    from copa_harness.shared.answers import SharedAnswers
    from copa_harness.shared.database import SharedDatabase


class Models:
    """Models by name.

    Args:
        settings: Where the cache lies, and the endpoint if there is one.
        database: Where several machines keep their answers, if they do.

    Raises:
        ConfigurationError: The cache directory cannot be used.
    """

    def __init__(self, settings: Settings, *, database: SharedDatabase | None = None) -> None:
        from copa_harness.lm.cache.store import ResponseCache
        from copa_harness.lm.gateway import Gateway

        self._settings = settings
        directory = settings.cache_dir
        try:
            directory.mkdir(parents=True, exist_ok=True)
            local = ResponseCache(directory / "responses")
        except CacheError as error:  # names the folder and the ways out
            raise ConfigurationError(f"the cache directory {directory} cannot be used: {error}") from error
        except OSError as error:
            raise ConfigurationError(
                f"the cache directory {directory} cannot be used ({error}); make it writable, or name another one "
                f"with --copa-cache-dir."
            ) from error
        self._cache: ResponseCache | SharedAnswers = local
        if database is not None:
            from copa_harness.shared.answers import SharedAnswers

            self._cache = SharedAnswers(database, local=local)
        self.gateway = Gateway(cache=self._cache)
        self._models: dict[tuple[str, bool, bool, int | None], MeteredLM] = {}

    def named(
        self, name: str, *, is_base: bool = False, constrain: bool = False, answer_tokens: int | None = None
    ) -> MeteredLM:
        """The model of this name; DSPy can fine-tune it if its weights are at hand.

        The endpoint's URL goes to models of the base model's provider (to all, if the base model is local): a proposer
        of another provider must not be sent there, nor its API key.

        Args:
            name: As in `--copa-lm`.
            is_base: Whether it is the model to be improved, whose weights the settings may name.
            constrain: Output fields with a list of allowed values get the likeliest of them.
            answer_tokens: Ceiling of its answers, see `Settings.answer_tokens`; of the base model only. What a model
                writes for the search, an instruction for instance, has none of ours.

        Raises:
            ConfigurationError: There is no such model; the message names the choices. Or it cannot be constrained.
        """
        answer_tokens = answer_tokens if is_base else 0
        key = (name, is_base and self._settings.base_weights is not None, constrain, answer_tokens)
        if key not in self._models:
            settings = replace(self._settings, answer_tokens=answer_tokens)
            built = _build(name, settings, gateway=self.gateway, is_base=is_base, constrain=constrain)
            # One engine for all of them: weights, connections and what a provider bears are its own.
            twin = next((lm for known, lm in self._models.items() if known[:2] == key[:2]), None)
            self._models[key] = built if twin is None else built.copy(engine=twin.engine)
        return self._models[key]

    def served(self, *, at_endpoints: bool) -> list[str]:
        """One line on each local model whose weights were loaded in this process, or on each that replicas answered."""
        engines = (lm.engine for lm in self._models.values() if lm.engine.is_endpoint == at_endpoints)
        descriptions = (engine.description for engine in engines)
        return list(dict.fromkeys(line for line in descriptions if line))

    def metered(self, lm: dspy.LM, *, constrain: bool = False, answer_tokens: int | None = None) -> MeteredLM:
        """A model somebody made (a fixture of the user's), led through the gateway unless it has one of its own.

        Args:
            lm: The model.
            constrain: As in `named`; a model that does not constrain its answers is copied.
            answer_tokens: As in `named`; None leaves a model that is metered already as it is.

        Raises:
            ConfigurationError: It is no language model, or one whose calls cannot be metered.
        """
        from copa_harness.lm.constrained import checked_constrain
        from copa_harness.lm.factory import answer_ceiling_of, meter_lm

        if not (hasattr(lm, "model") and hasattr(lm, "kwargs")):
            raise ConfigurationError(
                f"got {lm!r} as a language model; expected a dspy.LM or one made by copa_harness.build_lm(...)."
            )
        metered = meter_lm(lm, gateway=self.gateway, answer_tokens=answer_tokens)
        ceiling = answer_ceiling_of(answer_tokens)
        if answer_tokens is not None and metered.answer_tokens != ceiling:
            metered = metered.copy()
            metered.answer_tokens = ceiling
        if constrain and not metered.constrain:
            metered = metered.copy()
            metered.constrain = checked_constrain(True, metered.engine, model=metered.model)
        return metered

    def close(self) -> None:
        """Closes the cache."""
        self._cache.close()


def check_names(settings: Settings) -> None:
    """Make the models that the settings force on every test, to see that they can be made; nothing is written.

    Raises:
        ConfigurationError: One cannot; the message names the choices.
    """
    from copa_harness.lm.gateway import Gateway

    if settings.mlflow is not None and not is_installed():
        raise ConfigurationError(
            f"got --copa-mlflow={settings.mlflow}, and MLflow is not there; remedy: pip install 'copa-harness[mlflow]'"
        )
    for option, name in (("lm", settings.lm), ("prompt_lm", settings.prompt_lm)):
        if option in settings.forced and name is not None:
            is_base = option == "lm"
            _build(
                name, settings, gateway=Gateway(cache=None), is_base=is_base, constrain=is_base and settings.constrain
            )


def _build(name: str, settings: Settings, *, gateway: Gateway, is_base: bool, constrain: bool) -> MeteredLM:
    from copa_harness.lm.factory import build_lm

    weights = settings.base_weights if is_base else None
    of_local_models: dict[str, Any] = (
        {
            "device": settings.device,
            "dtype": settings.dtype,
            "chat_template": settings.chat_template,
            "ray": settings.ray,
        }
        if is_local_name(name)
        else {}
    )
    if settings.allow_pickled_weights and (weights is not None or is_local_name(name)):
        of_local_models["allow_pickled_weights"] = True
    lm = build_lm(
        name,
        gateway=gateway,
        cache_dir=settings.cache_dir,
        api_base=settings.api_base if _is_at_the_endpoint(name, settings) else None,
        base_weights=weights,
        worker=settings.worker,
        served_lora_path=None if weights is None else settings.served_lora_path,
        constrain=constrain,
        answer_tokens=settings.answer_tokens,
        **of_local_models,
    )
    if weights is None:
        return lm
    from copa_harness.tune.dspy_provider import attach_provider

    return attach_provider(lm)


def _is_at_the_endpoint(name: str, settings: Settings) -> bool:
    if is_local_name(name):
        return False
    return is_local_name(settings.lm) or name.split("/")[0] == settings.lm.split("/")[0]
