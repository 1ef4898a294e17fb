"""Models served by vLLM whose weights can be tuned: answers come from the server, training from a copy of its weights.

A tuned model is `<base>@<digits>`, the digits being the fingerprint of base weights and LoRA adapter; under that name
the server serves it and under that fingerprint its answers are cached, so an adapter trained anew is another model
wherever its file lies. The adapter is loaded when the first answer is missing, again when the server has forgotten it
(a restart), and not at all when every answer is known.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copa_harness.errors import ConfigurationError, ProviderError
from copa_harness.lm.endpoint.vllm_server import ServedModel, VllmServer
from copa_harness.lm.engine import Engine
from copa_harness.lm.local.files import base_fingerprint, find_lora, split_model_name
from copa_harness.lm.local.sources.source import ModelSource

if TYPE_CHECKING:
    from dspy.lm15 import Request, Response

    from copa_harness.lm.budget.cost import Limits
    from copa_harness.lm.endpoint.engine import EndpointEngine
    from copa_harness.lm.engine import Capabilities
    from copa_harness.lm.local.engine import TransformersEngine


class VllmEngine(Engine):
    """An endpoint engine in front of a vLLM server, and the LoRA adapters it is made to serve.

    Args:
        endpoint: Sends the requests.
        server: The same server, for loading adapters.
        weights: A copy of the served weights, named like the served model: fingerprints and trains adapters. It is not
            loaded to answer.
        source: The folder or Hugging Face id that was given for `weights`.
        served_lora_path: Where the server sees the folder `weights.lora_dir`; None when it sees it where it is.
    """

    is_endpoint = True
    takes_lora = True

    def __init__(
        self,
        endpoint: EndpointEngine,
        *,
        server: VllmServer,
        weights: TransformersEngine,
        source: str,
        served_lora_path: str | None = None,
    ) -> None:
        self.name = endpoint.name
        self.retry_policy, self.concurrency = endpoint.retry_policy, endpoint.concurrency
        self.weights = weights
        self.server = server
        self._endpoint = endpoint
        self._source = source
        self._served_lora_path = served_lora_path
        self._lock = threading.Lock()
        self._loaded: set[str] = set()
        self._directories: dict[str, Path] = {}

    # -- an endpoint engine

    def limits(self, model: str) -> Limits:
        """As of the base model: an adapter changes neither price nor length."""
        return self._endpoint.limits(split_model_name(model)[0])

    def capabilities(self, model: str) -> Capabilities:
        """As of the base model."""
        return self._endpoint.capabilities(split_model_name(model)[0])

    def connection(self, model: str) -> dict[str, Any]:
        """See `EndpointEngine.connection`."""
        return self._endpoint.connection(model)

    def fingerprint(self, model: str) -> str:
        """The endpoint's fingerprint; for a tuned model also that of the adapter's files as they are now.

        Raises:
            ConfigurationError, ArtifactError: As `TransformersEngine.fingerprint`.
        """
        served = self._endpoint.fingerprint(model)
        if model == self.weights.name:
            return served
        material = f"{served} {self.weights.fingerprint(model)}"
        return "endpoint+lora:" + hashlib.sha256(material.encode()).hexdigest()

    @property
    def weights_fingerprint(self) -> str:
        """Names the weights that adapters are trained on."""
        return self.weights.fingerprint(self.weights.name)

    def complete(self, request: Request, *, seed: int) -> Response:
        """One attempt at one completion."""
        return self.complete_priced(request, seed=seed)[0]

    def complete_priced(self, request: Request, *, seed: int) -> tuple[Response, float | None]:
        """The completion and its price; the adapter is loaded before, if the server does not have it.

        Raises:
            ConfigurationError: The server does not take the adapter.
            ProviderError: It gave no answer.
        """
        if request.model == self.weights.name:
            return self._endpoint.complete_priced(request, seed=seed)
        self._ensure_loaded(request.model)
        try:
            return self._endpoint.complete_priced(request, seed=seed)
        except ProviderError as error:
            if getattr(error, "status", None) != 404:
                raise
        self.forget(request.model)  # the server was started anew, or somebody unloaded the adapter
        self._ensure_loaded(request.model)
        return self._endpoint.complete_priced(request, seed=seed)

    # -- LoRA adapters

    @property
    def lora_dir(self) -> Path:
        """Where trained adapters lie."""
        return self.weights.lora_dir

    def check_training(self) -> None:
        """Make sure, before anything is trained, that the server would serve the result.

        Raises:
            ConfigurationError: It would not: another model, other weights, or loading is switched off.
            ProviderError: It cannot be reached.
        """
        self._check_base(self.server.models())
        self.server.check_loading()

    def add_lora(self, directory: Path) -> str:
        """Have the server serve a trained adapter; returns the tuned model's name.

        Raises:
            ArtifactError: The adapter is damaged, or was trained for other weights.
            ConfigurationError, ProviderError: The server does not take it.
        """
        model = self.weights.add_lora(directory)
        self._directories[model] = directory
        self._ensure_loaded(model)
        return model

    def forget(self, model: str) -> None:
        """Load the adapter anew before the next answer of this model that is not known."""
        with self._lock:
            self._loaded.discard(model)

    def unload(self, model: str) -> None:
        """Take a tuned model's adapter off the server; it comes back when it is needed."""
        if split_model_name(model)[1] is not None:
            self.server.unload(_served_name(model))
            self.forget(model)

    def _ensure_loaded(self, model: str) -> None:
        with self._lock:  # the others wait for the one that loads
            if model in self._loaded:
                return
            self._load(model)
            self._loaded.add(model)

    def _load(self, model: str) -> None:
        name = _served_name(model)
        served = self.server.models()
        self._check_base(served)
        path = self._served_path(self._directory(model))
        if name in served:
            return
        for other in served.values():
            # Trained anew at the same place: the server may read the old name's weights from there again.
            if other.root == path and other.parent and split_model_name(other.name)[1] is not None:
                self.server.unload(other.name)
        self.server.load(name, path)
        if name not in self.server.models():
            raise ConfigurationError(
                f"loaded the LoRA adapter {path} into {self.server.url} as {name!r}, but the server does not list it; "
                "expected one server behind the URL, not several that know nothing of each other's adapters; remedy: "
                "one vLLM process (--api-server-count=1), or the URL of one of them"
            )

    def _directory(self, model: str) -> Path:
        digits = split_model_name(model)[1]
        found = self._directories.get(model) or (None if digits is None else find_lora(self.lora_dir, digits))
        if found is None:
            raise ConfigurationError(
                f"got {model!r}, whose LoRA adapter does not lie under {self.lora_dir}; remedy: train it again (the "
                "same rows and settings give the same adapter)"
            )
        return found

    def _served_path(self, directory: Path) -> str:
        if self._served_lora_path is None:
            return str(directory.absolute())
        return f"{self._served_lora_path.rstrip('/')}/{directory.name}"

    def _check_base(self, served: dict[str, ServedModel]) -> None:
        name = _served_name(self.weights.name)
        base = served.get(name)
        if base is None:
            names = ", ".join(sorted(one.name for one in served.values() if not one.parent)) or "no model"
            raise ConfigurationError(
                f"got the model {name!r}, but {self.server.url} serves {names}; expected one of these behind "
                f"{self.weights.name.partition('/')[0]!r}/ (vLLM's --served-model-name gives it another name)"
            )
        if base.parent:
            raise ConfigurationError(
                f"got the model {name!r}, a LoRA adapter of {base.parent!r} on {self.server.url}; expected the base "
                "model: an adapter is never trained on top of another"
            )
        self._check_weights(base)

    def _check_weights(self, base: ServedModel) -> None:
        """The served weights must be the ones trained on, as far as that can be seen from here."""
        given, root = self._source, base.root
        if not root or root == given:
            return
        folder = Path(root)
        if folder.is_absolute():
            if not (folder / "config.json").is_file():
                return  # on another machine
            same = folder.resolve() == self.weights.directory.resolve() or base_fingerprint(
                ModelSource(folder, brings_template=True).directory(), dtype=self.weights.dtype
            ) == base_fingerprint(self.weights.directory, dtype=self.weights.dtype)
        elif Path(given).is_dir():
            return  # an id there, a folder here: nobody can compare them
        else:
            same = root.lower() == given.lower()
        if not same:
            raise ConfigurationError(
                f"got the base weights hf:{given} for {base.name!r}, which {self.server.url} runs from {root}; "
                "expected the very weights the server runs, or the adapter would be trained for another model; remedy: "
                f"--copa-base-weights=hf:{root}"
            )


def vllm_engine(
    endpoint: EndpointEngine,
    *,
    weights: TransformersEngine,
    source: str,
    clients: Mapping[str, Any],
    served_lora_path: str | None = None,
) -> VllmEngine:
    """The engine of a served model whose weights can be tuned.

    Args:
        endpoint: Sends its requests.
        weights: See `VllmEngine`; named `hosted_vllm/<served name>`.
        source: See `VllmEngine`.
        clients: Client settings of the LM (`api_base`, `api_key`).
        served_lora_path: See `VllmEngine`.

    Raises:
        ConfigurationError: Nobody says where the server is.
    """
    prefix = weights.name.partition("/")[0].upper()
    places = (f"{prefix}_API_BASE", f"{prefix}_BASE_URL")
    url = clients.get("api_base") or clients.get("base_url") or next(filter(None, map(os.environ.get, places)), None)
    if not url:
        raise ConfigurationError(
            f"got base weights for {weights.name!r} and no URL; expected the vLLM server that runs it, e.g. "
            f"--copa-api-base=http://localhost:8000/v1 (or {places[0]})"
        )
    key = clients.get("api_key") or os.environ.get(f"{prefix}_API_KEY")
    return VllmEngine(
        endpoint,
        server=VllmServer(str(url), api_key=None if key is None else str(key)),
        weights=weights,
        source=source,
        served_lora_path=served_lora_path,
    )


def _served_name(model: str) -> str:
    """The name the server knows: without DSPy's provider."""
    return model.partition("/")[2] or model
