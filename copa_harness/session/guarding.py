"""The leakage guard of a run: what of the test split was seen by the optimizer or stands in the prompt.

Collects the inputs of the splits and of the demonstrations; the comparison is `judge`'s. Knows nothing of records or
pytest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import dspy

    from copa_harness.judge.leakage import LeakageReport
    from copa_harness.tasks.task import Task


def leakage_of(task: Task, program: dspy.Module | None = None) -> LeakageReport:
    """What of the task's test split was seen: in training and validation, or in a program's demonstrations.

    Args:
        task: The splits.
        program: The program about to be evaluated; its demonstrations count as seen.
    """
    from copa_harness.evaluate.examples import example_ids, input_values
    from copa_harness.judge.leakage import find_leakage

    def inputs(examples: Any) -> dict[str, dict[str, Any]]:
        return dict(zip(example_ids(examples), map(input_values, examples), strict=True))

    test = inputs(task.testset)
    fields = {name for values in test.values() for name in values}
    seen: dict[str, Mapping[str, Mapping[str, Any]]] = {
        "train": inputs(task.trainset), "validation": inputs(task.valset),
    }  # fmt: skip
    if program is not None:
        seen["demonstrations"] = {
            f"{name}[{position}]": shown
            for name, predictor in program.named_predictors()
            for position, demo in enumerate(predictor.demos)
            if (shown := {key: value for key, value in dict(demo).items() if key in fields})
        }
    return find_leakage(test, seen=seen)
