"""A program of two stages on real data: the grape of a wine, by way of how heavy the wine is.

Stage `body` says from alcohol and colour whether a wine is light or full; stage `grape` names the grape from that word,
printed as a number, and two more measurements. Neither stage suffices alone: without the body Grignolino is mixed up
with its neighbours, and the body does not tell Barolo from Barbera. The training rows say what each stage should have
answered; the metric looks at the last answer only. scikit-learn and DSPy are imported when the task is made, not
before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from copa_harness.tasks.tabular import (
    N_TEST,
    N_TRAIN,
    N_VAL,
    draw_splits,
    exact_match,
    read_table,
    scaled_by,
    without_lookalikes,
)
from copa_harness.tasks.task import Task

if TYPE_CHECKING:
    import dspy

GRAPES = ("barolo", "grignolino", "barbera")
BODIES = ("full", "light", "full")
"""Of each grape: Grignolino is the light one of the three."""

SCORES = {"light": "1.0", "full": "9.0"}
"""How the second stage reads the body: number fields take numbers. Any other word counts as `UNSURE`."""

UNSURE = "5.0"

_STAGE_1, _STAGE_2 = ("alcohol", "color_intensity"), ("flavanoids", "hue")


def staged_wine(seed: int = 0, *, n_train: int = N_TRAIN, n_val: int = N_VAL, n_test: int = N_TEST) -> Task:
    """The grape a wine was made from, in two stages (Forina; 178 rows, 3 classes, 2 predictors).

    Four columns are used, each scaled to 0.0-9.9 by the minimum and maximum of the training rows (values outside are
    clipped) and printed with one decimal. Examples hold, besides the inputs and the `answer`, what the stages between
    should say: `type` ("light" or "full") and its printed number `body`.

    Args:
        seed: Chooses the split; the same seed gives the same rows on every machine.
        n_train: Training rows.
        n_val: Validation rows.
        n_test: Test rows; fewer when fewer remain.
    """
    import dspy
    from sklearn.datasets import load_wine

    table = read_table(load_wine(), GRAPES).columns((*_STAGE_1, *_STAGE_2))
    raw = [tuple(row) for row in table.values.tolist()]
    train, val, test, spare = draw_splits(
        raw, table.classes, sizes=(n_train, n_val, n_test), rng=np.random.default_rng(seed)
    )
    printed = [tuple(f"{value:.1f}" for value in row) for row in scaled_by(table.values, train).tolist()]
    val, test = without_lookalikes(printed, table.classes, train, val, test, spare)

    def example(row: int) -> dspy.Example:
        kind = int(table.classes[row])
        inputs = dict(zip(table.names, printed[row], strict=True))
        body = BODIES[kind]
        return dspy.Example(**inputs, type=body, body=SCORES[body], answer=GRAPES[kind]).with_inputs(*table.names)

    trainset, valset, testset = ([example(row) for row in rows] for rows in (train, val, test))
    description = "Predict the grape of a wine in two stages: how heavy it is, then what it was made from."
    return Task("staged_wine", staged_program(), exact_match, trainset, valset, testset, description=description)


def staged_program() -> dspy.Module:
    """The program of `staged_wine`: predictors `style` and `grape`, with a line of Python between them."""
    import dspy

    class StagedWine(dspy.Module):
        """Body first, then grape."""

        def __init__(self) -> None:
            super().__init__()
            self.style = dspy.Predict(
                _signature(
                    _STAGE_1,
                    "type",
                    "light or full",
                    "Given the alcohol and colour of a wine, each scaled to 0-9.9, predict its type.",
                )
            )
            self.grape = dspy.Predict(
                _signature(
                    ("body", *_STAGE_2),
                    "answer",
                    "barolo, grignolino, or barbera",
                    "Given the body of a wine, its flavanoids and its hue, each scaled to 0-9.9, predict its grape.",
                )
            )

        def forward(self, alcohol: str, color_intensity: str, flavanoids: str, hue: str) -> dspy.Prediction:
            found = self.style(alcohol=alcohol, color_intensity=color_intensity)
            body = SCORES.get(str(found.type).strip().casefold(), UNSURE)
            answered: dspy.Prediction = self.grape(body=body, flavanoids=flavanoids, hue=hue)
            return answered

    return StagedWine()


def _signature(inputs: tuple[str, ...], output: str, description: str, instructions: str) -> type[dspy.Signature]:
    import dspy

    fields: dict[str, tuple[type, object]] = {name: (str, dspy.InputField()) for name in inputs}
    fields[output] = (str, dspy.OutputField(desc=description))
    made: type[dspy.Signature] = dspy.Signature(fields, instructions)
    return made
