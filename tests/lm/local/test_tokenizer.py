"""The tokenizer without transformers: the same tokens, texts and prompts, and the library's where it is beyond it."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from copa_harness.lm.embedded import embedded_model_path
from copa_harness.lm.local.tokenizer import PlainTokenizer, library_tokenizer, read_tokenizer
from copa_harness.testing.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def both():
    """Ours and the library's tokenizer of the embedded model."""
    return read_tokenizer(embedded_model_path().resolve()), library_tokenizer(embedded_model_path())


def texts():
    draw = random.Random(0)
    pieces = ["<|user|>", "<|end|>", "[[ ## label ## ]]\n", " 0.25", "Zürich", "\n\n", "日本", "\u00a0x", "  ", "\t!"]
    return ["", *("".join(draw.choices(pieces, k=draw.randint(1, 30))) for _ in range(200))]


def test_tokens_offsets_and_texts_are_the_librarys(both):
    ours, theirs = both
    assert isinstance(ours, PlainTokenizer)
    for text in texts():
        got = ours(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        expected = theirs(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        assert got["input_ids"] == expected["input_ids"]
        assert list(got["offset_mapping"]) == list(expected["offset_mapping"])
        for skip in (True, False):
            options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
            assert ours.decode(got["input_ids"], **options) == theirs.decode(got["input_ids"], **options)
    assert (ours.eos_token, ours.eos_token_id) == (theirs.eos_token, theirs.eos_token_id)


PLAIN = "{%- for m in messages %}\n  {{ m.content | trim }}{{ eos_token }}{{ bos_token is defined }}\n{% endfor %}"


@pytest.mark.parametrize("template", [None, PLAIN, "{{ messages | tojson }}"])
def test_prompts_are_the_librarys(both, template):
    ours, theirs = both
    messages = [
        {"role": "system", "content": " Be <brief>. "},
        {"role": "user", "content": "q\n"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"},
    ]
    for answer_next in (True, False):
        options = {"chat_template": template, "tokenize": False, "add_generation_prompt": answer_next}
        assert ours.apply_chat_template(messages, **options) == theirs.apply_chat_template(messages, **options)


def test_what_it_does_not_have_is_the_librarys(both):
    ours, theirs = both
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.pad_token_id == theirs.pad_token_id


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_any_other_folder_gets_the_librarys(architecture, tmp_path):
    folder = write_tiny_model(tmp_path / "tiny", architecture=architecture)
    assert not isinstance(read_tokenizer(folder), PlainTokenizer)


def test_the_embedded_model_answers_without_transformers_peft_or_scipy(tmp_path):
    code = (
        "import sys; from pathlib import Path; from dspy.lm15 import Config, Message, Request\n"
        "from copa_harness.lm.embedded import embedded_model_path\n"
        "from copa_harness.lm.local.engine import TransformersEngine\n"
        f"engine = TransformersEngine(embedded_model_path(), name='embedded', lora_dir=Path({str(tmp_path)!r}))\n"
        "request = Request(model='embedded', messages=(Message.user('x'),), config=Config(max_tokens=2))\n"
        "assert engine.complete(request, seed=0).usage.output_tokens in (1, 2)\n"
        "assert engine.generator.n_near_ties or not {'transformers', 'peft', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
