"""What a run did and what its model can do, as the tables of the model card (``README.md`` of the shipped model).

No figure of the card is typed by hand. Settings are fixed in ``SETTINGS``, chosen on ``development_tasks`` before the
three real tasks were looked at.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from copa_harness.lm.embedded.pretrain.development_tasks import FORMS, development_tasks, own_name_tasks
from copa_harness.lm.embedded.pretrain.measure import LoraSettings, MeasuredModel, MeasuredTask, best_demos, with_lora
from copa_harness.report.rendering import draw

N_DEMOS, N_SETS = 9, 10
SHORT = LoraSettings(epochs=6, learning_rate=3e-3, batch_size=16, n_demos=0)
LONG = dataclasses.replace(SHORT, epochs=20)
IRIS_RULE = (
    "If petal_length is below 2.5 answer setosa, otherwise if petal_width is below 1.7 answer versicolor, "
    "otherwise answer virginica."
)
REAL_TASKS = ("iris", "wine", "breast_cancer")


def run_tables(folder: pathlib.Path) -> str:
    """What a run's folder says of the run: its size, its stages, and its accuracies while it trained."""
    run = json.loads((folder / "run.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    picked = [log[i] for i in sorted({*range(0, len(log), max(1, len(log) // 12)), len(log) - 1})]
    keys = ("loss", "name_tokens", "demos_turns_4_7", "demos_turns_8_on", "text_turns_8_on", "rule_turn_0")
    return "\n".join(
        [
            f"{run['steps']:,} steps, {run['tokens']:,} tokens, {run['wall_s'] / 60:.0f} minutes on {run['cpu_count']} "
            f"cores ({run['platform']}), torch {run['versions']['torch']}, Python {run['python']}, commit "
            f"{run.get('commit', 'unknown')}; started from {run['started_from'] or 'nothing'}.",
            "",
            _table("stage|steps|rows x tokens", (_stage_cells(stage) for stage in run["recipe"]["stages"])),
            "",
            _table(
                "step|stage|loss|names|demos, 4-7 earlier|demos, 8 or more|sentences, 8 or more|stated rule",
                (
                    [line["step"], line["stage"], *(f"{line[key]:.3f}" if key in line else "" for key in keys)]
                    for line in picked
                ),
            ),
            "",
        ]
    )


def _stage_cells(stage: dict[str, Any]) -> list[Any]:
    shape, partner = f"{stage['rows']} x {stage['tokens']}", stage["partner"]
    if partner:
        shape += f", every second step {partner['rows']} x {partner['tokens']} (stated rules)"
    return [stage["name"], stage["steps"], shape]


def own_name_table(model: MeasuredModel, *, seeds: Sequence[int]) -> str:
    """One line per own-name task, means over ``seeds``; an answer is right when all its outputs are."""
    rows = []
    for index, task in enumerate(own_name_tasks(seeds[0])):
        figures = np.array([_own_figures(model, own_name_tasks(seed)[index], seed=seed) for seed in seeds])
        outputs = ", ".join(f"`{name}`" for name in task.program.output_fields)
        rows.append([task.name, outputs, *_means(figures[:, :, 0]), f"{1 - figures[:, :, 1].max():.1%}"])
    return _table("task|outputs|zero-shot|demonstrations|LoRA, long|parsed, worst", rows)


def _own_figures(model: MeasuredModel, task: MeasuredTask, *, seed: int) -> list[tuple[float, float]]:
    tuned = with_lora(model, task.program, task.train, LONG, seed=seed)
    return [*_prompted(model, task, seed=seed), tuned.accuracy(task.program, [], task.test)]


def _prompted(model: MeasuredModel, task: MeasuredTask, *, seed: int) -> list[tuple[float, float]]:
    """Accuracy and share that does not parse, zero-shot and with the best demonstrations."""
    pool, validation = task.train[:50], task.train[50:]
    demos = best_demos(model, task.program, pool, validation, n_demos=N_DEMOS, n_sets=N_SETS, seed=seed)
    return [model.accuracy(task.program, shown, task.test) for shown in ([], demos)]


def development_table(model: MeasuredModel, *, seeds: Sequence[int]) -> str:
    """One line per development task and form, means over ``seeds``; the rule is held against its own answers."""
    rows = []
    for index, first in enumerate(development_tasks(seeds[0])):
        for form in FORMS:
            figures = []
            for seed in seeds:
                task = development_tasks(seed, form)[index]
                zero, shown = _prompted(model, task, seed=seed)
                answers = model.answers(task.program.with_instructions(task.rule), [], task.test)
                followed = np.mean([answer == said for answer, said in zip(answers, task.ruled, strict=True)])
                figures.append((zero[0], shown[0], float(followed), zero[1]))
            rows.append([first.name, form, *_means(figures)])
    return _table("task|form|zero-shot|demonstrations|stated rule followed|unparsed", rows)


def real_table(model: MeasuredModel, *, seeds: Sequence[int]) -> str:
    """Iris, Wine and Breast Cancer: 75 labelled rows, up to 75 test rows, means over ``seeds``."""
    from copa_harness import tasks

    rows, rule = [], []
    for name in REAL_TASKS:
        figures = []
        for seed in seeds:
            task = getattr(tasks, name)(seed, form="fields", n_train=50, n_val=25)
            train, test = ([dict(row.items()) for row in part] for part in (task.trainset + task.valset, task.testset))
            measured = MeasuredTask(name, task.program.signature, train, test)
            demos = best_demos(
                model, measured.program, train[:50], train[50:], n_demos=N_DEMOS, n_sets=N_SETS, seed=seed
            )
            found = [model.accuracy(measured.program, shown, test)[0] for shown in ([], demos)]
            both = dataclasses.replace(SHORT, n_demos=N_DEMOS)
            for settings, shown in ((SHORT, []), (LONG, []), (both, demos)):
                tuned = with_lora(model, measured.program, train, settings, seed=seed)
                found.append(tuned.accuracy(measured.program, shown, test)[0])
            figures.append(found)
            if name == "iris":
                rule.append(model.accuracy(measured.program.with_instructions(IRIS_RULE), [], test)[0])
        rows.append([name, *_means(figures)])
    table = _table("task|zero-shot|demonstrations|LoRA, short|LoRA, long|both, short", rows)
    return f"{table}\n\nIris with its rule in the instruction, zero-shot: {np.mean(rule):.3f}."


def write_figures(model: MeasuredModel, folder: pathlib.Path, *, seeds: Sequence[int]) -> pathlib.Path:
    """Write all tables into a run's folder; minutes per seed."""
    parts = [
        run_tables(folder),
        own_name_table(model, seeds=seeds),
        development_table(model, seeds=seeds),
        real_table(model, seeds=seeds),
        f"Means over split seeds {', '.join(map(str, seeds))}; 75 test rows each.",
    ]
    path = folder / "figures.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def _means(figures: Any) -> list[str]:
    return [f"{mean:.3f}" for mean in np.mean(figures, axis=0)]


def _table(titles: str, rows: Iterable[Sequence[Any]]) -> str:
    """Markdown, the first column left-aligned."""
    drawn = [[str(cell) for cell in row] for row in rows]
    return draw(drawn, titles.split("|"), style="markdown", n_text=1)
