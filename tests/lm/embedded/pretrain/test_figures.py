from __future__ import annotations

import json

from copa_harness.lm.embedded.pretrain import figures
from copa_harness.lm.embedded.pretrain.recipe import FOUNDATION


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


class Oracle:
    """Stands for a model: right on whatever is asked with demonstrations, follows every rule."""

    def accuracy(self, program, demos, examples):
        return (0.8, 0.0) if demos else (0.3, 0.1)

    def answers(self, program, demos, examples):
        return self.ruled


def test_a_run_is_told_by_its_stages_and_its_accuracies(tmp_path):
    run = {
        "recipe": {"stages": [{"name": "bare", "steps": 300, "rows": 40, "tokens": 96, "partner": None}]},
        "steps": 4800,
        "tokens": 19_000_000,
        "wall_s": 3000.0,
        "cpu_count": 2,
        "platform": "a processor",
        "python": "3.11",
        "versions": {"torch": "2.13"},
        "commit": "abc",
        "started_from": "",
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 50, "stage": "bare", "loss": 7.0}) + "\n")
    text = figures.run_tables(tmp_path)
    assert "4,800 steps, 19,000,000 tokens, 50 minutes on 2 cores (a processor), torch 2.13" in text
    assert ["bare", "300", "40 x 96"] in map(cells, text.splitlines())
    assert ["50", "bare", "7.000", *[""] * 5] in map(cells, text.splitlines())


def test_a_stage_with_a_partner_says_so():
    import dataclasses

    told = figures._stage_cells(dataclasses.asdict(FOUNDATION.stages[-1]))
    assert told == ["polish", 360, "3 x 1400, every second step 18 x 216 (stated rules)"]


def test_the_tables_are_means_over_seeds_and_hold_the_rule_against_its_own_answers(monkeypatch):
    model = Oracle()
    model.ruled = ["never"] * 75
    table = figures.development_table(model, seeds=[0, 1])
    assert [cells(line)[2:] for line in table.splitlines()[2:]] == [["0.300", "0.800", "0.000", "0.100"]] * 12
    monkeypatch.setattr(figures, "with_lora", lambda model, *_, **__: model)
    own = figures.own_name_table(model, seeds=[0])
    assert all(cells(line)[-1] == "90.0%" for line in own.splitlines()[2:])
    real = figures.real_table(model, seeds=[0])
    assert ["iris", "0.300", "0.800", "0.300", "0.300", "0.800"] in map(cells, real.splitlines())
    assert "Iris with its rule in the instruction, zero-shot: 0.300." in real
