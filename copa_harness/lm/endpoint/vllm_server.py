"""A running vLLM server seen as a shelf of models: what it serves, and LoRA adapters put there and taken away.

Three routes beside the ones that answer: `GET /v1/models`, `POST /v1/load_lora_adapter {"lora_name", "lora_path"}` and
`POST /v1/unload_lora_adapter {"lora_name"}`; the last two exist only if the server was started with `--enable-lora` and
`VLLM_ALLOW_RUNTIME_LORA_UPDATING=True` (https://docs.vllm.ai/en/latest/features/lora/, "Dynamically serving LoRA
Adapters"; the errors are those of `vllm/entrypoints/openai/serving_models.py`). The server reads an adapter from a path
that *it* must see. Every refusal becomes one error that says what to set.
"""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from copa_harness.credentials import MASK, mask_text
from copa_harness.errors import (
    AuthenticationError,
    ConfigurationError,
    ConnectionFailedError,
    ProviderError,
    ProviderTimeoutError,
    ServerFailureError,
)
from copa_harness.lm.endpoint.engine import public_url

LOAD_TIMEOUT_S = 120.0
"""Longest wait for an adapter to be loaded."""

LIST_TIMEOUT_S = 20.0
"""Longest wait for the list of models."""

LARGEST_REPLY = 2**22
"""Bytes of a reply that are read."""

_START = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve <model> --enable-lora"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model in the server's list.

    Attributes:
        name: What requests call it.
        root: The model's id or path, or the LoRA adapter's path, as the server knows it; empty when it does not say.
        parent: Name of the base model of a LoRA adapter; empty for a base model.
    """

    name: str
    root: str = ""
    parent: str = ""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A credential must not travel to wherever a server points."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


class VllmServer:
    """The shelf of one server.

    Args:
        url: The server's OpenAI base, e.g. `http://gpu:8000/v1`.
        api_key: Sent as bearer token, if the server wants one; a user and password in the URL go in its place.
    """

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        user, _, host = parts.netloc.rpartition("@")
        self._url = urlunsplit(parts._replace(netloc=host)).rstrip("/")
        self._api_key = api_key
        self._authorization = f"Bearer {api_key}" if api_key else None
        if user:  # as where answers are asked for
            self._authorization = "Basic " + base64.b64encode(unquote(user).encode()).decode()
        self._opener = urllib.request.build_opener(_NoRedirects())

    @property
    def url(self) -> str:
        """The base URL, free of credentials."""
        return public_url(self._url)

    def models(self) -> dict[str, ServedModel]:
        """What the server serves, by name.

        Raises:
            ConfigurationError: Whatever answers there is no such server.
            ProviderError: The server cannot be reached, or does not accept the key.
        """
        status, text = self._ask("GET", "models", timeout_s=LIST_TIMEOUT_S)
        try:
            if status != 200:
                raise ValueError(f"HTTP {status}")
            listed = [
                ServedModel(str(card["id"]), root=str(card.get("root") or ""), parent=str(card.get("parent") or ""))
                for card in json.loads(text)["data"]
            ]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigurationError(
                f"got no list of models from {self.url}/models ({error}: {text[:200]!r}); expected an OpenAI-"
                "compatible server such as vLLM, and an API base that ends like http://localhost:8000/v1"
            ) from None
        return {model.name: model for model in listed}

    def check_loading(self) -> None:
        """Make sure that adapters can be loaded, without loading one: before hours are spent on training.

        Raises:
            ConfigurationError: They cannot; the message says what to start the server with.
            ProviderError: As `models`.
        """
        status, text = self._ask("POST", "load_lora_adapter", {"lora_name": "", "lora_path": ""})
        if status in (403, 404, 405) or "lora is not enabled" in text.lower():
            raise self._closed(status, text)

    def load(self, name: str, path: str) -> None:
        """Load an adapter; one that is loaded under this name already is left alone.

        Args:
            name: What requests will call it.
            path: Its folder, as the server sees it.

        Raises:
            ConfigurationError: The server refuses; the message says what to change.
            ProviderError: As `models`; also a failure of the server itself.
        """
        status, text = self._ask("POST", "load_lora_adapter", {"lora_name": name, "lora_path": path})
        said = text.lower()
        if 200 <= status < 300 or (status == 400 and "already been loaded" in said):
            return
        got = f"got HTTP {status} from {self.url}/load_lora_adapter for the LoRA adapter {path}: {_message(text)!r}"
        kept = "the training is kept, so run again and only the loading is repeated"
        if "max_lora_rank" in said or "max-lora-rank" in said:
            raise ConfigurationError(
                f"{got}; expected a rank within the server's --max-lora-rank; remedy: start it with a larger one "
                f"({kept}), or train with a smaller LoraSettings(rank=...)"
            )
        if "lora is not enabled" in said:
            raise self._closed(status, text)
        if any(words in said for words in ("no adapter found", "no such file", "does not exist", "not a local folder")):
            raise ConfigurationError(
                f"{got}; expected a folder that the server sees; remedy: share the folder with the machine of the "
                f"server and say under which path it sees it, --copa-served-lora-path=<path> ({kept})"
            )
        if status in (403, 404, 405):
            raise self._closed(status, text)
        if status >= 500 and not any(word in said for word in ("size mismatch", "target module", "shape")):
            raise ServerFailureError(f"{got}; remedy: read the server's log ({kept})")
        raise ConfigurationError(
            f"{got}; expected an adapter of the model the server runs; remedy: let --copa-base-weights name the very "
            "weights it was started with, and its log say what it missed"
        )

    def unload(self, name: str) -> None:
        """Take an adapter away; one that is not there is no error.

        Raises:
            ProviderError: As `models`.
        """
        self._ask("POST", "unload_lora_adapter", {"lora_name": name})

    def _closed(self, status: int, text: str) -> ConfigurationError:
        return ConfigurationError(
            f"got HTTP {status} from {self.url}/load_lora_adapter: {_message(text)!r}; expected a vLLM server that "
            f"loads LoRA adapters while it runs; remedy: start it with `{_START}`"
        )

    def _ask(
        self, method: str, route: str, body: dict[str, str] | None = None, *, timeout_s: float = LOAD_TIMEOUT_S
    ) -> tuple[int, str]:
        """Status and text of the reply, whatever the status; the text is free of the key."""
        request = urllib.request.Request(
            f"{self._url}/{route}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        if self._authorization:
            request.add_unredirected_header("Authorization", self._authorization)
        try:
            with self._opener.open(request, timeout=timeout_s) as reply:
                status, content = int(reply.status), reply.read(LARGEST_REPLY)
        except urllib.error.HTTPError as error:
            with error:
                status, content = error.code, error.read(LARGEST_REPLY)
        except (OSError, ValueError) as error:  # URLError, timeouts and broken connections are OSErrors
            raise self._unreachable(error, route, timeout_s) from None
        text = self._masked(content.decode("utf-8", "replace"))
        if status == 401:
            raise AuthenticationError(
                f"got HTTP 401 from {self.url}/{route}: {_message(text)!r}; expected an API key that the server "
                "accepts; remedy: set HOSTED_VLLM_API_KEY to what it was started with (--api-key, VLLM_API_KEY)"
            )
        return status, text

    def _unreachable(self, error: Exception, route: str, timeout_s: float) -> ProviderError:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            return ProviderTimeoutError(
                f"got no reply from {self.url}/{route} within {timeout_s:g} s; remedy: look at the server's log"
            )
        return ConnectionFailedError(
            f"got no connection to {self.url} ({self._masked(str(reason))}); expected a running vLLM server; remedy: "
            f"start it with `{_START}`, or correct --copa-api-base"
        )

    def _masked(self, text: str) -> str:
        return mask_text(text.replace(self._api_key, MASK) if self._api_key else text)


def _message(text: str) -> str:
    """What a reply says: the message of vLLM's or FastAPI's error, else the reply itself, shortened."""
    try:
        document = json.loads(text)
        error = document.get("error", document)
        said = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    except (ValueError, AttributeError, RecursionError):
        said = None
    return str(said or text)[:500]
