"""The embedded model's tokenizer: a small byte-level BPE, one token per number and per ChatAdapter phrase.

Every number of one to three significant digits that people print ("7", "47", "305", "5.1", "13.2", "0.12", "1.47") is
one token, so that a value is one embedding row and comparing two values is one attention score. Every fixed phrase of
``dspy.ChatAdapter`` is one token, so that prompts are short; names of fields are never part of a phrase, so that every
name is copied from the prompt and none is a habit. Words never carry a leading space, so that a label is the
same tokens wherever it stands. Longer numbers ("1065") fall into pieces.

Number tokens also have fixed features, from which their embeddings are made. Symbols: v a printed value, u in [0, 1)
its value as a share of its format's range (5.1 -> .51, 47 -> .47, 13.2 -> .132). The embedding row of a number token
during pretraining is ``number_features(v) @ P + r`` with learned P, r, so that what is learned at one number holds for
its neighbours.
"""

from __future__ import annotations

import json
import random
from typing import Final

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from copa_harness.lm.embedded.pretrain.worlds import PLAIN_WORDS, english_counts, invented_word

PAD, SYSTEM, USER, ASSISTANT, END = "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"

SPECIAL_TOKENS: Final = (PAD, SYSTEM, USER, ASSISTANT, END)

_RESPOND = "\n\nRespond with the corresponding output fields, starting with the field `[[ ## "

_RESPOND_END = ", and then ending with the marker for `[[ ## completed ## ]]`."

PHRASES: Final = (
    _RESPOND,
    " ## ]]`" + _RESPOND_END,
    _RESPOND_END,
    " ## ]]`, then `[[ ## ",
    " ## ]]` (must be formatted as a valid Python Literal[",
    " ## ]]` (must be formatted as a valid Python ",
    "])" + _RESPOND_END,
    " ## ]]` (must be formatted as a valid Python bool)",
    " ## ]]` (must be formatted as a valid Python int)",
    ", then `[[ ## ",
    "]), then `[[ ## ",
    "Your input fields are:\n1. `",
    "\nYour output fields are:\n1. `",
    "\nAll interactions will be structured in the following way, with the appropriate values filled in.\n\n",
    "In adhering to this structure, your objective is: \n        ",
    "[[ ## ",
    " ## ]]\n",
    " ## ]]\n{",
    "\n\n[[ ## ",
    "}\n\n[[ ## ",
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
    "        # note: the value you produce must be True or False",
    "        # note: the value you produce must be a single int value",
    "` (bool): ",
    "` (bool):",
    "True",
    "False",
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


FORMATS: tuple[str, ...] = ("d.d", "dd", "d", "ddd", "0.dd", "dd.d", "d.dd")

FORMAT_RANGE = {"d.d": 10.0, "dd": 100.0, "d": 10.0, "ddd": 1000.0, "0.dd": 1.0, "dd.d": 100.0, "d.dd": 10.0}

_FREQUENCIES = np.array([0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16])

_LOG_FREQUENCIES = np.array([0.25, 0.5, 1.0, 2.0])


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


def _english_words(most: int = 12) -> list[str]:
    """The words of Python's own language reference, each at most ``most`` times."""
    kept = english_counts()
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


def print_number(share: float, fmt: str) -> str:
    """The text of ``share`` (0..1 of the format's range) in one of ``FORMATS``."""
    most = FORMAT_RANGE[fmt]
    value, decimals = min(max(share, 0.0), 0.9999) * most, len(fmt.partition(".")[2])
    return f"{min(value, most - 10.0**-decimals):.{decimals}f}" if decimals else str(int(value))


def token_share(text: str) -> float:
    """U of a number token, by the format its text has."""
    return float(text) / FORMAT_RANGE[_format_of(text)]


def number_features(texts: list[str]) -> npt.NDArray[np.float32]:
    """Fixed features of number tokens, shape (n, n_features): waves of u, waves of log value, and the format.

    Amplitudes fall as 1 / sqrt(frequency), so that inner products of two rows are a smooth kernel of their distance.
    """
    share = np.array([token_share(text) for text in texts])
    angle = 2 * np.pi * share[:, None] * _FREQUENCIES
    damp = np.sqrt(np.maximum(_FREQUENCIES, 1.0))
    log_value = np.log10(np.array([float(text) for text in texts]) + 0.1)
    log_angle = np.pi * log_value[:, None] * _LOG_FREQUENCIES
    kinds = ["d", "dd", "ddd", "d.d", "dd.d", "0.dd", "d.dd"]
    kind = np.zeros((len(texts), len(kinds)))
    for row, text in enumerate(texts):
        kind[row, kinds.index(_format_of(text))] = 1.0
    columns = [
        np.cos(angle) / damp,
        np.sin(angle) / damp,
        2 * share[:, None] - 1,
        0.4 * np.cos(log_angle),
        0.4 * np.sin(log_angle),
        0.5 * kind,
        np.ones((len(texts), 1)),
    ]
    return np.concatenate(columns, axis=1).astype(np.float32)


def _format_of(text: str) -> str:
    if "." not in text:
        return "d" * len(text)
    whole, decimals = text.split(".")
    if len(decimals) == 2:
        return "0.dd" if whole == "0" else "d.dd"
    return "d.d" if len(whole) == 1 else "dd.d"


def number_strings_of(vocabulary: dict[str, int]) -> list[str]:
    """The number tokens of a vocabulary, in order of id."""
    numbers = [
        token for token in vocabulary if token[0].isdigit() and token.isascii() and token.replace(".", "", 1).isdigit()
    ]
    return sorted(numbers, key=lambda token: vocabulary[token])
