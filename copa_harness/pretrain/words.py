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
