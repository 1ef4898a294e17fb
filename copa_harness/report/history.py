"""Reports read again: one in words (`copa show`), two side by side (`copa compare`), all in a row (`copa history`).

Needs nothing but the files: no model, no cache, no network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

from copa_harness.documents import from_json, parse_json
from copa_harness.errors import ArtifactError, ConfigurationError
from copa_harness.formatting import number, probability_cell
from copa_harness.judge.attribution import CELLS, EFFECTS, Attribution
from copa_harness.judge.paired_tests import GATE_LEVEL, pair_up, paired_difference
from copa_harness.report.details import credit_table
from copa_harness.report.files import NUMBERED, gates_to_read
from copa_harness.report.records import RunRecord
from copa_harness.report.rendering import Style, bounds, draw, table
from copa_harness.report.summary import spent_by, summary_rows, summary_table, totals, verdict_counts, verdict_text
from copa_harness.report.tables import all_tables
from copa_harness.results import OptimizationResult

_BARS = "▁▂▃▄▅▆▇█"

MAX_HISTORY = 20
"""Reports in a row, the newest."""


@dataclass(frozen=True, slots=True)
class OldReport:
    """A report that was read."""

    path: Path
    environment: Mapping[str, Any]
    runs: tuple[RunRecord, ...]

    @property
    def made(self) -> str:
        """When, and from which commit."""
        commit = str(self.environment.get("commit", ""))[:10]
        return " ".join(part for part in (str(self.environment.get("created", ""))[:16], commit) if part)


def read_report(path: Path) -> OldReport:
    """A report from its JSON file.

    Raises:
        ArtifactError: There is no such file, or it is no report.
    """
    try:
        document = parse_json(path.read_bytes())
        runs = tuple(from_reported(run) for run in document["runs"])
        credit_table(runs)  # what it shows has no declared type that could be checked
        return OldReport(path, dict(document.get("environment") or {}), runs)
    except OSError as error:
        raise ArtifactError(f"the report {path} cannot be read ({error.strerror or error})") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path} is no report: {error}; expected latest.json or one of its numbered copies"
        ) from error


def from_reported(document: Mapping[str, Any]) -> RunRecord:
    """The record that `as_reported` wrote, as far as tables need it (what stopping early came to is not kept).

    Raises:
        ValueError: A part is missing or of the wrong type.
    """
    own = {field.name for field in fields(RunRecord)} - {"sequential", "attribution", "optimization"}
    plain = {name: value for name, value in document.items() if name in own}
    if isinstance(plain.get("interval"), list):
        low, high = plain["interval"]
        level, method = document.get("interval_level") or 0.95, document.get("interval_method") or "wilson"
        plain["interval"] = {"low": low, "high": high, "level": level, "method": method}
    record = from_json(RunRecord, plain)
    spent = [one for usage in (record.usage, *(phase.usage for phase in record.phases)) for one in astuple(usage)]
    if not all(0 <= one < math.inf for one in spent):
        raise ValueError("got amounts below 0 or without end")
    if not all(score is None or 0 <= score <= 1 for score in (record.score, *record.scores.values())):
        raise ValueError("got scores outside 0..1")
    more = {"optimization": _optimization(document, record), "attribution": _attribution(document.get("attribution"))}
    return RunRecord(**{name: getattr(record, name) for name in own} | more)


def _optimization(document: Mapping[str, Any], record: RunRecord) -> OptimizationResult | None:
    search = document.get("search")
    if not search:
        return None
    validation = document.get("validation") or {}
    own = {
        **{name: document.get(name, default) for name, default in _SEARCHED.items()},
        "evidence": document.get("evidence") or None,
        "strategy": record.strategy,
        "model": record.served_lm,
        "score_before": validation.get("before"),
        "score_after": validation.get("after"),
        "n_validation": 0,
        "usage": {},
        "seed": record.seed or 0,
        "charged_calls": search["calls"],
        "n_trials": search["n_trials"],
        "reason": search["reason"],
    }
    return replace(from_json(OptimizationResult, own), budget_calls=record.budget.calls)


_SEARCHED: Mapping[str, Any] = {
    **{"phases": [], "notes": [], "front": [], "credit": {}, "learned": []},
    **{"stopped": "", "exhausted": False},
}
"""What a run in a report says of its search under the name it has in `OptimizationResult`."""


def _attribution(told: Mapping[str, Any] | None) -> Attribution | None:
    if not told:
        return None
    cells, n = told["cells"], told["n"]
    own: dict[str, Any] = {
        "n": n,
        "means": {name: cells[name][0] for name in CELLS},
        "intervals": {name: _bounds(*cells[name][1:]) for name in CELLS},
    }
    for name in EFFECTS:
        one = told["effects"][name]
        own[name] = {
            "difference": one["difference"],
            "interval": _bounds(one["low"], one["high"]),
            "p_value": one["p_value"],
            "method": "",
            "n": n,
        }
    return from_json(Attribution, own)


def _bounds(low: Any, high: Any) -> dict[str, Any]:
    return {"low": low, "high": high}


def report_path(name: str, directory: Path) -> Path:
    """The file that a name stands for: a path, a number (`3`, `0003`), or nothing for the latest.

    Raises:
        ConfigurationError: There is no such report.
    """
    choices = [Path(name)] if name else [directory / "latest.json"]
    if name.isdigit():
        choices.append(directory / f"{int(name):04d}.json")
    found = next((path for path in choices if path.is_file()), None)
    if found is None:
        numbers = ", ".join(path.stem for path in numbered_reports(directory)[-10:]) or "none"
        raise ConfigurationError(
            f"got the report {name or 'latest.json'!r}, expected a file or a number of those in {directory}: {numbers}"
        )
    return found


def numbered_reports(directory: Path) -> list[Path]:
    """The numbered copies, the oldest first."""
    found = [path for path in directory.iterdir() if NUMBERED.fullmatch(path.name)] if directory.is_dir() else []
    return sorted(found, key=lambda path: int(path.stem))


def report_text(report: OldReport) -> str:
    """The page in words: every table, the gates that did not pass, the totals."""
    parts = [f"{report.path}, {report.made}"]
    parts += [f"{title}:\n{table}" for title, table in all_tables(report.runs)]
    parts.append(summary_table(report.runs))
    if gates := gates_to_read(report.runs):
        parts.append(f"gates that did not pass:\n{gates}")
    return "\n\n".join([*parts, totals(report.runs)])


# -- two reports


def compare_reports(before: OldReport, after: OldReport) -> str:
    """What changed from one report to another, run by run, paired by example."""
    changed = [
        f"{name} {was} -> {now}"
        for name in ("lm", "budget", "seed", "python")
        if (was := before.environment.get(name)) != (now := after.environment.get(name))
    ]
    parts = [
        f"{before.path} ({before.made}) -> {after.path} ({after.made})",
        side_by_side(before.runs, after.runs),
        *one_sided(before.runs, after.runs),
        *([f"changed: {', '.join(changed)}"] if changed else []),
        *(f"{title}: {totals(one.runs)}" for title, one in (("before", before), ("after", after))),
    ]
    return "\n".join(part for part in parts if part)


def side_by_side(before: Sequence[RunRecord], after: Sequence[RunRecord], *, style: Style = "terminal") -> str:
    """The runs that stand on both sides, one row each; "" without any."""
    theirs = _by_key(before)
    rows = [
        [new.task, new.strategy, *_compared(theirs[key], new), verdict_text(new.verdict)]
        for key, new in _by_key(after).items()
        if key in theirs
    ]
    titles = "task|strategy|n|before|after|difference|worse|better|p|verdict now"
    note = "paired by example [90 % interval]; p: one-sided, of no change in the direction seen, as gates have it"
    return table(rows, titles, note, style=style, n_text=2, last_text=True)


def one_sided(
    before: Sequence[RunRecord], after: Sequence[RunRecord], *, titles: tuple[str, str] = ("before", "after")
) -> list[str]:
    """Which runs stand on one side only."""
    theirs, ours = _by_key(before), _by_key(after)
    said = []
    for title, these, those in ((titles[0], theirs, ours), (titles[1], ours, theirs)):
        if only := [f"{run.task}, {run.strategy} ({run.model})" for key, run in these.items() if key not in those]:
            said.append(f"only {title}: {'; '.join(only)}")
    return said


def _by_key(runs: Sequence[RunRecord]) -> dict[tuple[str, ...], RunRecord]:
    return {_key(row.run): row.run for row in summary_rows(runs)}


def _key(run: RunRecord) -> tuple[str, ...]:
    return (run.task, run.strategy, run.model, run.split)


def _compared(old: RunRecord, new: RunRecord) -> list[str]:
    pairs = pair_up(old.scores, new.scores, groups={**old.groups, **new.groups} or None)
    scores = [number(old.score), number(new.score)]
    if not pairs.ids:
        return ["0", *scores, "-", "-", "-", "-"]
    found = paired_difference(pairs, level=GATE_LEVEL)
    told = number(found.difference, signed=True) + bounds(found.interval, signed=True)
    return [
        f"{found.n:,}",
        *scores,
        told,
        f"{found.n_worse:,}",
        f"{found.n_better:,}",
        probability_cell(found.p_one_sided),
    ]


# -- all reports


def history_text(directory: Path) -> str:
    """Verdicts and costs of the numbered reports, and how every score went.

    Raises:
        ConfigurationError: There are none.
        ArtifactError: One cannot be read.
    """
    paths = numbered_reports(directory)[-MAX_HISTORY:]
    if not paths:
        raise ConfigurationError(f"got the folder {directory}, expected one with numbered reports (0001.json, ...)")
    reports = [read_report(path) for path in paths]
    rows = []
    scores: dict[tuple[str, ...], list[float | None]] = {}
    for place, report in enumerate(reports):
        spent = spent_by(report.runs)
        cost = [f"{spent.paid_calls:,}", f"{spent.cached_calls:,}", f"{spent.usd:,.4f}"]
        rows.append([report.path.stem, report.made, *cost, verdict_counts(report.runs)])
        for row in summary_rows(report.runs):
            line = scores.setdefault(_key(row.run), [None] * len(reports))
            line[place] = row.run.score
    headers = ["report", "made", "paid", "cached", "USD", "verdicts"]
    verdicts = draw(rows, headers, style="terminal", n_text=2, last_text=True, wrap=False)
    lines = [[*key[:2], number(_last(line[:-1])), number(line[-1]), sparkline(line)] for key, line in scores.items()]
    headers = ["task", "strategy", "before", "now", "0 to 1, oldest first"]
    return f"{verdicts}\n\n{draw(lines, headers, style='terminal', n_text=2, last_text=True)}"


def _last(line: Sequence[float | None]) -> float | None:
    return next((score for score in reversed(line) if score is not None), None)


def sparkline(scores: Sequence[float | None]) -> str:
    """Scores 0..1 as bars of eight heights; a blank where there is none."""
    return "".join(
        " " if score is None or math.isnan(score) else _BARS[min(7, max(0, int(score * 8)))] for score in scores
    )
