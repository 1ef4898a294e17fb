"""The session's language models, by name, behind one door and over one cache on disk.

A model is made when it is first asked for; making one loads no weights. Knows nothing of tasks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from copa_harness.errors import CacheError, ConfigurationError
from copa_harness.session.settings import Settings

if TYPE_CHECKING:
    import dspy

    from copa_harness.lm.metered import MeteredLM


class Models:
    """Models by name.

    Args:
        settings: Where the cache lies, and the endpoint if there is one.

    Raises:
        ConfigurationError: The cache directory cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        from copa_harness.lm.cache import ResponseCache
        from copa_harness.lm.door import Door

        self._settings = settings
        directory = settings.cache_dir
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._cache = ResponseCache(directory / "responses")
        except (OSError, CacheError) as error:
            raise ConfigurationError(
                f"the cache directory {directory} cannot be used ({error}); make it writable, or name another one "
                f"with --copa-cache-dir."
            ) from error
        self.door = Door(cache=self._cache)
        self._models: dict[str, MeteredLM] = {}

    def named(self, name: str) -> MeteredLM:
        """The model of this name; DSPy can fine-tune it if it is a local one.

        Raises:
            ConfigurationError: There is no such model; the message names the choices.
        """
        if name not in self._models:
            from copa_harness.lm.build import build_lm

            is_local = name == "embedded" or name.startswith("hf:")
            self._models[name] = build_lm(
                name,
                door=self.door,
                cache_dir=self._settings.cache_dir,
                api_base=None if is_local else self._settings.api_base,
            )
        return self._models[name]

    def metered(self, lm: dspy.LM) -> MeteredLM:
        """A model somebody made (a fixture of the user's), led through the door unless it has one of its own.

        Raises:
            ConfigurationError: It is no language model, or one whose calls cannot be metered.
        """
        from copa_harness.lm.build import meter_lm

        if not (hasattr(lm, "model") and hasattr(lm, "kwargs")):
            raise ConfigurationError(
                f"got {lm!r} as a language model; expected a dspy.LM or one made by copa_harness.build_lm(...)."
            )
        return meter_lm(lm, door=self.door)

    def close(self) -> None:
        """Closes the cache."""
        self._cache.close()
