from __future__ import annotations

import pytest

from copa_harness.lm.embedded.pretrain.tokenizer import PHRASES, number_strings
from copa_harness.lm.embedded.pretrain.worlds import BANNED_WORDS


@pytest.mark.parametrize("number", ["5.1", "13.2", "0.12", "1.47", "47", "7", "305", "0.0", "99.9"])
def test_a_number_of_up_to_three_digits_is_one_token(tokenizer, number):
    assert tokenizer.convert_ids_to_tokens(tokenizer(number, add_special_tokens=False).input_ids) == [number]


def test_every_listed_number_is_one_token(tokenizer):
    for number in number_strings():
        assert len(tokenizer(number, add_special_tokens=False).input_ids) == 1, number


@pytest.mark.parametrize("phrase", PHRASES)
def test_every_chat_adapter_phrase_is_one_token(tokenizer, phrase):
    assert len(tokenizer(phrase, add_special_tokens=False).input_ids) == 1


@pytest.mark.parametrize(
    "text",
    [
        "5.1, 13.2;0.12 1.47 47 7 1065 12.34 0.005 007 -3.5",
        "If petal_length is below 2.5 answer setosa, otherwise answer x.",
        "Grüße, 東京\t\n\n  two  spaces",
        "[[ ## answer ## ]]\nversicolor\n\n[[ ## completed ## ]]\n",
    ],
)
def test_text_survives_encoding_and_decoding(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_a_label_is_the_same_tokens_wherever_it_stands(tokenizer):
    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    word = ids("virginica")
    for text in ("answer virginica.", "[[ ## answer ## ]]\nvirginica\n\n[[ ## completed ## ]]\n", "a, virginica, or b"):
        inside = ids(text)
        assert any(inside[i : i + len(word)] == word for i in range(len(inside))), text


def test_no_word_of_the_held_out_tasks_is_a_token(tokenizer):
    pieces = {piece.lower() for piece in tokenizer.get_vocab()}
    # "mean" is a piece of "meaning" in the English part of the corpus; no episode uses it
    assert BANNED_WORDS & pieces <= {"mean"}


def test_chat_template_writes_roles_and_ends_assistant_turns(tokenizer):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>a<|assistant|>b<|end|><|user|>c<|assistant|>"
