"""From a DSPy request to decoding rules, and from what was generated back to a DSPy response.

Knows nothing of models in memory or batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from copa_harness.errors import ContextOverflowError, ProviderError
from copa_harness.lm.local_decoding import DecodingRules

if TYPE_CHECKING:
    from dspy.lm15 import Request, Response, TokenLogprob

    from copa_harness.lm.local_chat import ChatFormat
    from copa_harness.lm.local_constrained import Choice, ConstrainedAnswer
    from copa_harness.lm.local_paths import Answer

DEFAULT_MAX_TOKENS = 512
"""Most tokens of an answer when the request names no limit (less if the context has less room)."""


def rules_of(request: Request, seed: int, *, prompt: Sequence[int], context: int) -> DecodingRules:
    """How a request's answer is decoded.

    Args:
        request: the request.
        seed: of the sampling, joined with the request's own and the prompt.
        prompt: its tokens.
        context: tokens the model can hold.

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
    wanted = config.max_tokens if config.max_tokens is not None else max(1, min(DEFAULT_MAX_TOKENS, room))
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


def response_of(request: Request, answer: Answer, *, n_prompt: int, chat: ChatFormat) -> Response:
    """A generated answer as DSPy wants it, with log-probabilities if they were asked for."""
    from dspy.lm15 import Message, Response, TokenLogprob, TopLogprob, Usage

    def piece(token: int) -> str:
        return str(chat.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    logprobs: tuple[TokenLogprob, ...] | None = None
    if request.config.logprobs is not None:
        logprobs = tuple(
            TokenLogprob(
                token=piece(token),
                logprob=_rounded(logprob),
                token_id=token,
                top=tuple(TopLogprob(token=piece(other), logprob=_rounded(value), token_id=other)
                          for other, value in best),
            )
            for token, (logprob, best) in zip(answer.ids, answer.logprobs, strict=True)
        )  # fmt: skip
    return Response(
        id=None,
        model=request.model,
        message=Message.assistant(answer.text),
        finish_reason=answer.finish_reason,
        usage=Usage(input_tokens=n_prompt, output_tokens=answer.n_tokens),
        logprobs=logprobs,
    )


def constrained_response(request: Request, answer: ConstrainedAnswer) -> Response:
    """A constrained answer as DSPy wants it; `logprobs` has one entry per chosen field, with all allowed values."""
    from dspy.lm15 import Message, Response, Usage

    return Response(
        id=None,
        model=request.model,
        message=Message.assistant(answer.text),
        finish_reason=answer.finish_reason,
        usage=Usage(input_tokens=answer.n_input, output_tokens=answer.n_output),
        logprobs=_label_scores(answer.choices),
    )


def _label_scores(choices: Sequence[Choice]) -> tuple[TokenLogprob, ...]:
    from dspy.lm15 import TokenLogprob, TopLogprob

    return tuple(
        TokenLogprob(
            token=choice.value,
            logprob=_rounded(choice.score),
            top=tuple(TopLogprob(token=value, logprob=_rounded(score)) for value, score in choice.scores),
        )
        for choice in choices
    )


def _rounded(logprob: float) -> float:
    """To five digits behind the point: the last ones depend on the batch."""
    return min(0.0, round(logprob, 5))
