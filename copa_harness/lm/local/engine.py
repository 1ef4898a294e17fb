"""`TransformersEngine`: answers requests with a Hugging Face causal language model in this process.

Concurrent requests are generated together, behind one copy of the prefix they share. Exact in float32: every answer is
the one a plain `generate` of that request alone gives, whoever else asked at the time. Greedy at temperature 0 or None;
no setting of the folder's generation_config is used except its end tokens.

`rules_of` turns a DSPy request into decoding rules, `response_of` what was generated into a DSPy response.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copa_harness.errors import (
    ArtifactError,
    ConfigurationError,
    ContextOverflowError,
    ProviderError,
    ProviderTimeoutError,
)
from copa_harness.lm.budget.cost import Limits
from copa_harness.lm.call_context import ceiling_gives_way, time_left_s
from copa_harness.lm.engine import Engine
from copa_harness.lm.local.chat_template import ChatTemplate, PromptTokens, request_messages
from copa_harness.lm.local.decoding import DecodingRules
from copa_harness.lm.local.devices import checked_device, checked_dtype, choose_device
from copa_harness.lm.local.files import (
    LoraFiles,
    base_fingerprint,
    find_lora,
    model_name,
    read_lora,
    split_model_name,
)
from copa_harness.lm.local.sources.source import ModelSource

if TYPE_CHECKING:
    from dspy.lm15 import Request, Response, TokenLogprob

    from copa_harness.lm.local.constrained import ConstrainedAnswer
    from copa_harness.lm.local.executor import Answer
    from copa_harness.lm.local.scheduler import BatchGenerator, Job

DEFAULT_MAX_TOKENS = 512
"""Most tokens of an answer when the request names no limit (less if the context has less room)."""


class TransformersEngine(Engine):
    """An engine over one local model and its LoRA adapters.

    Constructing it costs nothing; the weights are loaded at the first request, once per process and folder.

    Args:
        source: where the model is; a folder or a Hugging Face id is one, too.
        name: the base model's name in requests, `embedded`, `hf:<path or id>`, ...
        lora_dir: where trained LoRA adapters lie; names `<name>@<fingerprint>` are looked up there.
        device: `cpu`, `cuda`, `cuda:1`, ...; None takes a GPU if there is one.
        worker: this process's number among several that share the GPUs (see `devices`).
        dtype: `float32` (exact), `bfloat16` or `float16`; None is float32.
        chat_template: Jinja text that replaces the folder's chat template.
    """

    can_constrain = True
    takes_lora = True

    def __init__(
        self,
        source: ModelSource | Path | str,
        *,
        name: str,
        lora_dir: Path,
        device: str | None = None,
        worker: int | None = None,
        dtype: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.name = name
        self.lora_dir = Path(lora_dir)
        self.dtype = checked_dtype(dtype)
        source = source if isinstance(source, ModelSource) else ModelSource(source)
        self._source = replace(source, brings_template=source.brings_template or chat_template is not None)
        self._device, self._worker = checked_device(device), worker
        self._chat_template = chat_template
        self._lock = threading.RLock()
        self._directory: Path | None = None
        self._failure = ""
        self._lora_directories: dict[str, Path] = {}
        self._chat: ChatTemplate | None = None
        self._generator: BatchGenerator | None = None
        self._loaded = ""

    @property
    def directory(self) -> Path:
        """The model folder; what could not be had once is not asked for again."""
        with self._lock:
            if self._failure:
                raise ConfigurationError(self._failure)
            if self._directory is None or self._source.is_file:  # another file may lie there by now
                try:
                    self._directory = self._source.directory()
                except ConfigurationError as error:
                    self._failure = "" if self._source.is_file else str(error)
                    raise
            return self._directory

    @property
    def chat(self) -> ChatTemplate:
        """Tokenizer and chat template, loaded at the first use.

        Raises:
            ConfigurationError: no usable tokenizer, or no chat template.
        """
        with self._lock:
            if self._chat is None:
                from copa_harness.lm.local.tokenizer import read_tokenizer

                try:
                    tokenizer = read_tokenizer(self.directory)
                except (OSError, ValueError, KeyError) as error:
                    raise ConfigurationError(
                        f"could not load the tokenizer of {self.name} from {self.directory}: {error}; "
                        "expected a folder that AutoTokenizer loads without trust_remote_code"
                    ) from error
                self._chat = ChatTemplate(tokenizer, name=self.name, chat_template=self._chat_template)
            return self._chat

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer, or what stands for it (see `tokenizer`)."""
        return self.chat.tokenizer

    @property
    def model(self) -> Any:
        """The base model as loaded (frozen, evaluation mode), shared by the whole process: do not change it."""
        return self.generator.model.model

    @property
    def generator(self) -> BatchGenerator:
        """The process's one batch generator for this folder, device and dtype; loads the weights."""
        with self._lock:
            if self._generator is None:
                from copa_harness.lm.local.scheduler import load_generator

                device = choose_device(self._device, worker=self._worker)
                _ = self.chat  # a tokenizer that cannot be used is known before the weights are read
                self._generator = load_generator(
                    self.directory, device=device, dtype=self.dtype, fingerprint=self._base_fingerprint()
                )
            return self._generator

    @property
    def description(self) -> str | None:
        """One line on the model in memory: device, dtype, size, path, counters; None before its weights are loaded."""
        generator = self._generator
        return None if generator is None else f"{self.name}: {generator.describe()}"

    def limits(self, model: str) -> Limits:
        """Free; the longest answer is that of a request without `max_tokens`."""
        return Limits(max_output_tokens=DEFAULT_MAX_TOKENS)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Token ids that end an answer: the model's and the tokenizer's."""
        own = self.tokenizer.eos_token_id
        return self.generator.model.eos_ids | (frozenset() if own is None else frozenset({int(own)}))

    def fingerprint(self, model: str) -> str:
        """Hash of everything that shapes the answers of `model`, from its files alone (torch is not imported).

        Covers weights, tokenizer, chat template, configuration and dtype, and the LoRA adapter if the name has one.

        Raises:
            ConfigurationError: the name is not this engine's, or its LoRA adapter is nowhere to be found.
            ArtifactError: the LoRA adapter is damaged or was trained for other base weights.
        """
        lora = self._lora(model)
        return lora.fingerprint if lora else self._base_fingerprint()

    def add_lora(self, directory: Path) -> str:
        """Make a trained LoRA directory known to this engine; returns the fine-tuned model's name.

        Raises:
            ArtifactError: it is damaged, or was trained for other base weights.
        """
        files = self._checked(Path(directory))
        name = model_name(self.name, files.fingerprint)
        with self._lock:
            self._lora_directories[name] = files.directory
        return name

    def complete(self, request: Request, *, seed: int) -> Response:
        """Answer one request; callable from any number of threads at once.

        Args:
            request: text messages; `config` may set max_tokens, temperature, top_p, top_k, stop, seed and logprobs, and
                carry a constraint (see `constrained`).
            seed: of the sampling, joined with `request.config.seed` and the prompt; greedy requests ignore it.

        Raises:
            ContextOverflowError: prompt plus max_tokens do not fit the context.
            ProviderTimeoutError: the budget's time is up.
            OutOfMemoryError: the weights, or this prompt alone, do not fit.
            ProviderError: a request a local text model cannot take.
            ConfigurationError, ArtifactError: see `fingerprint`.
        """
        from copa_harness.lm.constrained import constraint_of

        self._follow_files()
        lora = self._lora(request.model)
        messages, fields = request_messages(request), constraint_of(request)
        generator, context = self.generator, self.generator.model.context_length
        if fields is not None:
            from copa_harness.lm.local.constrained import answer_constrained

            prompt = self.chat.prompt(messages)
            answer = answer_constrained(
                fields,
                prompt_text=self.chat.text(messages, answer_next=True),
                prompt=prompt,
                rules=rules_of(request, seed, prompt=prompt.ids, context=context),
                chat=self.chat,
                ask=lambda tokens, rules, choices: self._wait(self._submit(tokens, rules, lora, choices)),
            )
            return constrained_response(request, answer)
        with generator.arriving():
            tokens = self.chat.prompt(messages)
            rules = rules_of(request, seed, prompt=tokens.ids, context=context)
            job = self._submit(tokens, rules, lora)
        return response_of(request, self._wait(job), n_prompt=len(tokens.ids), chat=self.chat)

    def _submit(
        self,
        tokens: PromptTokens,
        rules: DecodingRules,
        lora: LoraFiles | None,
        choices: tuple[tuple[int, ...], ...] = (),
    ) -> Job:
        from copa_harness.lm.local.executor import Prompt

        n_answer = max((len(choice) for choice in choices), default=rules.max_tokens)
        check_room(len(tokens.ids) + n_answer, context=self.generator.model.context_length, name=self.name)
        return self.generator.submit(
            Prompt(
                tokens=tokens,
                rules=rules,
                lora=lora,
                chat=self.chat,
                eos_ids=self.eos_ids,
                choices=choices,
            )
        )

    def _wait(self, job: Job) -> Answer:
        left_s = time_left_s()
        try:
            return self.generator.wait(job, timeout_s=None if math.isinf(left_s) else max(0.0, left_s))
        except FutureTimeoutError as error:
            raise ProviderTimeoutError(
                f"{self.name} gave no answer in the {left_s:.1f} seconds the budget left; remedy: a larger budget of "
                "seconds, or fewer examples in flight"
            ) from error

    def _follow_files(self) -> None:
        """Forget what was loaded from files that have changed since: the fingerprint names the files as they are."""
        now = self._base_fingerprint()
        with self._lock:
            if self._loaded and self._loaded != now:
                self._chat = self._generator = None
            self._loaded = now

    def _base_fingerprint(self) -> str:
        return base_fingerprint(self.directory, dtype=self.dtype, chat_template=self._chat_template)

    def _lora(self, model: str) -> LoraFiles | None:
        """The LoRA files behind a model name, checked; None for the base model."""
        if model == self.name:
            return None
        base, digits = split_model_name(model)
        if base != self.name or digits is None:
            raise ConfigurationError(
                f"got the model name {model!r}; expected {self.name!r} or "
                f"'{self.name}@<first 12 digits of a LoRA fingerprint>'"
            )
        with self._lock:
            directory = self._lora_directories.get(model) or find_lora(self.lora_dir, digits)
            if directory is None:
                raise ConfigurationError(
                    f"got {model!r}, but no LoRA adapter with that fingerprint lies under {self.lora_dir}; remedy: "
                    "train it again (the same rows and settings give the same adapter) or register its folder with "
                    "add_lora()"
                )
            self._lora_directories[model] = directory
        files = self._checked(directory)
        if not files.fingerprint.startswith(digits):  # trained again at the same place: that one has another name
            with self._lock:
                self._lora_directories.pop(model, None)
            return self._lora(model)
        return files

    def _checked(self, directory: Path) -> LoraFiles:
        files = read_lora(directory)
        if files.base_fingerprint != self._base_fingerprint():
            raise ArtifactError(
                f"got the LoRA adapter {directory}, trained for a base with fingerprint {files.base_fingerprint[:12]}; "
                f"expected {self._base_fingerprint()[:12]} ({self.name}); remedy: use the base it was trained for, or "
                "train again"
            )
        return files


def rules_of(request: Request, seed: int, *, prompt: Sequence[int], context: int) -> DecodingRules:
    """How a request's answer is decoded.

    `seed` of the sampling is joined with the request's own and with `prompt`, its tokens.

    Raises:
        ContextOverflowError: prompt plus max_tokens do not fit the context.
        ProviderError: the request asks for what this engine does not do.
    """
    config = request.config
    for name in ("probabilities", "frequency_penalty", "presence_penalty"):
        if getattr(config, name):
            raise ProviderError(f"got {name} for {request.model}, which local models do not take; remedy: unset it")
    n_prompt = len(prompt)
    room = context - n_prompt
    wanted = config.max_tokens if config.max_tokens is not None else DEFAULT_MAX_TOKENS
    if config.max_tokens is None or ceiling_gives_way():
        wanted = max(1, min(wanted, room))
    if wanted > room:
        raise ContextOverflowError(
            f"got a prompt of {n_prompt} tokens and max_tokens={wanted} for {request.model}, whose context holds "
            f"{context}: {n_prompt + wanted - context} too many; remedy: fewer or shorter demonstrations, or a "
            "smaller max_tokens"
        )
    # Every prompt draws for itself: one random number for all examples of a run would make them err together.
    drawn_by = f"{seed}:{config.seed}:{','.join(map(str, prompt))}"
    return DecodingRules(
        max_tokens=wanted,
        temperature=config.temperature or 0.0,
        top_p=1.0 if config.top_p is None else config.top_p,
        top_k=config.top_k or 0,
        stop=tuple(stop for stop in config.stop if stop),
        seed=int.from_bytes(hashlib.sha256(drawn_by.encode()).digest()[:8], "big"),
        n_logprobs=config.logprobs,
    )


def check_room(n_tokens: int, *, context: int, name: str) -> None:
    """Check that prompt and answer fit a model's context together.

    Raises:
        ContextOverflowError: they do not.
    """
    if n_tokens > context:
        raise ContextOverflowError(
            f"got {n_tokens} tokens of prompt and answer for {name}, whose context holds {context}; remedy: fewer or "
            "shorter demonstrations, or a smaller max_tokens"
        )


def response_of(request: Request, answer: Answer, *, n_prompt: int, chat: ChatTemplate) -> Response:
    """A generated answer as DSPy wants it, with log-probabilities if they were asked for."""
    from dspy.lm15 import Usage

    def piece(token: int) -> str:
        return str(chat.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    logprobs = None
    if request.config.logprobs is not None:
        logprobs = tuple(
            _token_logprob(piece(token), logprob, [(piece(other), value, other) for other, value in best], id=token)
            for token, (logprob, best) in zip(answer.ids, answer.logprobs, strict=True)
        )
    return _response(request, answer, Usage(input_tokens=n_prompt, output_tokens=answer.n_tokens), logprobs)


def constrained_response(request: Request, answer: ConstrainedAnswer) -> Response:
    """A constrained answer as DSPy wants it; `logprobs` has one entry per chosen field, with all allowed values."""
    from dspy.lm15 import Usage

    logprobs = tuple(
        _token_logprob(choice.value, choice.score, [(value, score, None) for value, score in choice.scores])
        for choice in answer.choices
    )
    return _response(request, answer, Usage(input_tokens=answer.n_input, output_tokens=answer.n_output), logprobs)


def _response(request: Request, answer: Answer | ConstrainedAnswer, usage: Any, logprobs: Any) -> Response:
    from dspy.lm15 import Message, Response

    return Response(
        id=None,
        model=request.model,
        message=Message.assistant(answer.text),
        finish_reason=answer.finish_reason,
        usage=usage,
        logprobs=logprobs,
    )


def _token_logprob(
    token: str, logprob: float, top: Sequence[tuple[str, float, int | None]], *, id: int | None = None
) -> TokenLogprob:
    from dspy.lm15 import TokenLogprob, TopLogprob

    best = tuple(TopLogprob(token=other, logprob=_rounded(value), token_id=number) for other, value, number in top)
    return TokenLogprob(token=token, logprob=_rounded(logprob), token_id=id, top=best)


def _rounded(logprob: float) -> float:
    """To five digits behind the point: the last ones depend on the batch."""
    return min(0.0, round(logprob, 5))
