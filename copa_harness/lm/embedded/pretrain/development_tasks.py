"""Held-out development tasks: what choices are made on, so that the tasks in ``suites/`` stay unseen.

Made by scikit-learn's generators and from its digits (a few principal components, three digits at a time); scaled by
the training rows' minimum and maximum to 0.0 .. 9.9 and printed with one decimal, like any task of this project that
has no natural one-digit scale. Names and labels are plain words.

``own_name_tasks`` are what a newcomer brings: fields called as nobody foresaw, several outputs, ``Literal``, ``bool``
and ``int`` outputs, sentences. Their names and labels never occur in episodes (``worlds.OWN_TASK_WORDS``), and every
task is separable: its rows are decided by well parted blobs, by a threshold or by the words of a sentence.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal, cast

import dspy
import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits, make_blobs, make_classification, make_moons
from sklearn.decomposition import PCA

from copa_harness.lm.embedded.pretrain.measure import ClassificationTask, Record

_FIELDS = ("stem_height", "stem_depth", "leaf_height", "leaf_depth")
_LABELS = ("lumora", "saltern", "verdigris")


def scaled(features: npt.NDArray[np.float64], train: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Columns mapped to 0.0 .. 9.9 by the training rows' minimum and maximum, one decimal."""
    low, high = features[train].min(0), features[train].max(0)
    share = np.clip((features - low) / np.maximum(high - low, 1e-9), 0, 1)
    return np.asarray(np.round(share * 9.9, 1), np.float64)


def split_task(
    name: str,
    features: npt.NDArray[np.float64],
    classes: npt.NDArray[np.int64],
    *,
    seed: int,
    fields: tuple[str, ...] = _FIELDS,
    labels: tuple[str, ...] = _LABELS,
    instruction: str = "Classify the record.",
    scale: bool = True,
) -> ClassificationTask:
    """75 training and 75 test rows by a seeded permutation."""
    order = np.random.RandomState(seed).permutation(len(classes))
    train, test = order[:75], order[75:150]
    printed = scaled(features, train) if scale else np.round(features, 1)
    labels = labels[: int(classes.max()) + 1]

    def rows(indices: npt.NDArray[np.int64]) -> tuple[tuple[tuple[float, ...], str], ...]:
        return tuple((tuple(float(v) for v in printed[i]), labels[classes[i]]) for i in indices)

    return ClassificationTask(name, fields[: features.shape[1]], labels, instruction, rows(train), rows(test))


def development_tasks(seed: int) -> list[ClassificationTask]:
    """Four tasks at one split seed."""
    blobs, blob_classes = make_blobs(150, n_features=4, centers=3, cluster_std=2.2, random_state=100 + seed)
    hard, hard_classes = make_classification(
        150,
        n_features=4,
        n_informative=4,
        n_redundant=0,
        n_classes=3,
        n_clusters_per_class=1,
        class_sep=1.4,
        random_state=200 + seed,
    )
    moons, moon_classes = make_moons(150, noise=0.15, random_state=300 + seed)
    digits = load_digits()
    chosen = np.isin(digits.target, (0, 3, 7) if seed % 2 else (1, 4, 8))
    components = PCA(4, random_state=0).fit_transform(digits.data[chosen])
    digit_classes = np.unique(digits.target[chosen], return_inverse=True)[1]
    return [
        split_task("blobs", blobs, blob_classes, seed=seed),
        split_task("classification", hard, hard_classes, seed=seed, labels=("amber", "slate", "umber")),
        split_task("moons", moons, moon_classes, seed=seed, fields=("north_gap", "east_gap")),
        split_task(
            "digits", components, digit_classes, seed=seed, fields=("stroke_one", "stroke_two", "loop_one", "loop_two")
        ),
    ]


@dataclass(frozen=True, slots=True)
class OwnTask:
    """A DSPy signature with rows of its fields.

    Attributes:
        name: For tables.
        program: The signature.
        train, test: Rows, inputs and outputs together.
    """

    name: str
    program: type[dspy.Signature]
    train: tuple[Record, ...]
    test: tuple[Record, ...]


_TICKET_WORDS = {
    "billing": ("invoice", "refund", "charged", "payment"),
    "shipping": ("parcel", "courier", "late", "tracking"),
    "login": ("password", "locked", "account", "browser"),
}
_TICKET_FRAMES = (
    "please look at my {0} again",
    "there is something wrong with the {0}",
    "the {0} does not work and nobody helps",
    "why is my {0} not here yet",
    "hello, i have a problem: {0} and {1}",
    "{0} again, and the {1} too",
    "I was told that the {0} is fine.",
)


def own_name_tasks(seed: int) -> list[OwnTask]:
    """Seven tasks at one split seed; 75 training and 75 test rows each."""
    text, number = (str, dspy.InputField()), (float, dspy.InputField())
    labels = tuple(_TICKET_WORDS)
    roasts = ("pale", "dusky", "charred", "mahogany")
    tickets = _tickets(seed)
    queue = (str, dspy.OutputField(desc="billing, shipping, or login"))
    level = {label: i + 1 for i, label in enumerate(labels)}
    beans, bean_classes = _blobs(seed, 3, 4)
    tank, tank_classes = _blobs(seed + 50, 2, 2)
    parts, part_classes = _blobs(seed + 70, 2, 3)
    rng = random.Random(seed)
    notes = [rng.choice(["checked twice", "new shift", "from the second line", "no remarks"]) for _ in range(150)]
    return [
        _own("tickets", {"ticket": text, "queue": queue}, [{"ticket": t, "queue": q} for t, q in tickets]),
        _own(
            "tickets, two outputs",
            {"ticket": text, "queue": queue, "severity": (int, dspy.OutputField(desc="1 to 3"))},
            [{"ticket": t, "queue": q, "severity": level[q]} for t, q in tickets],
        ),
        _own(
            "tickets, three outputs",
            {
                "ticket": text,
                "department": (Literal["finance", "logistics", "helpdesk"], dspy.OutputField()),
                "escalate": (bool, dspy.OutputField()),
                "stars": (int, dspy.OutputField(desc="2, 4, or 5")),
            },
            [
                {
                    "ticket": t,
                    "department": ("finance", "logistics", "helpdesk")[level[q] - 1],
                    "escalate": q == "billing",
                    "stars": (5, 2, 4)[level[q] - 1],
                }
                for t, q in tickets
            ],
        ),
        _own(
            "beans",
            {
                "aroma": number,
                "crispness": number,
                "bitterness": number,
                "roast": (cast("Any", Literal[roasts]), dspy.OutputField()),
            },
            [
                {"aroma": a, "crispness": b, "bitterness": c, "roast": roasts[k]}
                for (a, b, c), k in zip(beans, bean_classes, strict=True)
            ],
        ),
        _own(
            "tank",
            {
                "turbidity": number,
                "salinity": number,
                "verdict": (str, dspy.OutputField(desc="clean or cloudy")),
                "hazardous": (bool, dspy.OutputField(desc="whether salinity is high")),
            },
            [
                {"turbidity": a, "salinity": b, "verdict": ("clean", "cloudy")[k], "hazardous": b > 5}
                for (a, b), k in zip(tank, tank_classes, strict=True)
            ],
        ),
        _own(
            "parts",
            {
                "inspector_remark": text,
                "thickness": number,
                "gap_mm": number,
                "hazard_level": (int, dspy.OutputField()),
            },
            [
                {"inspector_remark": note, "thickness": a, "gap_mm": b, "hazard_level": int(k) + 1}
                for note, (a, b), k in zip(notes, parts, part_classes, strict=True)
            ],
        ),
        _own(
            "alarm",
            {"turbidity": number, "thickness": number, "is_escalated": (bool, dspy.OutputField())},
            [
                {"turbidity": a, "thickness": b, "is_escalated": bool(k)}
                for (a, b), k in zip(tank, tank_classes, strict=True)
            ],
        ),
    ]


def _own(name: str, fields: dict[str, Any], rows: list[Record]) -> OwnTask:
    program = cast("type[dspy.Signature]", dspy.Signature(fields, f"Handle the {name.split(',')[0]}."))
    return OwnTask(name, program, tuple(rows[:75]), tuple(rows[75:150]))


def _blobs(seed: int, n_features: int, n_classes: int) -> tuple[list[tuple[float, ...]], npt.NDArray[np.int64]]:
    """150 rows of well parted blobs, printed like the other development tasks."""
    box = np.random.RandomState(400 + seed)
    while True:
        centres = box.uniform(-10, 10, (n_classes, n_features))
        gaps = [np.linalg.norm(centres[a] - centres[b]) for a in range(n_classes) for b in range(a)]
        if min(gaps) > 8:
            break
    features, classes = make_blobs(150, centers=centres, cluster_std=1.2, random_state=400 + seed)
    printed = scaled(features, np.arange(75))
    return [tuple(float(value) for value in row) for row in printed], classes


def _tickets(seed: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    made: list[tuple[str, str]] = []
    for _ in range(150):
        label = rng.choice(list(_TICKET_WORDS))
        made.append((rng.choice(_TICKET_FRAMES).format(*rng.sample(_TICKET_WORDS[label], 2)), label))
    return made
