"""Training rows: the prompt exactly as the program's prompt adapter sends it at inference, then the wanted answer.

`render_rows` makes them from labelled examples, `render_calls` from any calls of a predictor (`traces` has those of
passing runs); `encode_row` turns one into the very prompt tokens of inference, the answer's tokens, and the positions
to learn.

A LoRA adapter works with the prompts it was trained on: rows without demonstrations spoil the use of demonstrations and
the reverse. So a row is rendered with the demonstrations that will be served: none, the program's own, or k drawn anew
for every row and variant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from copa_harness.errors import ConfigurationError, TrainingError

if TYPE_CHECKING:
    import dspy

    from copa_harness.lm.local.chat_template import ChatTemplate

DemoMode = Literal["none", "program", "resample"]
"""Demonstrations in training prompts: none; the program's own at the time; k others drawn for every row."""


@dataclass(frozen=True, slots=True)
class RowDemos:
    """Which demonstrations training rows carry.

    Attributes:
        mode: see `DemoMode`.
        seed: of the drawing with `resample`.
        n_demos: demonstrations per row with `resample`.
        n_variants: renderings per example with `resample`, each with other demonstrations.

    Raises:
        ConfigurationError: the numbers do not fit the mode.
    """

    mode: DemoMode
    seed: int
    n_demos: int = 0
    n_variants: int = 1

    def __post_init__(self) -> None:
        if self.mode not in ("none", "program", "resample"):
            raise ConfigurationError(f"got demos={self.mode!r}; expected 'none', 'program' or 'resample'")
        numbers = f"n_demos={self.n_demos}, n_variants={self.n_variants}"
        if self.mode == "resample" and (self.n_demos < 1 or self.n_variants < 1):
            raise ConfigurationError(f"got demos='resample' with {numbers}; expected at least 1 of each")
        if self.mode != "resample" and (self.n_demos != 0 or self.n_variants != 1):
            raise ConfigurationError(
                f"got {numbers} with demos={self.mode!r}; they mean something only with 'resample'"
            )

    @property
    def served_with(self) -> str:
        """What an adapter's manifest says of rows rendered in this way: `none`, `program`, `resample:9`."""
        return f"resample:{self.n_demos}" if self.mode == "resample" else self.mode


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """A conversation whose last message is the assistant's wanted answer.

    Attributes:
        messages: `{"role": ..., "content": text}` each.
        variant: rows that show the same example behind other demonstrations have different variants; every
            epoch trains on one variant.

    Raises:
        TrainingError: no prompt, no answer at the end, or a content that is not text.
    """

    messages: tuple[Mapping[str, str], ...]
    variant: int = 0

    def __post_init__(self) -> None:
        roles = [message.get("role") for message in self.messages]
        if len(roles) < 2 or roles[-1] != "assistant":
            raise TrainingError(
                f"got a training row with the roles {roles}; expected a prompt followed by one assistant message, "
                "for instance system, user, assistant"
            )
        for message in self.messages:
            if not isinstance(message.get("content"), str):
                raise TrainingError(
                    f"got a {message.get('role')} message whose content is {type(message.get('content')).__name__}; "
                    "expected text (images, tools and other parts cannot be trained on)"
                )

    @classmethod
    def from_chat(cls, row: Mapping[str, Any]) -> TrainingRow:
        """From OpenAI's and DSPy's format, `{"messages": [...]}`.

        Raises:
            TrainingError: it is something else.
        """
        messages = row.get("messages") if isinstance(row, Mapping) else None
        if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
            raise TrainingError(
                f"got a training row of type {type(row).__name__}; "
                'expected {"messages": [{"role": ..., "content": ...}, ...]}'
            )
        return cls(tuple({"role": message.get("role"), "content": message.get("content")} for message in messages))

    @property
    def prompt(self) -> tuple[Mapping[str, str], ...]:
        """All messages but the answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The wanted answer's text."""
        return self.messages[-1]["content"]


@dataclass(frozen=True, slots=True)
class PredictorCall:
    """One call of a predictor with the outputs it should have given. `fields` is all of it, as a demonstration."""

    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    fields: Mapping[str, Any]


def render_rows(
    program: dspy.Module,
    examples: Sequence[dspy.Example],
    *,
    demos: RowDemos,
    adapter: Any = None,
) -> dict[str, tuple[TrainingRow, ...]]:
    """Rows from labelled examples: the example's own fields are the answer of every predictor.

    Args:
        program: whose predictors' signatures (instructions included) and prompt adapter shape the rows.
        examples: labelled; every predictor must find all its input and output fields in them.
        demos: which demonstrations they carry.
        adapter: DSPy prompt adapter; by default the one DSPy is configured with, else `dspy.ChatAdapter()`.

    Returns:
        Rows by predictor name, variants one after the other, examples in order.

    Raises:
        TrainingError: no examples; an example lacks a field a predictor needs; too few to draw from.
    """
    if not examples:
        raise TrainingError("got no examples to make training rows from; expected at least one")
    rendered: dict[str, tuple[TrainingRow, ...]] = {}
    for name, predictor in program.named_predictors():
        calls = [_gold_call(name, predictor.signature, example, i) for i, example in enumerate(examples)]
        rendered[name] = render_calls(predictor, calls, demos=demos, adapter=adapter)
    return rendered


def render_calls(
    predictor: Any, calls: Sequence[PredictorCall], *, demos: RowDemos, adapter: Any
) -> tuple[TrainingRow, ...]:
    """Rows of one predictor; see `render_rows`. A call is never shown among its own demonstrations."""
    import dspy

    signature = predictor.signature
    adapter = adapter or dspy.settings.adapter or dspy.ChatAdapter()
    rows = []
    for variant in range(demos.n_variants):
        for i, call in enumerate(calls):
            if demos.mode == "program":
                shown = [demo for demo in predictor.demos if not _same_inputs(signature, demo, call.inputs)]
            elif demos.mode == "resample":
                rng = np.random.default_rng([demos.seed, variant, i])
                shown = _draw(signature, calls, i, n_demos=demos.n_demos, rng=rng)
            else:
                shown = []
            prompt = adapter.format(signature, shown, dict(call.inputs))
            answer = adapter.format_assistant_message_content(signature, dict(call.outputs))
            rows.append(TrainingRow((*prompt, {"role": "assistant", "content": answer}), variant))
    return tuple(rows)


def _draw(
    signature: Any, calls: Sequence[PredictorCall], own: int, *, n_demos: int, rng: np.random.Generator
) -> list[Any]:
    if len(calls) - 1 < n_demos:
        raise TrainingError(
            f"got n_demos={n_demos} but only {len(calls) - 1} other examples to draw demonstrations from; "
            "remedy: fewer demonstrations or more examples"
        )
    others = [call.fields for call in calls if not _same_inputs(signature, call.inputs, calls[own].inputs)]
    size = min(n_demos, len(others))  # fewer only where examples have twins
    return [others[int(j)] for j in rng.choice(len(others), size=size, replace=False)] if size else []


def _same_inputs(signature: Any, left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether two field mappings (examples included) agree in all inputs of a signature."""
    return all(_get(left, name) == _get(right, name) for name in signature.input_fields)


def _get(fields: Any, name: str) -> Any:
    return fields.get(name, None)


def _gold_call(name: str, signature: Any, example: Any, position: int) -> PredictorCall:
    inputs = filled_inputs(signature, {field: example[field] for field in signature.input_fields if field in example})
    missing = [field for field in signature.input_fields if field not in inputs]
    missing += [field for field in signature.output_fields if _get(example, field) is None]
    if missing:
        raise TrainingError(
            f"example {position} lacks {', '.join(missing)}, which predictor {name!r} needs; it has "
            f"{', '.join(example.keys())}. Labels alone do not say what a predictor should write there; remedy: "
            "rows_from_traces(...) (the program's own passing answers), or finetune_data= with complete rows"
        )
    outputs = {field: example[field] for field in signature.output_fields}
    return PredictorCall(inputs, outputs, {**inputs, **outputs})


def filled_inputs(signature: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs as `dspy.Predict` sends them: the signature's defaults stand in for what is not given."""
    from pydantic_core import PydanticUndefined

    filled = {name: value for name, value in inputs.items() if name in signature.input_fields}
    for name, field in signature.input_fields.items():
        if name not in filled and field.default is not PydanticUndefined:
            filled[name] = field.default
    return filled


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row as tokens.

    Attributes:
        ids: token ids of prompt and answer.
        n_prompt: how many of them are the prompt's; loss falls on all after them.
        variant: see `TrainingRow`.
        demo_targets: positions in the prompt, in demonstrations' answers, on which loss falls too.
    """

    ids: tuple[int, ...]
    n_prompt: int
    variant: int = 0
    demo_targets: tuple[int, ...] = ()

    @property
    def targets(self) -> tuple[int, ...]:
        """Positions of the tokens to learn; the first is at least 1."""
        return (*self.demo_targets, *range(self.n_prompt, len(self.ids)))


def encode_row(
    chat: ChatTemplate, row: TrainingRow, *, eos_ids: frozenset[int], learn_from_demos: bool = False
) -> EncodedRow:
    """A row as tokens: the very prompt tokens of inference, then the answer's up to and with its end token.

    Prompt and answer are tokenized apart, as they are at inference, where the answer follows the given prompt tokens.

    Raises:
        TrainingError: the chat template writes a finished conversation differently from the prompt it began with.
    """
    prompt = chat.text(row.prompt, answer_next=True)
    whole = chat.text(row.messages, answer_next=False)
    if not whole.startswith(prompt):
        at = next(
            (i for i, (a, b) in enumerate(zip(whole, prompt, strict=False)) if a != b), min(len(whole), len(prompt))
        )
        raise TrainingError(
            f"the chat template of {chat.name} writes the finished conversation differently from the prompt, from "
            f"character {at} on: {whole[at : at + 40]!r} instead of {prompt[at : at + 40]!r}; training on it would "
            "teach prompts that are never served; remedy: give a template without such rules, "
            "TransformersEngine(..., chat_template=...)"
        )
    prompt_ids, answer_ids = chat.ids(prompt), list(chat.ids(whole[len(prompt) :]))
    end = next((i for i, token in enumerate(answer_ids) if token in eos_ids), None)
    # What a template writes after the end token (often a newline) is never generated.
    answer_ids = answer_ids[: end + 1] if end is not None else [*answer_ids, *sorted(eos_ids)[:1]]
    in_demos = _demo_targets(chat, row, prompt, prompt_ids, eos_ids=eos_ids) if learn_from_demos else ()
    return EncodedRow((*prompt_ids, *answer_ids), len(prompt_ids), row.variant, in_demos)


def _demo_targets(
    chat: ChatTemplate, row: TrainingRow, prompt: str, prompt_ids: Sequence[int], *, eos_ids: frozenset[int]
) -> tuple[int, ...]:
    """Positions of the demonstrations' answers (end tokens included) in the prompt's tokens."""
    offsets = chat.offsets(prompt)
    targets: list[int] = []
    for i, message in enumerate(row.prompt):
        # DSPy shows demonstrations with missing fields too; their placeholder is nothing to learn.
        if message["role"] != "assistant" or "Not supplied for this particular" in message["content"]:
            continue
        before = chat.text(row.messages[:i], answer_next=True)
        if not prompt.startswith(before):
            continue  # this template writes earlier turns differently from the one being answered
        # Templates may trim what is said, or open an earlier turn with less than they open the answer with.
        said = message["content"] if prompt.startswith(message["content"], len(before)) else message["content"].strip()
        start = prompt.find(said, len(before)) if said else -1
        if start < 0 or prompt[len(before) : start].strip():
            continue
        end = start + len(said)
        own = [position for position, (first, last) in enumerate(offsets) if len(before) <= first and last <= end]
        following = own[-1] + 1 if own else 0
        if own and following < len(prompt_ids) and prompt_ids[following] in eos_ids:
            own.append(following)
        targets += [position for position in own if position]
    return tuple(targets)
