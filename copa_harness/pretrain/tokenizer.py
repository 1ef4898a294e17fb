"""Builds the embedded model's tokenizer: a small byte-level BPE, one token per number and per ChatAdapter phrase.

Every number of one to three significant digits that people print ("7", "47", "305", "5.1", "13.2", "0.12", "1.47")
is one token, so that a value is one embedding row and comparing two values is one attention score. Every fixed
phrase of ``dspy.ChatAdapter`` is one token, so that prompts are short. Words never carry a leading space, so that a
label is the same tokens wherever it stands. Longer numbers ("1065") fall into pieces. This module knows nothing of
episodes or networks.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from copa_harness.pretrain.words import BANNED_WORDS, PLAIN_WORDS, invented_word

if TYPE_CHECKING:
    import pathlib

PAD, SYSTEM, USER, ASSISTANT, END = "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS: Final = (PAD, SYSTEM, USER, ASSISTANT, END)

_RESPOND = "\n\nRespond with the corresponding output fields, starting with the field `[[ ## "
_RESPOND_END = ", and then ending with the marker for `[[ ## completed ## ]]`."
PHRASES: Final = (
    _RESPOND,
    _RESPOND + "answer ## ]]`" + _RESPOND_END,
    " ## ]]`" + _RESPOND_END,
    _RESPOND_END,
    " ## ]]`, then `[[ ## ",
    " ## ]]` (must be formatted as a valid Python Literal[",
    " ## ]]` (must be formatted as a valid Python ",
    "])" + _RESPOND_END,
    "Your input fields are:\n1. `",
    "\nYour output fields are:\n1. `",
    "\nYour output fields are:\n1. `answer` (str): ",
    "\nAll interactions will be structured in the following way, with the appropriate values filled in.\n\n",
    "In adhering to this structure, your objective is: \n        ",
    "[[ ## ",
    " ## ]]\n",
    " ## ]]\n{",
    "\n\n[[ ## ",
    "}\n\n[[ ## ",
    "[[ ## answer ## ]]\n",
    "\n\n[[ ## answer ## ]]\n",
    "}\n\n[[ ## answer ## ]]\n{answer}",
    "[[ ## features ## ]]\n",
    "{features}\n\n[[ ## answer ## ]]\n{answer}",
    "[[ ## reasoning ## ]]\n",
    "}\n\n[[ ## reasoning ## ]]\n{reasoning}\n\n[[ ## ",
    "\n\n[[ ## completed ## ]]\n",
    *(f"\n{i}. `" for i in range(2, 10)),
    "` (str): ",
    "` (float): ",
    "` (int): ",
    "` (str):",
    "` (float):",
    "` (int):",
    "` (Literal[",
    "]):",
    "        # note: the value you produce must exactly match (no extra characters) one of: ",
    "This is an example of the task, though some input or output fields are not supplied.\n\n",
    "Not supplied for this particular example. ",
    "', '",
    "`, `",
    ", or ",
    ", ",
    "; ",
    ". ",
    ": ",
    "\n\n",
    "If ",
    " is below ",
    " is at least ",
    " is above ",
    " answer ",
    ", otherwise if ",
    ", otherwise answer ",
)

_CORPUS_PHRASES = """
Given the fields produce the fields answer label category predict classify the from its measurements one of choose
which if is below above less than more than under over otherwise else answer with the first rule when at least greater
smaller or and Classify Determine Assign each record to a group Reply Question context text review message reasoning
think step by step because features Choose Answer Predict values input output result closest to looks like that
follows into following categories
""".split()  # noqa: SIM905

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

NUMBER_PATTERN: Final = r"\d\.\d\d|\d\d\.\d|\d\.\d|\d{1,3}"


def number_strings() -> list[str]:
    """Every number that is one token: d, dd, ddd, d.d, dd.d, d.dd without superfluous leading zeros."""
    numbers = [str(value) for value in range(1000)]
    numbers += [f"{value / 10:.1f}" for value in range(1000)]
    numbers += [f"{value / 100:.2f}" for value in range(1000)]
    return numbers


def build_tokenizer(*, seed: int, n_text_tokens: int = 2304) -> PreTrainedTokenizerFast:
    """Trains the tokenizer.

    Args:
        seed: Of the invented words of the corpus.
        n_text_tokens: Size of the byte-level BPE vocabulary before numbers and phrases are added.
    """
    rng = random.Random(seed)
    corpus = [word for word in _CORPUS_PHRASES for _ in range(400)]
    corpus += [word for word in PLAIN_WORDS for _ in range(100)]
    corpus += [invented_word(rng) for _ in range(20000)]
    corpus += _english_words()
    text = Tokenizer(models.BPE())
    text.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=n_text_tokens,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text.train_from_iterator(corpus, trainer)
    learned = _bpe_parts(text)
    vocabulary = dict(learned[0])
    for number in number_strings():
        vocabulary.setdefault(number, len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=learned[1], ignore_merges=True))
    backend.pre_tokenizer = _pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    backend.add_tokens([AddedToken(phrase, normalized=False) for phrase in PHRASES])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: pathlib.Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja into ``folder``."""
    tokenizer.save_pretrained(folder)


def _english_words(most: int = 12) -> list[str]:
    """The words of Python's own language reference, each at most ``most`` times, banned words left out."""
    counts = Counter(re.findall(r"[A-Za-z][a-z]{2,}", " ".join(topics.values())))
    kept = {word: count for word, count in counts.items() if word.lower() not in BANNED_WORDS}
    return [word for word in sorted(kept) for _ in range(min(kept[word], most))]


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(NUMBER_PATTERN), "isolated"),
            pre_tokenizers.Split(Regex(r"[^\w]|_|\d+\.\d+|\d+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _bpe_parts(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and merges of a trained BPE, read back from its JSON."""
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    return model["vocab"], [(left, right) for left, right in merges]
