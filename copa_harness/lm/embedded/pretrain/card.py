"""The model card of the shipped files, written from the run's own manifest, log and evaluation cells.

No figure is typed by hand. ``development_table`` measures what choices are made on: the held-out development tasks,
with demonstrations in every prompt form, and how faithfully a stated two-clause rule is followed (accuracy against the
rule's own answers, so that a bad rule cannot hide a bad reader).
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from typing import Any

import numpy as np

from copa_harness.atomic_files import write_atomic
from copa_harness.lm.embedded.pretrain.development_tasks import OwnTask, development_tasks, own_name_tasks
from copa_harness.lm.embedded.pretrain.evaluate import IRIS_RULE, SETTINGS, read_cells, table, targets
from copa_harness.lm.embedded.pretrain.measure import (
    ClassificationTask,
    Form,
    LoraSettings,
    MeasuredModel,
    Record,
    best_demos,
    record,
    signature,
    with_lora,
)
from copa_harness.lm.embedded.pretrain.recipe import FOUNDATION

SHIPPED_FILES = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)

FOUNDATION_WEIGHTS = "12d77626bd027b47b5132ede2569dc97ff78705623c8fb480e06d605825628f7"
"""SHA-256 of the model.safetensors that the first run made and this package shipped before the second one."""

FORMS: tuple[Form, ...] = ("float_fields", "str_fields", "single")

_HEAD = """---
license: apache-2.0
library_name: transformers
tags: [dspy, in-context-learning, from-scratch]
---

# The embedded model of copa-harness

A very small Llama decoder ({parameters:,} parameters) with its own tokenizer ({vocabulary:,} tokens), trained from
scratch by `python -m copa_harness.lm.embedded.pretrain train` on synthetic in-context classification episodes,
rendered byte for byte as `dspy.ChatAdapter` renders them. It exists so that prompts, demonstrations and LoRA weights
all really move a score on any machine within seconds. It knows no language and no facts; it is no general language
model.

Load it with plain `AutoModelForCausalLM` / `AutoTokenizer`; pad on the left; it stops at `<|end|>`.
"""

_FOUNDATION = """- The weights come from two runs, one after the other, not from one clean run. The first (recipe
  `FOUNDATION`, seed 0, 5,160 steps, 20,343,840 tokens, 53 minutes on two shared cores, commits afa536e, 0bbdea3,
  a986b3d, a844bec, 8681585, f3e334c; figures of its own card) learned numbers and rules, and wrote `answer` whatever an
  output was called. The second (recipe `OWN_NAMES`, below) started from its weights with fresh optimizer state and
  probes, and with a tokenizer in which no field name is part of a phrase: embedding rows were carried over by the text
  of their token, new ones began as the mean of their pieces. `WHOLE` is the recipe of one run from nothing; it was not
  run.
- The first run was itself stopped at checkpoints and resumed with later stages changed. Its stages, as executed:
"""

_HELD_OUT = """## What it never saw

Every training token comes from a generator (`episodes.py`, `worlds.py`): random classes, rules, names and labels.
No data set is read. All words of the names, fields and labels of Iris, Wine and Breast Cancer are banned from that
generator (`worlds.py`, `BANNED_WORDS`) and a test decodes episodes to check it. The tokenizer's English comes from
Python's own language reference with the banned words left out. Decisions during development (sizes, stages, prompt
form, LoRA settings) were made on the episodes' own figures and on the held-out tasks of `development_tasks.py` (blobs,
`make_classification`, moons, principal components of digits, and the own-name tasks, whose names and labels no episode
has: `OWN_TASK_WORDS`). The three tasks of `suites/` decided nothing in the first run. Of the second run's checkpoints
the one at step 2,560 was tried on them, and found to have unlearned reasoning fields and Iris's rule; the three stages
behind it were made for reasoning fields and for the development tasks' figures, and the last weights were shipped as
they came. The wording and shape of a stated rule (`If {field} is below {t} answer {label}, otherwise ...`) is that
which the optimizer writes; it was chosen before training. An
earlier prototype by the same project had looked at Iris (labels of several pieces failed there, which led to
random-piece labels); this model was rebuilt without it.
"""

_OWN_NAMES = """## Fields that nobody foresaw

Held-out tasks with names that occur in no episode, several outputs, `Literal`, `bool` and `int` outputs, and sentences
(`development_tasks.own_name_tasks`); an answer is right when all its outputs are. LoRA as in the results below, long.

"""

_WHY = """Why the misses: a LoRA of 75 rows and six epochs already saturates these tasks on this model (numbers are
smooth in its embeddings), so demonstrations have nothing left to add at 75 rows. The rule: comparing two values and
choosing the clause are learned, not exact, and how well a rule is followed hangs on its names and thresholds: the
second run lifted the development tasks (of split seed 0) from .76 to .92 on average and left Iris a little lower.
"""

_LIMITS = """## Limits

Zero-shot it knows nothing and has a strong bias towards some labels.

An output's name that contains a number is mostly cut short, and then nothing parses (9 of 28 such names did; of 54
without a number all): call it `icd_code`, not `icd10_code`.

Sentences are not told apart by demonstrations, only by LoRA: see the tickets above.

A stated rule is followed for about nine answers in ten on the development tasks and far less on others; when it
fails, mostly the first clause fires wrongly.

Labels that begin with the same token ("versatile", "verdigris") are told apart less well, because the class is
decided at the first token.

Numbers of four and more digits and negative numbers fall into pieces that were not trained. Values are compared as
printed: columns of very different ranges should be scaled to a common one.
"""


def write_card(run_folder: pathlib.Path, cells_folder: pathlib.Path, development: pathlib.Path | None) -> str:
    """The card's text.

    Args:
        run_folder: The pretraining run's folder, with ``run.json`` and ``log.jsonl``.
        cells_folder: The evaluation's cells.
        development: A Markdown file with the figures on the development tasks, if any.
    """
    run = json.loads((run_folder / "run.json").read_text())
    config = json.loads((run_folder / "export" / "config.json").read_text())
    log = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    parts = [
        _HEAD.format(parameters=run["n_parameters"], vocabulary=config["vocab_size"]),
        _run_section(run, config, log),
        _HELD_OUT,
    ]
    own_names = run_folder / "own_names.md"
    if own_names.exists():
        parts.append(_OWN_NAMES + own_names.read_text())
    if development is not None and development.exists():
        parts.append("## Development tasks (settings were fixed on these)\n\n" + development.read_text())
    cells = read_cells(cells_folder)
    if cells:
        parts.append(_results_section(cells))
    parts.append(_LIMITS)
    return "\n".join(parts)


def ship(run_folder: pathlib.Path, into: pathlib.Path, card: str) -> None:
    """Copies the exported files and the card into the package, each by rename."""
    into.mkdir(parents=True, exist_ok=True)
    for name in SHIPPED_FILES:
        temporary = into / (name + ".tmp")
        shutil.copyfile(run_folder / "export" / name, temporary)
        temporary.chmod(0o644)
        os.replace(temporary, into / name)
    write_atomic(into / "README.md", card)


def _run_section(run: dict[str, Any], config: dict[str, Any], log: list[dict[str, Any]]) -> str:
    recipe = run["recipe"]
    lines = [
        "## The run",
        "",
        f"- Network: Llama, {config['num_hidden_layers']} layers, width {config['hidden_size']}, "
        f"{config['num_attention_heads']} heads, feed-forward {config['intermediate_size']}, tied embeddings, "
        "rotary positions.",
    ]
    if run["started_from"]:
        lines += _foundation_lines(run["started_from"])
    lines += [
        f"- {run['steps']:,} steps, {run['tokens']:,} tokens, {run['wall_s'] / 60:.0f} minutes on {run['machine']} "
        f"(shared with other work), torch {run['torch']}, Python {run['python']}.",
        f"- Seed {recipe['seed']}; commits of the code that ran: {', '.join(run['commits'])}.",
        f"- Muon {recipe['muon_rate']} (weight decay {recipe['muon_decay']}) on the layers' matrices, AdamW "
        f"{recipe['adam_rate']} on the rest, times {recipe['stages'][0]['rate']} in the first stage; warm-up "
        f"{recipe['warmup_steps']} steps; every later stage falls along a line of its own (`recipe.py`).",
        "- Supervision during training only: probes for feature values, attention heads pulled to a kernel over like "
        "examples, to field names, to thresholds and to the label that a stated rule gives (`objectives.py`).",
        "- The run was stopped at checkpoints and later stages of the recipe were changed or added after a look at the "
        "development and own-name tasks; no executed step was changed. Bits depend on the machine.",
        "",
        *_stage_lines(recipe["stages"]),
        "",
        "Accuracy of the first label token on fresh episodes while training (demonstration episodes of numbers and of "
        "sentences by number of earlier turns; episodes with a stated rule at the first turn), and of the tokens of "
        "output names at the first turn:",
        "",
        "| step | stage | loss | names | demos, 4-7 earlier | demos, 8 or more | sentences, 8 or more | stated rule |",
        "|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    picked = [log[i] for i in sorted({*range(0, len(log), max(1, len(log) // 12)), len(log) - 1})]
    keys = ("loss", "name_tokens", "demos_turns_4_7", "demos_turns_8_on", "text_turns_8_on", "rule_turn_0")
    for line in picked:
        shown = [line.get(key) for key in keys]
        cells = " | ".join("" if value is None else f"{value:.3f}" for value in shown)
        lines.append(f"| {line['step']} | {line['stage']} | {cells} |")
    return "\n".join(lines) + "\n"


def _foundation_lines(started_from: dict[str, str]) -> list[str]:
    """What the weights that a run started from had been through."""
    if started_from["model.safetensors"] != FOUNDATION_WEIGHTS:
        return [f"- The run started from other weights: sha256 {started_from['model.safetensors']}.", ""]
    return [_FOUNDATION, *_stage_lines(FOUNDATION.to_json()["stages"]), "", "The second run:", ""]


def _stage_lines(stages: list[dict[str, Any]]) -> list[str]:
    lines = ["| stage | steps | rows x tokens |", "|---|--:|--:|"]
    for stage in stages:
        shape = f"{stage['rows']} x {stage['tokens']}"
        if stage["partner"]:
            shape += f", every second step {stage['partner']['rows']} x {stage['partner']['tokens']} (stated rules)"
        lines.append(f"| {stage['name']} | {stage['steps']} | {shape} |")
    return lines


def _results_section(cells: list[dict[str, Any]]) -> str:
    settings = cells[0]["settings"]
    text = (
        "## Results on the three tasks\n\n"
        "DSPy signatures through `dspy.ChatAdapter`, greedy; means (and range) over split seeds; up to 75 test rows; "
        "Iris in cm, Wine and Breast Cancer as four columns chosen by ANOVA F and scaled to 0.0-9.9, both by the "
        f"training rows. Demonstrations: best of {settings['n_sets']} sets of {settings['n_demos']} by validation (a "
        "third of the labelled rows). LoRA: r = 16 on all linear layers, learning rate "
        f"{settings['learning_rate']}, batches of {settings['batch_size']}; short is {settings['short_epochs']} "
        f"epochs, long {settings['long_epochs']}; both: trained on prompts with {settings['n_demos']} resampled "
        f"demonstrations, short, and asked with the demonstrations. Prompt form: `{settings['form']}`. Intervals: 95 % "
        f'bootstrap over tasks x seeds. The rule: "{IRIS_RULE}"\n\n'
    )
    return f"{text}{table(cells)}\n### Targets\n\n{targets(cells)}\n{_WHY}"


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


def own_name_table(model: MeasuredModel, *, seeds: tuple[int, ...]) -> str:
    """One line per own-name task, means over ``seeds``; an answer is right when all its outputs are."""
    lines = [
        "| task | outputs | zero-shot | best of 10 sets of 9 demonstrations | LoRA, long | parsed, worst |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for index, task in enumerate(own_name_tasks(seeds[0])):
        figures = np.array([_own_figures(model, own_name_tasks(seed)[index], seed=seed) for seed in seeds])
        zero, demos, lora = figures.mean(0)[:3]
        outputs = ", ".join(f"`{name}`" for name in task.program.output_fields)
        lines.append(
            f"| {task.name} | {outputs} | {zero:.3f} | {demos:.3f} | {lora:.3f} | {figures[:, 3:].min():.1%} |"
        )
    return "\n".join(lines) + f"\n\nMeans over split seeds {', '.join(map(str, seeds))}; 75 test rows each.\n"


def _own_figures(model: MeasuredModel, task: OwnTask, *, seed: int) -> tuple[float, ...]:
    """Accuracy zero-shot, with demonstrations and with LoRA, then the shares that parsed in the same order."""
    train, test = list(task.train), list(task.test)
    zero = model.accuracy(task.program, [], test)
    demos = best_demos(model, task.program, train[:50], train[50:], n_demos=SETTINGS.n_demos, n_sets=10, seed=seed)
    shown = model.accuracy(task.program, demos, test)
    settings = LoraSettings(SETTINGS.long_epochs, SETTINGS.learning_rate, SETTINGS.batch_size, 0)
    tuned = with_lora(model, task.program, train, settings, seed=seed).accuracy(task.program, [], test)
    return zero[0], shown[0], tuned[0], 1 - zero[1], 1 - shown[1], 1 - tuned[1]
