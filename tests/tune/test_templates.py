"""What is trained is what is served, in the chat templates people use: the same tokens, loss on the answer alone."""

from __future__ import annotations

from typing import Any, Literal

import dspy
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from copa_harness.lm.local.chat_template import ChatTemplate, request_messages
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.tune import RowDemos, TrainingRow, render_rows
from copa_harness.tune.rows import encode_row

LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim "
    "+ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GIVEN_TO_GPT2 = (
    "{% for m in messages %}{{ m['role'] | upper + ': ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
TEMPLATES = {
    "llama": (LLAMA, "<|eot_id|>"),
    "qwen": (QWEN, "<|im_end|>"),
    "qwen, thinking": (QWEN_THINKING, "<|im_end|>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "gpt2": (GIVEN_TO_GPT2, "<|endoftext|>"),
}
"""By name: a template written after the model family's own, and the token that ends an answer."""

SPECIAL = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_end|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|endoftext|>",
)


@pytest.fixture(scope="module")
def tokenizer_of():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    sample = "[[ ## colour ## ]] [[ ## completed ## ]] Your input fields are: Your output fields are:"
    tokenizer.train_from_iterator(
        [sample], trainers.BpeTrainer(vocab_size=320, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    )
    return lambda end: transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token=end
    )


@pytest.fixture(params=list(TEMPLATES))
def chat(request, tokenizer_of):
    template, end = TEMPLATES[request.param]
    return ChatTemplate(tokenizer_of(end), name=request.param, chat_template=template)


def ends_of(chat):
    return frozenset({chat.tokenizer.eos_token_id})


def served_prompts(chat, program, example, answers, adapter):
    """The very tokens the engine would generate from, for every call the program makes."""
    lm = ScriptedLM(answers)
    with dspy.context(lm=lm, adapter=adapter):
        program(**example.inputs())
    return [chat.prompt(request_messages(call.request)).ids for call in lm.requests]


class Colour(dspy.Signature):
    """Say the colour."""

    note: str = dspy.InputField()
    colour: Literal["red", "green"] = dspy.OutputField()


class Talk(dspy.Signature):
    """Go on talking."""

    history: dspy.History = dspy.InputField()
    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


class TwoSteps(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.Predict("text -> topic")
        self.second = dspy.ChainOfThought("text, topic -> score: float")

    def forward(self, text: str) -> Any:
        return self.second(text=text, topic=self.first(text=text).topic)


def one_predictor():
    example = dspy.Example(note=" a note ", colour="red").with_inputs("note")
    return dspy.Predict(Colour), example, [{"colour": "red"}], "none"


def demonstrations():
    program = dspy.Predict(Colour)
    program.demos = [dspy.Example(note="n1", colour="green"), dspy.Example(note="n2", colour="red")]
    example = dspy.Example(note="n3", colour="red").with_inputs("note")
    return program, example, [{"colour": "red"}], "program"


def several_turns():
    turns = [{"question": "who?", "answer": "me"}, {"question": "why?", "answer": "so"}]
    example = dspy.Example(history=dspy.History(messages=turns), question="when?", answer="now")
    return dspy.Predict(Talk), example.with_inputs("history", "question"), [{"answer": "now"}], "none"


def several_predictors():
    program = TwoSteps()
    example = dspy.Example(text="a b", topic="t", reasoning="because", score=0.5).with_inputs("text")
    program.first.demos = [dspy.Example(text="c d", topic="u")]
    program.second.predict.demos = [dspy.Example(text="c d", topic="u", score=0.25)]  # incomplete: no reasoning
    return program, example, [{"topic": "t"}, {"reasoning": "because", "score": 0.5}], "program"


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter, dspy.JSONAdapter])
@pytest.mark.parametrize("case", [one_predictor, demonstrations, several_turns, several_predictors])
def test_a_row_begins_with_the_tokens_that_are_served_and_goes_on_with_the_answer(case, adapter, chat):
    program, example, answers, demos = case()
    rows = render_rows(program, [example], demos=RowDemos(demos, seed=0), adapter=adapter())
    if adapter is dspy.JSONAdapter:
        served = [chat.prompt(row[0].prompt).ids for row in rows.values()]  # it asks endpoints for more than text
    else:
        served = served_prompts(chat, program, example, answers, adapter(use_json_adapter_fallback=False))
    assert len(served) == len(rows)
    for (row,), prompt, expected in zip(rows.values(), served, answers, strict=True):
        encoded = encode_row(chat, row, eos_ids=ends_of(chat))
        assert encoded.ids[: encoded.n_prompt] == prompt
        (signature,) = [p.signature for n, p in program.named_predictors() if rows[n][0] is row]
        text = chat.decode(encoded.ids[encoded.n_prompt :])
        assert adapter().parse(signature, text) == expected


def test_loss_falls_on_the_answer_and_one_end_token(chat):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "green"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "red"},
    ]
    encoded = encode_row(chat, TrainingRow(tuple(messages)), eos_ids=ends_of(chat))
    learnt = [encoded.ids[position] for position in encoded.targets]
    assert learnt[-1] == chat.tokenizer.eos_token_id
    assert learnt.count(chat.tokenizer.eos_token_id) == 1
    assert chat.tokenizer.decode(learnt[:-1]).removeprefix("<think>\n\n</think>\n\n") == "red"
    assert "q1" in chat.tokenizer.decode(encoded.ids[: encoded.n_prompt])


def test_learning_from_demonstrations_adds_their_answers_and_nothing_else(chat):
    messages = [
        *({"role": role, "content": text} for role, text in [("user", "q1"), ("assistant", "green")]),
        *({"role": role, "content": text} for role, text in [("user", "q2"), ("assistant", "red")]),
    ]
    encoded = encode_row(chat, TrainingRow(tuple(messages)), eos_ids=ends_of(chat), learn_from_demos=True)
    learnt = chat.tokenizer.decode([encoded.ids[position] for position in encoded.targets])
    end = chat.tokenizer.eos_token
    assert learnt.replace("<think>\n\n</think>\n\n", "") == f"green{end}red{end}"
