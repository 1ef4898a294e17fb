"""CLINC150: what a customer of a voice assistant wants, as short text classification with few labelled rows.

Larson et al. 2019, "An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction" (EMNLP), CC BY 3.0:
150 intents of 10 domains, 100 training, 20 validation and 30 test sentences each, and sentences of no intent. The file
is not shipped: `clinc150(path=...)` reads the authors' `data_small.json` or `data_full.json`
(https://github.com/clinc/oos-eval), and without a path the data set `clinc/clinc_oos` is loaded by `datasets`.
DSPy is imported when the task is made, not before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from copa_harness.errors import TaskError
from copa_harness.tasks.rows import draw_evenly, from_hub
from copa_harness.tasks.task import Task

if TYPE_CHECKING:
    import dspy

FILE_VARIABLE = "COPA_CLINC150"
"""Environment variable with the path of the file, where no path is given."""

INTENTS: tuple[str, ...] = (
    "balance",
    "book_flight",
    "calculator",
    "calories",
    "cancel_reservation",
    "card_declined",
    "change_language",
    "definition",
    "exchange_rate",
    "flight_status",
)
"""Ten intents of several domains, the default."""

OUT_OF_SCOPE = "out_of_scope"

Rows = Mapping[str, Sequence[tuple[str, str]]]
"""Split -> (text, intent); splits `train`, `val`, `test`."""


def same_intent(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
    """1.0 when the predicted intent is the example's, letter case and outer spaces aside; else 0.0."""
    return float(str(prediction.intent).strip().casefold() == str(example.intent).casefold())


def clinc150(
    path: Path | str | None = None,
    *,
    intents: int | Sequence[str] = INTENTS,
    out_of_scope: bool = False,
    seed: int = 0,
    n_train: int = 40,
    n_val: int = 24,
    n_test: int = 60,
) -> Task:
    """The intent of a sentence: a program of one predictor, `text -> intent`, typed with the intents in question.

    Training, validation and test rows come from the data set's own splits, as evenly over the intents as they can be,
    and no sentence is in two of them.

    Args:
        path: The authors' JSON file; by default what the environment variable `COPA_CLINC150` names, else the data
            set `clinc/clinc_oos` by `datasets` (from its cache or the network).
        intents: Which intents, by name, or the first so many in alphabetical order; 150 takes all.
        out_of_scope: Whether sentences of no intent are among the rows, as `out_of_scope`.
        seed: Chooses the rows; the same seed gives the same rows on every machine.
        n_train: Training rows.
        n_val: Validation rows.
        n_test: Test rows.

    Raises:
        TaskError: The data cannot be had or read, an intent is unknown, or there are fewer rows than asked for.
    """
    import dspy

    rows = _read_file(Path(path)) if (path := path or os.environ.get(FILE_VARIABLE)) else _from_hub()
    labels = _labels(rows, intents, out_of_scope=out_of_scope)
    rng = np.random.default_rng(seed)
    seen: set[str] = set()
    splits = []
    for split, n_rows in (("test", n_test), ("train", n_train), ("val", n_val)):  # test rows stay when others change
        drawn = draw_evenly(rows[split], labels, n_rows, seen=seen, rng=rng, what=f"clinc150: {split}")
        splits.append([dspy.Example(text=text, intent=intent).with_inputs("text") for text, intent in drawn])
    test, train, val = splits
    fields = {
        "text": (str, dspy.InputField(desc="what the customer says")),
        "intent": (Literal[labels], dspy.OutputField(desc="what the customer wants")),
    }
    signature = dspy.Signature(fields, "Say what the customer of a voice assistant wants.")
    return Task(
        "clinc150",
        dspy.Predict(signature),
        same_intent,
        train,
        val,
        test,
        description=f"the intent of a sentence, one of {len(labels)}",
    )


def _read_file(path: Path) -> Rows:
    """The rows of the authors' file.

    Raises:
        TaskError: It is missing, or is not one.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TaskError(
            f"clinc150: cannot read {path} ({error.strerror or error}); expected data_small.json or data_full.json of "
            f"https://github.com/clinc/oos-eval, as path=... or in the environment variable {FILE_VARIABLE}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise TaskError(f"clinc150: {path} is not JSON ({error}); expected the authors' data_small.json") from error
    rows = {}
    for split in ("train", "val", "test"):
        found = document.get(split) if isinstance(document, dict) else None
        pairs = [*found, *document.get(f"oos_{split}", [])] if isinstance(found, list) else None
        if pairs is None or not all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair) for pair in pairs
        ):
            raise TaskError(f"clinc150: {path} has no list {split!r} of [text, intent]; expected the authors' file")
        rows[split] = [(text, OUT_OF_SCOPE if intent == "oos" else intent) for text, intent in pairs]
    return rows


def _from_hub() -> Rows:
    """The rows of `clinc/clinc_oos`, configuration `small`.

    Raises:
        TaskError: `datasets` is not installed, or the data set is neither cached nor reachable.
    """
    file = f"path=... or the environment variable {FILE_VARIABLE} with data_small.json of github.com/clinc/oos-eval"
    loaded = from_hub("clinc/clinc_oos", "small", task="clinc150", file=file)
    names = loaded["train"].features["intent"].names
    return {
        ours: [(row["text"], OUT_OF_SCOPE if names[row["intent"]] == "oos" else names[row["intent"]]) for row in part]
        for ours, part in (("train", loaded["train"]), ("val", loaded["validation"]), ("test", loaded["test"]))
    }


def _labels(rows: Rows, intents: int | Sequence[str], *, out_of_scope: bool) -> tuple[str, ...]:
    known = sorted({intent for _, intent in rows["train"]} - {OUT_OF_SCOPE})
    if isinstance(intents, int):
        if not 2 <= intents <= len(known):
            raise TaskError(f"clinc150: got intents={intents}; expected 2 to {len(known)}, or a list of names")
        chosen = known[:intents]
    else:
        chosen = sorted(set(intents))
        if unknown := sorted(set(chosen) - set(known)):
            raise TaskError(f"clinc150: unknown intents {', '.join(unknown)}; expected some of {', '.join(known)}")
        if len(chosen) < 2:
            raise TaskError(f"clinc150: got {len(chosen)} intents; expected at least 2")
    return (*chosen, OUT_OF_SCOPE) if out_of_scope else tuple(chosen)
