"""A scripted language model: the public test double.

A `ScriptedLM` is a real `MeteredLM` over an engine that answers from a script, so cache, budget, meter, `n` and copies
act as they do with a real model, in microseconds. It records what it was asked.

    lm = ScriptedLM(lambda messages: {"answer": "7"})
    with dspy.context(lm=lm):
        dspy.Predict("question -> answer")(question="3 + 4")
    assert lm.calls == 1
"""

from __future__ import annotations

import hashlib
import inspect
import json
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspy.lm15 import Message, Request, Response, TextPart, Usage

from copa_harness.errors import ConfigurationError, ProviderError
from copa_harness.lm.engine import Engine
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.metered import MeteredLM

Answer = str | Mapping[str, Any] | BaseException
"""Text sent as it is, a dict of output fields rendered as DSPy's ChatAdapter expects them, or an error to raise."""

Answers = str | Sequence[Answer] | Mapping[str, Answer] | Callable[..., Answer]


@dataclass(frozen=True, slots=True)
class ScriptedRequest:
    """One request that reached the script (a cached answer never does).

    Attributes:
        model: The model's name.
        messages: What was sent, system message first, as `{"role": ..., "content": ...}`.
        seed: 0, or the number that tells this repeat (rollout, n-th candidate) apart.
        request: The canonical request.
    """

    model: str
    messages: tuple[dict[str, str], ...]
    seed: int
    request: Request

    @property
    def prompt(self) -> str:
        """Text of the last message."""
        return self.messages[-1]["content"]


def chat_fields(fields: Mapping[str, Any]) -> str:
    """Output fields as text in the form DSPy's ChatAdapter parses. Values that are not text become JSON."""
    blocks = [
        f"[[ ## {name} ## ]]\n{value if isinstance(value, str) else json.dumps(value, default=str)}"
        for name, value in fields.items()
    ]
    return "\n\n".join([*blocks, "[[ ## completed ## ]]\n"])


class ScriptedEngine(Engine):
    """Answers from a script; see `ScriptedLM` for its arguments."""

    name = "scripted"

    def __init__(self, answers: Answers, *, fingerprint: str | Callable[[str], str] | None = None) -> None:
        self.requests: list[ScriptedRequest] = []
        self._answers = answers
        self._lock = threading.Lock()
        self._n_asked = 0
        self._fingerprint = _fingerprint_of(answers) if fingerprint is None else fingerprint
        self._extras: tuple[str, ...] = ()
        if callable(answers):
            names = inspect.signature(answers).parameters
            self._extras = tuple(name for name in ("seed", "model") if name in names)
        elif not isinstance(answers, (str, Mapping, Sequence)):
            raise ConfigurationError(
                f"got answers of type {type(answers).__name__}, expected a list, a dict from a piece of the prompt to "
                "its answer, a callable(messages), or one text for every request"
            )

    def fingerprint(self, model: str) -> str:
        """The fingerprint given, or one made of the script."""
        return self._fingerprint(model) if callable(self._fingerprint) else self._fingerprint

    def complete(self, request: Request, *, seed: int) -> Response:
        """The script's next answer."""
        messages = _plain_messages(request)
        with self._lock:
            index, self._n_asked = self._n_asked, self._n_asked + 1
            self.requests.append(ScriptedRequest(request.model, messages, seed, request))
        answer = self._answer(messages, index, seed=seed, model=request.model)
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, Mapping):
            answer = chat_fields(answer)
        if not isinstance(answer, str):
            raise ConfigurationError(
                f"a scripted answer is a {type(answer).__name__}, expected text, a dict of output fields or an error"
            )
        usage = Usage(
            input_tokens=sum(len(message["content"].split()) for message in messages),
            output_tokens=len(answer.split()),
        )
        return Response(
            id=None,
            model=request.model,
            message=Message.assistant(TextPart(answer)),
            finish_reason="stop",
            usage=usage,
        )

    def _answer(self, messages: tuple[dict[str, str], ...], index: int, *, seed: int, model: str) -> Any:
        answers = self._answers
        if isinstance(answers, str):
            return answers
        if isinstance(answers, Mapping):
            prompt = messages[-1]["content"]
            for piece, answer in answers.items():
                if piece in prompt:
                    return answer
            raise ProviderError(
                f"the script has no answer for this prompt; it knows prompts that contain one of {list(answers)}, "
                f"got: {prompt}"
            )
        if isinstance(answers, Sequence):
            if index >= len(answers):
                raise ProviderError(f"the script has {len(answers)} answers and was asked for number {index + 1}")
            return answers[index]
        extras = {"seed": seed, "model": model}
        return answers([dict(message) for message in messages], **{name: extras[name] for name in self._extras})


class ScriptedLM(MeteredLM):
    """A language model that answers from a script, for tests.

    Args:
        answers: One of

            * a list: the answers to the requests that reach the script, in order (under several threads that order
              is the order of arrival); one more request than answers is a `ProviderError`;
            * a dict: the answer of the first key contained in the last message;
            * a callable: called with the messages (`[{"role": ..., "content": ...}, ...]`), and with `seed=` and
              `model=` if it has parameters of these names;
            * a text: the answer to everything.

            Each answer is text, a dict of output fields, or an exception to raise.
        model: The model's name.
        fingerprint: Stands for the weights: LMs with different fingerprints never share answers. By default it is made
            of the texts and fields of a list, dict or text, and is unique to this object for a callable; pass one to
            share answers with a later instance on the same disk cache. A callable gets the model's name, so that
            copies under another name can have other weights.
        gateway: Cache and meter; by default an own one in memory.
        provider: DSPy fine-tuning provider, to test what fine-tunes.
        temperature: As in `MeteredLM`.
        max_tokens: As in `MeteredLM`.
        **kwargs: Further defaults of every call.
    """

    def __init__(
        self,
        answers: Answers,
        *,
        model: str = "scripted/model",
        fingerprint: str | Callable[[str], str] | None = None,
        gateway: Gateway | None = None,
        provider: Any = None,
        temperature: float | None = 0.0,
        max_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model,
            engine=ScriptedEngine(answers, fingerprint=fingerprint),
            gateway=Gateway(cache=None) if gateway is None else gateway,
            provider=provider,
            temperature=temperature,
            max_tokens=max_tokens,
            **kwargs,
        )

    @property
    def requests(self) -> list[ScriptedRequest]:
        """Requests that reached the script, in order of arrival, those of all copies together."""
        engine = self.engine
        assert isinstance(engine, ScriptedEngine)
        return engine.requests

    @property
    def calls(self) -> int:
        """How many requests reached the script."""
        return len(self.requests)


def _fingerprint_of(answers: Answers) -> str:
    if callable(answers):
        return f"scripted:{uuid.uuid4().hex}"
    return "scripted:" + hashlib.sha256(json.dumps(answers, default=repr).encode()).hexdigest()


def _plain_messages(request: Request) -> tuple[dict[str, str], ...]:
    messages = []
    if request.system is not None:
        system = request.system
        text = system if isinstance(system, str) else "".join(getattr(part, "text", "") for part in system)
        messages.append({"role": "system", "content": text})
    messages.extend({"role": message.role, "content": message.text or ""} for message in request.messages)
    return tuple(messages)
