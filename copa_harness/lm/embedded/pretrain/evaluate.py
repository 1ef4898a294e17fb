"""The final table: what demonstrations, LoRA, both and a stated rule do for the embedded model on three real tasks.

Every cell (task, split seed, number of labelled rows) is one JSON file, so a killed evaluation goes on where it was;
the table and its intervals are computed from the files alone. Settings are fixed in ``SETTINGS``, chosen on
``development_tasks`` before this was run.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from dataclasses import dataclass
from typing import Any

import dspy
import numpy as np
from tqdm import tqdm

from copa_harness.atomic_files import write_atomic
from copa_harness.lm.embedded.pretrain.measure import LoraSettings, MeasuredModel, Record, best_demos, with_lora

TASKS = ("iris", "wine", "breast_cancer")
SEEDS = (0, 1, 2, 3, 4)
SIZES = (75, 30, 15)
IRIS_RULE = (
    "If petal_length is below 2.5 answer setosa, otherwise if petal_width is below 1.7 answer versicolor, "
    "otherwise answer virginica."
)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that could be tuned, fixed beforehand on synthetic and held-out tasks.

    Attributes:
        form: Prompt form of the tasks, see ``copa_harness.tasks``.
        learning_rate, batch_size: Of every LoRA training.
        short_epochs, long_epochs: "short" and "long" training.
        n_demos, n_sets: Demonstrations per prompt, and sets tried on the validation rows.
    """

    form: str = "fields"
    learning_rate: float = 3e-3
    batch_size: int = 16
    short_epochs: int = 6
    long_epochs: int = 20
    n_demos: int = 9
    n_sets: int = 10


SETTINGS = Settings()


def evaluate(
    model: MeasuredModel,
    folder: pathlib.Path,
    *,
    settings: Settings,
    sizes: tuple[int, ...] = SIZES,
    part: tuple[int, int] = (0, 1),
) -> None:
    """Fills ``folder`` with one JSON file per missing cell.

    Args:
        model: What is measured.
        folder: Where the cells are.
        settings: Fixed beforehand.
        sizes: Numbers of labelled rows.
        part: (i, n) does every n-th cell from the i-th on, so that n processes can share the work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cells = [(size, seed, task) for size in sizes for seed in SEEDS for task in TASKS][part[0] :: part[1]]
    for size, seed, name in tqdm(cells, unit="cell"):
        path = folder / f"{name}-seed{seed}-rows{size}.json"
        if path.exists():
            continue
        cell = _cell(model, name, seed=seed, n_labelled=size, settings=settings)
        write_atomic(path, json.dumps(cell, indent=1))


def _cell(model: MeasuredModel, name: str, *, seed: int, n_labelled: int, settings: Settings) -> dict[str, Any]:
    from copa_harness import tasks

    n_validation = n_labelled // 3
    task = getattr(tasks, name)(seed, form=settings.form, n_train=n_labelled - n_validation, n_val=n_validation)
    program = task.program.signature
    pool, validation = ([_record(row) for row in rows] for rows in (task.trainset, task.valset))
    train = pool + validation
    test = [_record(row) for row in task.testset]
    results: dict[str, Any] = {}

    def note(what: str, tested: MeasuredModel, demos: list[Record], started: float, signature: Any = program) -> None:
        accuracy, unparsed = tested.accuracy(signature, demos, test)
        seconds = round(time.perf_counter() - started, 2)
        results[what] = {"accuracy": accuracy, "unparsed": unparsed, "seconds": seconds}

    lora = LoraSettings(settings.short_epochs, settings.learning_rate, settings.batch_size, 0)
    started = time.perf_counter()
    note("zero_shot", model, [], started)
    started = time.perf_counter()
    demos = best_demos(model, program, pool, validation, n_demos=settings.n_demos, n_sets=settings.n_sets, seed=seed)
    note("demos", model, demos, started)
    for what, changed, shown in (
        ("lora_short", lora, []),
        ("both_short", dataclasses.replace(lora, n_demos=settings.n_demos), demos),
        ("lora_long", dataclasses.replace(lora, epochs=settings.long_epochs), []),
    ):
        started = time.perf_counter()
        note(what, with_lora(model, program, train, changed, seed=seed), shown, started)
    if name == "iris" and n_labelled == SIZES[0]:
        started = time.perf_counter()
        note("rule", model, [], started, program.with_instructions(IRIS_RULE))
    return {
        "schema": 1,
        "task": name,
        "seed": seed,
        "n_labelled": n_labelled,
        "n_test": len(test),
        "settings": dataclasses.asdict(settings),
        "results": results,
    }


def _record(example: dspy.Example) -> Record:
    return {str(name): value for name, value in example.toDict().items()}


def read_cells(folder: pathlib.Path) -> list[dict[str, Any]]:
    """All finished cells."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*-rows*.json"))]


def paired_interval(differences: list[float], *, seed: int = 0, n_resamples: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of paired differences (resampled over tasks x seeds)."""
    rng = np.random.default_rng(seed)
    values = np.array(differences)
    means = rng.choice(values, (n_resamples, len(values))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def table(cells: list[dict[str, Any]]) -> str:
    """The results as Markdown: one table per number of labelled rows, and the paired comparisons under each."""
    columns = ("zero_shot", "demos", "lora_short", "lora_long", "both_short")
    titles = ("zero-shot", "demonstrations", "LoRA, short", "LoRA, long", "both, short")
    parts: list[str] = []
    for size in sorted({cell["n_labelled"] for cell in cells}, reverse=True):
        of_size = [cell for cell in cells if cell["n_labelled"] == size]
        lines = [
            f"### {size} labelled rows",
            "",
            "| task | seeds | " + " | ".join(titles) + " |",
            "|---|--:|" + "--:|" * 5,
        ]
        for name in TASKS:
            group = [cell for cell in of_size if cell["task"] == name]
            if group:
                shown = " | ".join(
                    _shown([cell["results"][column]["accuracy"] for cell in group]) for column in columns
                )
                lines.append(f"| {name} | {len(group)} | {shown} |")
        means = [np.mean([cell["results"][column]["accuracy"] for cell in of_size]) for column in columns]
        lines.append(f"| mean | {len(of_size)} | " + " | ".join(f"**{mean:.3f}**" for mean in means) + " |")
        lines.append("")
        for other, title in (("demos", "demonstrations"), ("lora_short", "LoRA, short"), ("lora_long", "LoRA, long")):
            pairs = [cell["results"]["both_short"]["accuracy"] - cell["results"][other]["accuracy"] for cell in of_size]
            low, high = paired_interval(pairs)
            lines.append(
                f"- both, short minus {title}: {np.mean(pairs):+.3f} [{low:+.3f}, {high:+.3f}] (n = {len(pairs)} pairs)"
            )
        rules = [cell["results"]["rule"]["accuracy"] for cell in of_size if "rule" in cell["results"]]
        if rules:
            lines.append(f"- Iris with the rule in the instruction, zero-shot: {_shown(rules)}")
        unparsed = max(cell["results"]["zero_shot"]["unparsed"] for cell in of_size)
        lines.append(f"- zero-shot answers that did not parse, worst cell: {unparsed:.1%}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def targets(cells: list[dict[str, Any]]) -> str:
    """The targets set beforehand, at the largest number of labelled rows: met, or missed by how much."""
    size = max(cell["n_labelled"] for cell in cells)
    of_size = [cell for cell in cells if cell["n_labelled"] == size]

    def mean(what: str, task: str | None = None) -> float:
        chosen = [cell for cell in of_size if task in (None, cell["task"]) and what in cell["results"]]
        return float(np.mean([cell["results"][what]["accuracy"] for cell in chosen]))

    def lead(other: str) -> tuple[float, float]:
        pairs = [cell["results"]["both_short"]["accuracy"] - cell["results"][other]["accuracy"] for cell in of_size]
        return float(np.mean(pairs)), paired_interval(pairs)[0]

    parsed = 1 - max(cell["results"]["zero_shot"]["unparsed"] for cell in of_size)
    rows = [
        ("zero-shot answers parse, worst cell", parsed, 0.95),
        ("Iris, demonstrations", mean("demos", "iris"), 0.85),
        ("Iris, LoRA short", mean("lora_short", "iris"), 0.80),
        ("Iris, LoRA long", mean("lora_long", "iris"), 0.94),
        ("Iris, both short", mean("both_short", "iris"), 0.95),
        ("Iris, the rule in the instruction", mean("rule", "iris"), 0.80),
        ("both short minus demonstrations, lower end of the interval", lead("demos")[1], 0.0),
        ("both short minus LoRA short, lower end of the interval", lead("lora_short")[1], 0.0),
        ("both short minus LoRA long, mean", lead("lora_long")[0], 0.0),
    ]
    lines = ["| target | found | wanted | |", "|---|--:|--:|---|"]
    for title, found, wanted in rows:
        verdict = "met" if found >= wanted else f"missed by {wanted - found:.3f}"
        lines.append(f"| {title} | {found:.3f} | >= {wanted:.2f} | {verdict} |")
    return "\n".join(lines) + "\n"


def _shown(values: list[float]) -> str:
    """Mean and range over seeds."""
    return f"{np.mean(values):.3f} ({min(values):.2f}-{max(values):.2f})"
