"""What episodes are about: how feature values and labels come about, rules put into words, and the words themselves.

A world draws N examples: ``shares`` (N, F), each value as a share 0..1 of its column's range, and ``classes`` (N,).
Kinds: ``gauss`` (Gaussian classes, sometimes correlated or with noise columns), ``linear`` (bands along one direction),
``axis`` (an unspoken threshold rule), ``rule`` (a threshold rule which the instruction states), ``text`` (short
sentences whose classes share words).

Field names and labels have two sources: a list of plain English words and an endless supply of pronounceable invented
words. ``BANNED_WORDS`` holds every word of the task names, field names and labels of Iris, Wine and Breast Cancer (the
tasks in ``suites/``); none of them is ever produced, neither as a name or label nor in the tokenizer's corpus.
``OWN_TASK_WORDS`` holds the field names and labels of the held-out own-name tasks (``development_tasks``); no episode
has them as a whole word of a name, label or text.
"""

from __future__ import annotations

import functools
import random
import re
from collections import Counter
from dataclasses import dataclass
from pydoc_data.topics import topics

import numpy as np
import numpy.typing as npt

Shares = npt.NDArray[np.float64]

Classes = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Clause:
    """``if feature <operator> threshold then class``; the threshold as printed."""

    feature: int
    operator: str
    threshold: str
    label: int

    def holds(self, printed: str) -> bool:
        """Whether a printed value fulfils the clause."""
        value, threshold = float(printed), float(self.threshold)
        if self.operator == "below":
            return value < threshold
        return value >= threshold if self.operator == "at least" else value > threshold


def gaussian_world(
    rng: np.random.Generator, n_features: int, n_classes: int, *, spread: float, n_examples: int
) -> tuple[Shares, Classes]:
    """Gaussian classes at random places; ``spread`` is the typical standard deviation as a share of the range."""
    noise_columns = rng.random(n_features) < (0.15 if n_features > 1 else 0.0)
    if noise_columns.all():
        noise_columns[:] = False
    centres = np.zeros((n_classes, n_features))
    for _ in range(20):
        centres = rng.random((n_classes, n_features)) * 0.8 + 0.1
        if rng.random() < 0.35:
            line = np.sort(rng.random(n_classes) * 0.8 + 0.1)[rng.permutation(n_classes)]
            sign = rng.choice([1.0, 1.0, 1.0, -1.0], n_features)
            centres = 0.5 + sign * (line[:, None] - 0.5) + rng.normal(0, 0.08, centres.shape)
        centres[:, noise_columns] = centres[:1, noise_columns]
        gaps = [np.linalg.norm(centres[a] - centres[b]) / spread for a in range(n_classes) for b in range(a)]
        if min(gaps) > 3:
            break
    scales = spread * rng.uniform(0.5, 1.5, (n_classes, n_features))
    scales[:, noise_columns] = rng.uniform(0.05, 0.2)
    classes = rng.integers(0, n_classes, n_examples)
    noise = rng.standard_normal((n_examples, n_features))
    if n_features > 1 and rng.random() < 0.4:
        shared = rng.standard_normal((n_examples, 1))
        weight = rng.uniform(0.3, 0.8)
        noise = np.sqrt(1 - weight) * noise + np.sqrt(weight) * shared
    return centres[classes] + scales[classes] * noise, classes


def linear_world(
    rng: np.random.Generator, n_features: int, n_classes: int, *, n_examples: int
) -> tuple[Shares, Classes]:
    """Bands along one direction, the examples nearest to the borders left out."""
    direction = rng.standard_normal(n_features)
    shares = rng.random((n_examples * 3, n_features))
    position = shares @ direction
    borders = np.quantile(position, np.linspace(0, 1, n_classes + 1)[1:-1])
    classes = np.searchsorted(borders, position)
    kept = np.argsort(-np.min(np.abs(position[:, None] - borders[None]), axis=1))[:n_examples]
    kept = rng.permutation(kept)
    return shares[kept], classes[kept].astype(np.int64)


def rule_shape(rng: np.random.Generator, n_features: int, n_classes: int) -> list[tuple[int, str, float, int]]:
    """A random rule of ``n_classes - 1`` clauses as (feature, operator, threshold share, class)."""
    classes = [int(c) for c in rng.permutation(n_classes)]
    n_clauses = n_classes - 1
    one_feature = n_features == 1 or rng.random() < 0.35
    operators = ["below", "at least", "above"]
    clauses: list[tuple[int, str, float, int]] = []
    if one_feature and n_clauses > 1:
        feature = int(rng.integers(n_features))
        while True:
            borders = np.sort(rng.uniform(0.12, 0.88, n_clauses))
            if np.min(np.diff(borders)) > 0.15:
                break
        upward = rng.random() < 0.7
        operator = "below" if upward else operators[int(rng.integers(1, 3))]
        for i in range(n_clauses):
            clauses.append((feature, operator, float(borders[i] if upward else borders[-1 - i]), classes[i]))
        return clauses
    features = [int(f) for f in rng.permutation(n_features)]
    for i in range(n_clauses):
        operator = operators[int(rng.choice(3, p=[0.6, 0.2, 0.2]))]
        low, high = (0.3, 0.7) if n_clauses == 1 else (0.3, 0.6)
        threshold = float(rng.uniform(low, high))
        clauses.append(
            (features[i % n_features], operator, threshold if operator == "below" else 1 - threshold, classes[i])
        )
    return clauses


def rule_shares(
    rng: np.random.Generator, clauses: list[tuple[int, str, float, int]], n_features: int, *, n_examples: int
) -> Shares:
    """Values for a rule: uniform or clustered, both sides of every threshold visited about equally."""
    shares = rng.random((n_examples, n_features))
    if rng.random() < 0.5:
        centres = rng.random((int(rng.integers(2, 6)), n_features))
        shares = centres[rng.integers(0, len(centres), n_examples)] + 0.07 * rng.standard_normal(
            (n_examples, n_features)
        )
    for feature in {clause[0] for clause in clauses}:
        borders = np.sort([0.0, 1.0] + [clause[2] for clause in clauses if clause[0] == feature])
        redrawn = rng.random(n_examples) < 0.7
        segment = rng.integers(0, len(borders) - 1, n_examples)
        value = borders[segment] + (borders[segment + 1] - borders[segment]) * rng.random(n_examples)
        shares[:, feature] = np.where(redrawn, value, shares[:, feature])
    return np.clip(shares, 0.0, 1.0)


def rule_text(
    rng: np.random.Generator,
    clauses: list[Clause],
    names: list[str],
    labels: list[str],
    last: int,
    *,
    main_share: float,
) -> tuple[str, list[int], list[int], list[int]]:
    """A rule in words.

    Returns:
        The sentence, and character positions in it: of each clause's field name, of each clause's threshold, and of
        each label (one per clause, then the last one).
    """
    style = 0 if rng.random() < main_share else int(rng.integers(1, 5))
    words = {"below": "below", "at least": "at least", "above": "above"}
    if style:
        words = {
            "below": str(rng.choice(["less than", "under", "below", "<"])),
            "at least": str(rng.choice(["at least", ">=", "not below"])),
            "above": str(rng.choice(["more than", "over", "above", ">"])),
        }
    text, fields, thresholds, places = "", [], [], []
    joint = "; " if style and rng.random() < 0.5 else ", "
    for i, clause in enumerate(clauses):
        word = words[clause.operator]
        copula = "" if word in ("<", ">", ">=") else "is "
        condition = f"{names[clause.feature]} {copula}{word} "
        if style in (0, 1, 4):
            text += "If " if i == 0 else (joint + ("otherwise if " if style != 4 else "if "))
            fields.append(len(text))
            text += condition
            thresholds.append(len(text))
            text += clause.threshold + {0: " answer ", 1: " then ", 4: ", "}[style]
            places.append(len(text))
            text += labels[clause.label]
        else:
            text += joint if i else ""
            places.append(len(text))
            text += labels[clause.label] + (" if " if style == 2 else " when ")
            fields.append(len(text))
            text += condition
            thresholds.append(len(text))
            text += clause.threshold
    text += joint + ("otherwise answer " if style == 0 else "otherwise " if rng.random() < 0.6 else "else ")
    places.append(len(text))
    return text + labels[last] + ".", fields, thresholds, places


BANNED_WORDS = frozenset(
    """
    iris flower petal sepal length width setosa versicolor versicolour virginica cm
    wine cultivar alcohol malic acid ash alcalinity alkalinity magnesium total phenols phenol flavanoids flavanoid
    nonflavanoid proanthocyanins color colour intensity hue diluted wines proline barolo grignolino barbera
    breast cancer tumor tumour diagnosis malignant benign radius texture perimeter area smoothness compactness concavity
    concave points symmetry fractal dimension mean error worst
    """.split()  # noqa: SIM905 a word list is easier to read and to extend as text
)

OWN_TASK_WORDS = frozenset(
    """
    queue ticket severity escalate escalated mood courier parcel parcels invoice invoices refund refunded billing
    shipping login password locked payment charged logistics finance helpdesk aroma crispness bitterness roast
    thickness turbidity salinity verdict hazard hazardous urgency stars rating department
    """.split()  # noqa: SIM905
)

_NEVER = BANNED_WORDS | OWN_TASK_WORDS

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
        if 3 <= len(word) <= 12 and word not in _NEVER:
            return word


@functools.cache
def english_counts() -> Counter[str]:
    """How often each word of three or more letters stands in Python's own language reference, banned words left out."""
    counts = Counter(re.findall(r"[A-Za-z][a-z]{2,}", " ".join(topics.values())))
    return Counter({word: count for word, count in counts.items() if word.lower() not in BANNED_WORDS})


@functools.cache
def english_words() -> tuple[str, ...]:
    """The lower-case words of the language reference that stand there at least thrice, most frequent first."""
    kept = ((count, word) for word, count in english_counts().items() if count >= 3 and word.islower())
    return tuple(word for _, word in sorted(kept, key=lambda pair: (-pair[0], pair[1])) if word not in _NEVER)


def text_word(rng: random.Random) -> str:
    """A word of a sentence: plain, from the language reference, or invented."""
    draw = rng.random()
    if draw < 0.45:
        return rng.choice(PLAIN_WORDS)
    return rng.choice(english_words()) if draw < 0.82 else invented_word(rng)


def text_world(
    rng: random.Random, n_classes: int, *, n_examples: int
) -> tuple[list[str], list[frozenset[str]], Classes]:
    """Short sentences: some key words of their class among words that say nothing.

    Returns:
        The sentences, the key words in each, and the classes.
    """
    n_keys = rng.choice([1, 2, 2, 3, 3, 4, 5, 6])
    keys = [[text_word(rng) for _ in range(n_keys)] for _ in range(n_classes)]
    if rng.random() < 0.25 and n_keys > 1:
        keys[0][-1] = keys[1][-1]
    common = english_words()[:150]
    fillers = [rng.choice(common) if rng.random() < 0.6 else text_word(rng) for _ in range(rng.randint(3, 16))]
    most_keys, most_fillers = rng.choice([1, 2, 2, 3]), rng.choice([0, 2, 3, 4, 5, 6])
    place = rng.random()
    written = rng.random() < 0.3
    sentences: list[str] = []
    used: list[frozenset[str]] = []
    classes: list[int] = []
    for _ in range(n_examples):
        label = rng.randrange(n_classes)
        chosen = rng.sample(keys[label], min(rng.randint(1, most_keys), n_keys))
        others = [rng.choice(fillers) for _ in range(rng.randint(0, most_fillers))]
        words = chosen + others if place < 0.15 else others + chosen if place < 0.3 else [*chosen, *others]
        if place >= 0.3:
            rng.shuffle(words)
        text = " ".join(words)
        sentences.append(text[0].upper() + text[1:] + "." if written else text)
        used.append(frozenset(chosen))
        classes.append(label)
    return sentences, used, np.array(classes, np.int64)


def any_word(rng: random.Random) -> str:
    """A plain English word (45 %) or an invented one."""
    return rng.choice(PLAIN_WORDS) if rng.random() < 0.45 else invented_word(rng)


def any_name(rng: random.Random, pieces: list[str]) -> str:
    """A field name as anybody might write it: words, pieces of words, ``is_x``, ``x2``, ``xY``."""
    words = []
    for _ in range(rng.choice([1, 1, 1, 1, 2, 2, 3])):
        draw = rng.random()
        if draw < 0.35:
            words.append("".join(rng.choice(pieces) for _ in range(rng.choice([1, 1, 2, 2, 3]))))
        else:
            words.append(rng.choice(english_words()) if draw < 0.6 else any_word(rng))
    style = rng.random()
    if style < 0.05:
        name = words[0] + "".join(word.capitalize() for word in words[1:])
    elif style < 0.1:
        name = "_".join(words) + rng.choice(["1", "2", "3", "_1", "_2"])
    else:
        name = "_".join([*(["is"] if style < 0.17 else []), *words])
    return invented_word(rng) if name in _NEVER or name in ("completed", "reasoning") else name


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
        if label not in labels and label not in _NEVER:
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
        if label not in labels and label not in _NEVER and label not in ("answer",):
            labels.append(label)
    if rng.random() < 0.1:
        labels = [label.capitalize() for label in labels]
    if rng.random() < 0.03:
        labels = [f"class_{i}" for i in range(n)] if rng.random() < 0.5 else list("ABCDEFGH"[:n])
    return labels
