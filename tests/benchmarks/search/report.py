"""The report: tables as text, everything as JSON, and the curves as a picture where matplotlib is installed.

Knows records and figures; knows nothing of how cells are run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from copa_harness.atomic_files import write_atomic
from copa_harness.documents import pretty_json, to_jsonable
from search.cells import COPA, RIVALS
from search.figures import Mean, Record, Results, mean_of, reach, saved_by_racing, test_score, validation_score

SEQUENCES = ("p -> w -> p", "p", "demos -> instructions")
REACHING = ("joint", "p -> w -> p", "p")
TARGET_REACH, TARGET_SAVED = 1 / 3, 0.40


def write(records: Sequence[Record], *, n_cells: int, directory: Path) -> str:
    """Write report.txt, report.json and curves.png; the text."""
    results = Results(records)
    sections = [_heading(results, n_cells), _scores(results), _by_task(results), _against(results)]
    sections += [_reaching(results), _racing(results), _cost(results)]
    text = "\n\n".join(section for section in sections if section) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(directory / "report.txt", text)
    write_atomic(directory / "report.json", pretty_json(to_jsonable(_as_json(results))))
    from search.plot import draw

    picture = draw(results, directory / "curves.png")
    return f"{text}\n{directory / 'report.txt'}, report.json{', ' + picture.name if picture else ''}"


def _heading(results: Results, n_cells: int) -> str:
    versions = sorted({(r["method"] in RIVALS, r["version"]) for r in results.records})
    ours = ", ".join(v for rival, v in versions if not rival)
    return (
        f"Search at equal numbers of distinct calls: {len(results.records)} of {n_cells} cells, "
        f"{len(results.pairs)} pairs of task and seed; embedded model, 25 validation and 75 test rows.\n"
        f"GEPA and MIPROv2 write with a rule-based script. Sources of COPA's cells: {ours}."
    )


def _pairs(rows: list[list[Any]], headers: list[str], title: str) -> str:
    return f"{title}\n" + tabulate(rows, headers=headers, disable_numparse=True, stralign="right")


def _scores(results: Results) -> str:
    rows = []
    for method in results.methods:
        row: list[Any] = [method]
        for budget in results.budgets:
            found = mean_of(test_score(r) for r in results.of(method, budget))
            row += [f"{found.value:.3f}" if found.n else "-", results.difference(method, "joint", budget, test_score)]
            row[-1] = "" if method == "joint" or not row[-1].n else row[-1].text(signed=True)
            row.append(found.n or "")
        rows.append(row)
    headers = ["method"] + [h for b in results.budgets for h in (f"{b} calls", "difference to joint", "n")]
    return _pairs(rows, headers, "mean test score, and paired difference to `joint` [95 % t interval over pairs]:")


def _by_task(results: Results) -> str:
    sections = []
    for budget in results.budgets:
        rows = []
        for method in results.methods:
            cells: list[Any] = [method]
            for task in results.tasks:
                found = results.of(method, budget, task=task)
                test, validation = mean_of(map(test_score, found)), mean_of(map(validation_score, found))
                cells.append(f"{test.value:.3f} ({validation.value:.3f})" if found else "-")
            rows.append(cells)
        sections.append(_pairs(rows, ["method", *results.tasks], f"by task at {budget} calls: test (validation)"))
    return "\n\n".join(sections)


def _against(results: Results) -> str:
    rows = []
    for budget in results.budgets:
        for other in (*SEQUENCES, "p, no racing", "random, no racing", *RIVALS):
            found = results.difference("joint", other, budget, test_score)
            if found.n:
                on_validation = results.difference("joint", other, budget, validation_score)
                texts = [found.text(signed=True), on_validation.text(signed=True), _word(found)]
                rows.append([budget, other, found.n, *texts])
    headers = ["calls", "joint minus", "pairs", "test", "validation", "on test"]
    return _pairs(rows, headers, "`joint` against every other, paired (target: not worse than any fixed sequence):")


def _word(found: Mean) -> str:
    if found.low is None or found.high is None:
        return "too few pairs"
    return "better" if found.low > 0 else "worse" if found.high < 0 else "within noise"


def _reaching(results: Results) -> str:
    rows = []
    for budget in results.budgets:
        for ours in REACHING:
            best = reach(results, ours, RIVALS, budget)
            if not best.of_total:
                continue
            row = [budget, ours, f"{best.n_reached} of {len(best.of_total)}", _ratio(best.median_of_total)]
            row += [_ratio(best.median_of_first), "yes" if best.median_of_total <= TARGET_REACH else "no"]
            for rival in RIVALS:
                row.append(_ratio(reach(results, ours, [rival], budget).median_of_total))
            rows.append(row)
    headers = ["calls", "method", "reached", "of its calls", "of its first", "<= 1/3", *RIVALS]
    return _pairs(
        rows,
        headers,
        "calls to the best rival's final validation score, as a share of all calls it used and of those after which it "
        "first had it\n(median over pairs, never = inf; the last columns: each rival by itself, share of its calls):",
    )


def _ratio(value: float) -> str:
    return "-" if math.isnan(value) else "inf" if math.isinf(value) else f"{value:.2f}"


def _racing(results: Results) -> str:
    rows = []
    for budget in results.budgets:
        for method in COPA:
            saved = saved_by_racing(results.of(method, budget))
            if saved.n:
                met = "yes" if saved.value >= TARGET_SAVED else "no"
                rows.append([budget, method, saved.n, saved.text(), met, "", ""])
                if method == "p":
                    test = results.difference("p", "p, no racing", budget, test_score)
                    validation = results.difference("p", "p, no racing", budget, validation_score)
                    rows[-1][-2:] = [test.text(signed=True), validation.text(signed=True)]
    headers = ["calls", "method", "runs", "left out", ">= 40 %", "test: p - p, no racing", "validation"]
    return _pairs(rows, headers, "example evaluations that racing left out, and what it cost:")


def _cost(results: Results) -> str:
    rows = []
    for method in results.methods:
        found = [r for r in results.records if r["method"] == method]
        charged = [f"{mean_of(r['charged'] for r in results.of(method, b)).value:.0f}" for b in results.budgets]
        rows.append([method, f"{mean_of(r['n_trials'] or r['n_full'] for r in found).value:.0f}", *charged])
    return _pairs(rows, ["method", "trials", *[f"of {b}" for b in results.budgets]], "distinct calls used, mean:")


def _as_json(results: Results) -> dict[str, Any]:
    methods, budgets = results.methods, results.budgets
    return {
        "pairs": results.pairs,
        "scores": [
            {
                "method": m,
                "budget": b,
                "n": len(results.of(m, b)),
                "test": mean_of(map(test_score, results.of(m, b))).value,
                "validation": mean_of(map(validation_score, results.of(m, b))).value,
                "test_minus_joint": _mean_json(results.difference(m, "joint", b, test_score)),
            }
            for m in methods
            for b in budgets
            if results.of(m, b)
        ],
        "reach": [
            {
                "method": m,
                "budget": b,
                "rival": name,
                "share_of_calls": [_finite(x) for x in found.of_total],
                "share_of_first": [_finite(x) for x in found.of_first],
                "median": _finite(found.median_of_total),
            }
            for m in REACHING
            for b in budgets
            for name, rivals in (("best", RIVALS), *((r, (r,)) for r in RIVALS))
            if (found := reach(results, m, rivals, b)).of_total
        ],
        "racing": [
            {"method": m, "budget": b, "left_out": _mean_json(saved_by_racing(results.of(m, b)))}
            for m in COPA
            for b in budgets
            if results.of(m, b)
        ],
        "cells": [
            {key: value for key, value in r.items() if key not in ("state", "curve", "test")}
            | {"test_score": test_score(r), "curve": [[p["calls"], p["score"]] for p in r["curve"]]}
            for r in results.records
        ],
    }


def _mean_json(found: Mean) -> dict[str, Any]:
    return {"mean": _finite(found.value), "low": found.low, "high": found.high, "n": found.n}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
