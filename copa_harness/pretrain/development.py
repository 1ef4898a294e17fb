"""What choices are made on: the model's figures on the held-out development tasks, as Markdown for the card.

Demonstrations in every prompt form, and how faithfully a stated two-clause rule is followed (accuracy against the
rule's own answers, so that a bad rule cannot hide a bad reader). This module knows nothing of the tasks in ``suites/``.
"""

from __future__ import annotations

import numpy as np

from copa_harness.pretrain.devtasks import development_tasks
from copa_harness.pretrain.measure import ClassificationTask, Form, MeasuredModel, Record, best_demos, record, signature

FORMS: tuple[Form, ...] = ("float_fields", "str_fields", "single")


def median_rule(task: ClassificationTask) -> tuple[str, list[str]]:
    """A rule with the training medians of the first two fields, and what it answers on the test rows."""
    values = np.array([row for row, _ in task.train])
    first, second = (float(np.round(np.median(values[:, column]), 1)) for column in (0, 1))
    a, b, c = (*task.labels, task.labels[0])[:3]
    text = (
        f"If {task.fields[0]} is below {first:.1f} answer {a}, otherwise if {task.fields[1]} is below {second:.1f} "
        f"answer {b}, otherwise answer {c}."
    )
    return text, [a if row[0] < first else b if row[1] < second else c for row, _ in task.test]


def development_table(model: MeasuredModel, *, seeds: tuple[int, ...]) -> str:
    """One line per task and form, means over ``seeds``."""
    lines = [
        "| task | form | zero-shot | best of 10 sets of 9 demonstrations | stated rule followed | unparsed |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for index in range(len(development_tasks(seeds[0]))):
        for form in FORMS:
            figures = np.array([_figures(model, development_tasks(seed)[index], form, seed=seed) for seed in seeds])
            name = development_tasks(seeds[0])[index].name
            zero, demos, rule, unparsed = figures.mean(0)
            lines.append(f"| {name} | {form} | {zero:.3f} | {demos:.3f} | {rule:.3f} | {unparsed:.1%} |")
    return "\n".join(lines) + f"\n\nMeans over split seeds {', '.join(map(str, seeds))}; 75 test rows each.\n"


def _figures(
    model: MeasuredModel, task: ClassificationTask, form: Form, *, seed: int
) -> tuple[float, float, float, float]:
    program = signature(task, form)
    train: list[Record] = [record(task, form, row) for row in task.train]
    test: list[Record] = [record(task, form, row) for row in task.test]
    zero, unparsed = model.accuracy(program, [], test)
    demos = best_demos(model, program, train[:50], train[50:], n_demos=9, n_sets=10, seed=seed)
    with_demos, _ = model.accuracy(program, demos, test)
    text, wanted = median_rule(task)
    answers = model.answers(signature(task, form, instruction=text), [], test)
    followed = float(np.mean([answer == label for answer, label in zip(answers, wanted, strict=True)]))
    return zero, with_demos, followed, unparsed
