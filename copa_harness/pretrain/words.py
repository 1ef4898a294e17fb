"""Words the synthetic episodes are made of: field names, label words, and the words that must never appear.

Two sources: a list of plain English words and an endless supply of pronounceable invented words. ``BANNED_WORDS``
holds every word of the task names, field names and labels of Iris, Wine and Breast Cancer (the tasks in ``suites/``);
none of them is ever produced, neither as a name or label nor in the tokenizer's corpus. This module knows nothing of
templates, tokens or numbers.
"""

from __future__ import annotations

import random

BANNED_WORDS = frozenset(
    """
    iris flower petal sepal length width setosa versicolor versicolour virginica cm
    wine cultivar alcohol malic acid ash alcalinity alkalinity magnesium total phenols phenol flavanoids flavanoid
    nonflavanoid proanthocyanins color colour intensity hue diluted wines proline barolo grignolino barbera
    breast cancer tumor tumour diagnosis malignant benign radius texture perimeter area smoothness compactness concavity
    concave points symmetry fractal dimension mean error worst
    """.split()  # noqa: SIM905 a word list is easier to read and to extend as text
)

_PLAIN_WORDS = """
red blue green black white gray gold silver amber coral ivory olive pearl rose ruby topaz violet copper bronze cobalt
apple banana cherry grape lemon mango melon peach pear plum carrot onion pepper potato radish spinach tomato bean corn
cat dog horse cow sheep goat pig duck hen fox wolf bear lion tiger mouse rabbit eagle hawk owl crow trout salmon shark
car bus train plane ship truck bike boat cart sled river lake ocean hill valley forest desert meadow island canyon
north south east west up down left right high low big small fast slow hot cold warm cool dry wet old new young hard
soft yes no true false pass fail good bad safe risky normal odd common rare early late open closed active idle ready
waiting alpha beta gamma delta omega sigma kappa theta zeta lambda type group class kind level grade tier band zone
region speed weight height depth size age price cost score rate count ratio volume mass density angle power heat
pressure voltage current load force torque energy signal noise delay range gap phase tone pitch light dark shade sugar
salt fiber fat protein oil water dust sand clay stone metal wood glass paper cloth wool silk cotton leather rubber
plastic steel iron engine wheel brake motor pump valve sensor battery cable screen button handle door window roof
floor wall table chair lamp book song film game sport music art dance story poem city town village farm market school
church bank shop hotel station winter summer spring autumn monday friday sunday morning evening night rain snow wind
storm cloud fog frost thunder happy sad angry calm proud shy brave kind honest clever lazy busy tired hungry sick
healthy strong weak rich poor sample record item row case entry object unit device product reading measure value
feature input data text note message loud quiet stable whale rice report negative positive neutral spam urgent approve
reject accept deny other unknown minor major
""".split()  # noqa: SIM905

PLAIN_WORDS: tuple[str, ...] = tuple(word for word in dict.fromkeys(_PLAIN_WORDS) if word not in BANNED_WORDS)

_CLUSTERS = "br cr dr fr gr pr tr bl cl fl gl pl sl st sp sk sh ch th qu"
_ONSETS = [*"bcdfghjklmnprstvwz", *_CLUSTERS.split(), ""]
_VOWELS = [*"aeiou", "ai", "ea", "io", "ou", "ia"]
_CODAS = [*"nrlstmdxcp", "nd", "st", "ck", *[""] * 10]


def invented_word(rng: random.Random) -> str:
    """One pronounceable lower-case word of 3 to 12 letters that is not banned."""
    n_syllables = rng.choice([1, 2, 2, 2, 3, 3, 4])
    while True:
        word = "".join(
            rng.choice(_ONSETS) + rng.choice(_VOWELS[:5] if rng.random() < 0.85 else _VOWELS) + rng.choice(_CODAS)
            for _ in range(n_syllables)
        )
        if 3 <= len(word) <= 12 and word not in BANNED_WORDS:
            return word


def any_word(rng: random.Random) -> str:
    """A plain English word (45 %) or an invented one."""
    return rng.choice(PLAIN_WORDS) if rng.random() < 0.45 else invented_word(rng)


def field_names(rng: random.Random, n: int, *, joined: bool) -> list[str]:
    """``n`` distinct field names: one to three words, or a grid of prefixes and suffixes as real columns often are."""
    sep = "_" if joined else " "
    style = rng.random()
    if style < 0.35 and n > 1:
        n_first = 1 if rng.random() < 0.25 else 2
        firsts, seconds = (
            [any_word(rng) for _ in range(n_first)],
            [any_word(rng) for _ in range(n if n_first == 1 else (n + 1) // 2)],
        )
        grid = list(dict.fromkeys(f"{a}{sep}{b}" for a in firsts for b in seconds))
        if len(grid) >= n:
            return grid[:n] if rng.random() < 0.6 else rng.sample(grid, n)
    names: list[str] = []
    while len(names) < n:
        words = rng.choice([1, 1, 2, 2, 3]) if style < 0.8 else 1
        name = sep.join(any_word(rng) for _ in range(words))
        if name not in names:
            names.append(name)
    return names


def labels_of_one_start(rng: random.Random, n: int, pieces: list[str]) -> list[str]:
    """``n`` distinct labels that begin with the same one or two pieces."""
    start = "".join(rng.choice(pieces) for _ in range(rng.choice([1, 1, 1, 2])))
    labels: list[str] = []
    while len(labels) < n:
        label = start + "".join(rng.choice(pieces) for _ in range(rng.choice([1, 2, 2, 3])))
        if label not in labels and label not in BANNED_WORDS:
            labels.append(label)
    return labels


def label_words(rng: random.Random, n: int, pieces: list[str] | None) -> list[str]:
    """``n`` distinct label words; from random vocabulary pieces when given, some sharing their first letters."""
    labels: list[str] = []
    plain = rng.random() < 0.5
    while len(labels) < n:
        if pieces is None:
            label = rng.choice(PLAIN_WORDS) if plain else any_word(rng)
        else:
            label = "".join(rng.choice(pieces) for _ in range(rng.choice([1, 2, 2, 3, 4])))
            if labels and rng.random() < 0.15:
                label = labels[0][: rng.randint(1, 3)] + label
        if label not in labels and label not in BANNED_WORDS and label not in ("answer",):
            labels.append(label)
    if rng.random() < 0.1:
        labels = [label.capitalize() for label in labels]
    if rng.random() < 0.03:
        labels = [f"class_{i}" for i in range(n)] if rng.random() < 0.5 else list("ABCDEFGH"[:n])
    return labels
