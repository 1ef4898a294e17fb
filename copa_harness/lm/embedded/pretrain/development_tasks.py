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
from typing import Any, Literal, cast

import dspy
import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits, make_blobs, make_classification, make_moons
from sklearn.decomposition import PCA

from copa_harness.lm.embedded.pretrain.measure import MeasuredTask, Record

Form = Literal["float_fields", "str_fields", "single"]
FORMS: tuple[Form, ...] = ("float_fields", "str_fields", "single")

_FIELDS = ("stem_height", "stem_depth", "leaf_height", "leaf_depth")
_STROKES = ("stroke_one", "stroke_two", "loop_one", "loop_two")
_LABELS = ("lumora", "saltern", "verdigris")


def scaled(features: npt.NDArray[np.float64], train: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Columns mapped to 0.0 .. 9.9 by the training rows' minimum and maximum, one decimal."""
    low, high = features[train].min(0), features[train].max(0)
    share = np.clip((features - low) / np.maximum(high - low, 1e-9), 0, 1)
    return np.asarray(np.round(share * 9.9, 1), np.float64)


def _split(
    name: str,
    form: Form,
    features: npt.NDArray[np.float64],
    classes: npt.NDArray[np.int64],
    *,
    seed: int,
    fields: tuple[str, ...] = _FIELDS,
    labels: tuple[str, ...] = _LABELS,
) -> MeasuredTask:
    """75 training and 75 test rows by a seeded permutation, and a rule with the training medians of two fields."""
    order = np.random.RandomState(seed).permutation(len(classes))
    train, test = order[:75], order[75:150]
    values = scaled(features, train)
    fields, labels = fields[: features.shape[1]], labels[: int(classes.max()) + 1]

    def record(i: int) -> Record:
        printed = {field: f"{value:.1f}" for field, value in zip(fields, values[i], strict=True)}
        if form == "single":
            shown: Record = {"features": ", ".join(f"{field}={value}" for field, value in printed.items())}
        else:
            shown = {field: float(value) if form == "float_fields" else value for field, value in printed.items()}
        return shown | {"answer": labels[classes[i]]}

    first, second = (float(np.round(np.median(values[train, column]), 1)) for column in (0, 1))
    a, b, c = (*labels, labels[0])[:3]
    rule = (
        f"If {fields[0]} is below {first:.1f} answer {a}, otherwise if {fields[1]} is below {second:.1f} answer {b}, "
        f"otherwise answer {c}."
    )
    ruled = tuple(a if values[i, 0] < first else b if values[i, 1] < second else c for i in test)
    names, kind = (("features",), str) if form == "single" else (fields, float if form == "float_fields" else str)
    described = ", ".join(labels[:-1]) + (", or " if len(labels) > 2 else " or ") + labels[-1]
    given: dict[str, Any] = {name: (kind, dspy.InputField()) for name in names}
    program = dspy.Signature(given | {"answer": (str, dspy.OutputField(desc=described))}, "Classify the record.")
    rows = [record(i) for i in order[:150]]
    return MeasuredTask(name, cast("type[dspy.Signature]", program), rows[:75], rows[75:], rule, ruled)


def development_tasks(seed: int, form: Form = "float_fields") -> list[MeasuredTask]:
    """Four tasks at one split seed; ``form`` is how features are laid out."""
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
        _split("blobs", form, blobs, blob_classes, seed=seed),
        _split("classification", form, hard, hard_classes, seed=seed, labels=("amber", "slate", "umber")),
        _split("moons", form, moons, moon_classes, seed=seed, fields=("north_gap", "east_gap")),
        _split("digits", form, components, digit_classes, seed=seed, fields=_STROKES),
    ]


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


def own_name_tasks(seed: int) -> list[MeasuredTask]:
    """Seven tasks at one split seed; 75 training and 75 test rows each."""
    text, number = (str, dspy.InputField()), (float, dspy.InputField())
    labels, departments = tuple(_TICKET_WORDS), ("finance", "logistics", "helpdesk")
    roasts = ("pale", "dusky", "charred", "mahogany")
    tickets = _tickets(seed)
    queue = (str, dspy.OutputField(desc="billing, shipping, or login"))
    level = {label: i + 1 for i, label in enumerate(labels)}
    beans, tank, parts = _blobs(seed, 3, 4), _blobs(seed + 50, 2, 2), _blobs(seed + 70, 2, 3)
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
                "department": (Literal[departments], dspy.OutputField()),
                "escalate": (bool, dspy.OutputField()),
                "stars": (int, dspy.OutputField(desc="2, 4, or 5")),
            },
            [
                {
                    "ticket": t,
                    "department": departments[level[q] - 1],
                    "escalate": q == "billing",
                    "stars": (5, 2, 4)[level[q] - 1],
                }
                for t, q in tickets
            ],
        ),
        _own(
            "beans",
            {
                **dict.fromkeys(("aroma", "crispness", "bitterness"), number),
                "roast": (Literal[roasts], dspy.OutputField()),
            },
            [{"aroma": a, "crispness": b, "bitterness": c, "roast": roasts[k]} for (a, b, c), k in beans],
        ),
        _own(
            "tank",
            {
                **dict.fromkeys(("turbidity", "salinity"), number),
                "verdict": (str, dspy.OutputField(desc="clean or cloudy")),
                "hazardous": (bool, dspy.OutputField(desc="whether salinity is high")),
            },
            [
                {"turbidity": a, "salinity": b, "verdict": ("clean", "cloudy")[k], "hazardous": b > 5}
                for (a, b), k in tank
            ],
        ),
        _own(
            "parts",
            {
                "inspector_remark": text,
                **dict.fromkeys(("thickness", "gap_mm"), number),
                "hazard_level": (int, dspy.OutputField()),
            },
            [
                {"inspector_remark": note, "thickness": a, "gap_mm": b, "hazard_level": int(k) + 1}
                for note, ((a, b), k) in zip(notes, parts, strict=True)
            ],
        ),
        _own(
            "alarm",
            {**dict.fromkeys(("turbidity", "thickness"), number), "is_escalated": (bool, dspy.OutputField())},
            [{"turbidity": a, "thickness": b, "is_escalated": bool(k)} for (a, b), k in tank],
        ),
    ]


def _own(name: str, fields: dict[str, Any], rows: list[Record]) -> MeasuredTask:
    program = cast("type[dspy.Signature]", dspy.Signature(fields, f"Handle the {name.split(',')[0]}."))
    return MeasuredTask(name, program, rows[:75], rows[75:150])


def _blobs(seed: int, n_features: int, n_classes: int) -> list[tuple[tuple[float, ...], int]]:
    """150 rows of well parted blobs and their classes, printed like the other development tasks."""
    box = np.random.RandomState(400 + seed)
    while True:
        centres = box.uniform(-10, 10, (n_classes, n_features))
        gaps = [np.linalg.norm(centres[a] - centres[b]) for a in range(n_classes) for b in range(a)]
        if min(gaps) > 8:
            break
    features, classes = make_blobs(150, centers=centres, cluster_std=1.2, random_state=400 + seed)
    printed = scaled(features, np.arange(75))
    return [(tuple(map(float, row)), int(k)) for row, k in zip(printed, classes, strict=True)]


def _tickets(seed: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    made: list[tuple[str, str]] = []
    for _ in range(150):
        label = rng.choice(list(_TICKET_WORDS))
        made.append((rng.choice(_TICKET_FRAMES).format(*rng.sample(_TICKET_WORDS[label], 2)), label))
    return made
