"""The end of a session: entries of all processes become report files, baselines, tables, remarks and an exit status.

Only the process that has all entries writes. So several workers never write one baseline, and a session that is killed
leaves the old baselines as they were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copa_harness.errors import CopaError
from copa_harness.formatting import ceiling, counted, number
from copa_harness.judge.gates import is_failure, overall
from copa_harness.results import Verdict
from copa_harness.session.against import compared, named
from copa_harness.session.comparisons import settle
from copa_harness.session.entries import Entry, from_row
from copa_harness.session.machines import ledger_of, opened_database
from copa_harness.session.options import Settings
from copa_harness.session.plan import plan_text
from copa_harness.session.runs import is_deferred

if TYPE_CHECKING:
    from copa_harness.report.examples import Told
    from copa_harness.report.records import RunRecord
    from copa_harness.store.baselines import Baseline

FAILED = 1
"""Exit status when the suite fails though no test did: by a comparison that could only be made at the end."""

BUDGET_EXHAUSTED = 6
"""Exit status when nothing failed and the session's ceilings cut something short. pytest's own end at 5."""

MIN_DRAWS_REFUSED = 3
"""Runs that asked the same, from which on the best is refused as a baseline; one in two is the better of two."""

_OPEN = (Verdict.UNDECIDED, Verdict.NOT_COMPARABLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the terminal shows.

    Attributes:
        summary: The one table that everybody sees.
        tables: (title, text) of every table that has something to say, for whoever asks for them.
        gates: Gates that did not pass, under their runs; empty when all passed.
        totals: How many runs passed, failed, are undecided, and what they cost.
        notes: What is good to know.
        asides: What is good to know for whoever asks for more.
        remarks: What a person should know and could overlook.
        written: Path of the page, relative to the root if it lies below; empty when not written.
        exit_status: What the session must end with when its tests alone would make it a success; 0 for success.
        reasons: Why it is not 0, a sentence each.
        open_runs: How many runs are undecided and how many not comparable, where any are.
        annotations: Commands for GitHub, where it reads the output.
    """

    summary: str
    tables: tuple[tuple[str, str], ...] = ()
    gates: str = ""
    totals: str
    notes: tuple[str, ...] = ()
    asides: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    written: str = ""
    exit_status: int = 0
    reasons: tuple[str, ...] = ()
    open_runs: Mapping[str, int] = field(default_factory=dict)
    annotations: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tests:
    """What the report says of tests, beside their runs.

    Attributes:
        n_refused: Tests that ended because the session's ceilings refused a call.
        locations: Path from the root and line, from 1, by test id.
        failed: Why copa tests failed, by test id.
        interrupted: Whether somebody ended the session before its tests were through.
    """

    __test__ = False  # pytest is not to collect it

    n_refused: int = 0
    locations: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    interrupted: bool = False


NO_TESTS = Tests()


def finish(rows: Sequence[Mapping[str, Any]], *, settings: Settings, tests: Tests = NO_TESTS) -> Report:
    """Writes the report files and, if the session is blessed, the baselines; draws the tables.

    `rows` are those of every process of the session, in any order (see `entries`).
    """
    from copa_harness.report.examples import Told
    from copa_harness.report.files import gates_to_read
    from copa_harness.report.pull_request import annotations_of
    from copa_harness.report.summary import drifts_told, summary_table, totals
    from copa_harness.report.tables import all_tables

    entries = sorted((from_row(row) for row in rows), key=lambda entry: entry.order)
    if plans := [entry.plan for entry in entries if entry.plan is not None]:
        return Report(summary=f"what a run would pay:\n{plan_text(plans)}", totals="runs: plan only, nothing was run")
    records, failed_late = settle(entries, settings=settings)
    notes = list(dict.fromkeys(note for entry in entries for note in entry.notes))
    asides = list(dict.fromkeys(aside for entry in entries for aside in entry.asides))
    unchecked = _unchecked(entries)
    failed_late += unchecked if settings.against is not None else ()
    remarks = [] if settings.against is not None else unchecked
    failures = _failures(entries)
    notes += _failed_attempts(failures)
    if settings.bless:
        accepted, problems = accept_baselines(entries, directory=settings.baseline_dir, reports=settings.report_dir)
        notes += [f"accepted as baseline: {_shown(path, settings.root)} ({changed})" for path, changed in accepted]
        remarks += [*(entry.not_accepted for entry in entries if entry.not_accepted), *problems]
    notes += _spent(settings)
    n_cut = max(sum(record.cut_short for record in records), tests.n_refused)
    for name, said in drifts_told(records):
        {"fault": failed_late, "drift": remarks}.get(name, notes).append(said)
    reasons = (*failed_late, *_cut_short(n_cut))
    if tests.interrupted:
        remarks.append("interrupted: this is what had finished; run again, what was answered is cached and free")
    beside = None if settings.against is None else compared(settings, records)
    notes += () if beside is None else beside.notes
    remarks += () if beside is None else beside.remarks
    evaluated = [entry for entry in entries if entry.record is not None]
    told = Told(
        details={place: entry.details for place, entry in enumerate(evaluated) if entry.details is not None},
        notes=(*notes, *asides),
        remarks=(*remarks, *reasons),
        n_refused=n_cut,
        against="" if beside is None else named(settings),
        tables=() if beside is None or not beside.page else ((f"against {named(settings)}", beside.page),),
    )
    more: dict[str, Any] = {"failed_calls": failures} if failures else {}
    if tests.interrupted:
        more["interrupted"] = True
    written, problems = _written(records, more, settings=settings, told=told)
    if settings.mlflow is not None:
        problems += _tracked(records, settings)
    found = annotations_of(records, locations=tests.locations, failed=tests.failed)
    return Report(
        summary=summary_table(records),
        tables=(
            *all_tables(records),
            *(() if beside is None or not beside.table else ((f"against {named(settings)}", beside.table),)),
        ),
        gates=gates_to_read(records),
        totals=totals(records),
        notes=tuple(notes),
        asides=tuple(asides),
        remarks=(*remarks, *problems),
        written=written,
        exit_status=FAILED if failed_late else BUDGET_EXHAUSTED if reasons else 0,
        reasons=reasons,
        open_runs=Counter(record.verdict.value for record in records if record.verdict in _OPEN),
        annotations=tuple(one.command() for one in found),
    )


def finish_without_runs(settings: Settings) -> Report | None:
    """What there is to say when copa tests failed before any of them came to a run; None for nothing.

    What an earlier session left as its latest report would be taken for this one's, so it goes.
    """
    from copa_harness.report.files import remove_latest

    try:
        removed = remove_latest(settings.report_dir)
    except CopaError as error:
        return Report(summary="no run came about", totals="runs: none", remarks=(str(error),))
    if not removed:
        return None
    where = _shown(settings.report_dir, settings.root)
    told = f"no run came about; the latest report in {where} was an earlier one's and is gone (its numbered copy stays)"
    return Report(summary=told, totals="runs: none")


def _unchecked(entries: Iterable[Entry]) -> list[str]:
    """Tests that passed by a failed gate, for they never asked."""
    remarks = []
    for entry in entries:
        if entry.record is None or entry.checked is not False:
            continue
        verdict_so_far = overall(gate for gate in entry.record.gates if not is_deferred(gate))
        if is_failure(verdict_so_far, undecided_fails=entry.undecided_fails):
            remarks.append(
                f"{entry.test}: a gate failed, but the test passed it by; call copa_run.check() in it",
            )
    return remarks


def _failures(entries: Iterable[Entry]) -> dict[str, dict[str, Any]]:
    """Failed attempts of all entries by kind: how many, and the first traceback."""
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        for kind, failed in entry.failures.items():
            known = found.setdefault(kind, {"count": 0, "first": failed.first})
            known["count"] += failed.count
    return dict(sorted(found.items()))


def _failed_attempts(failures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not failures:
        return []
    counts = ", ".join(f"{kind} {found['count']:,}" for kind, found in failures.items())
    return [
        f"attempts at calls that failed, those a retry mended included: {counts}; the first traceback of each "
        f"kind is in latest.json"
    ]


def accept_baselines(
    entries: Iterable[Entry], *, directory: Path, reports: Path
) -> tuple[list[tuple[Path, str]], list[str]]:
    """Write the baselines that runs are to become; of several for one file the last one stands.

    Args:
        entries: Of the session, in their order.
        directory: Where baselines lie.
        reports: Where the reports of earlier runs lie, which tell whether a run is the luckiest of several.

    Returns:
        The files written, each with what changed in it, and what a person should know.
    """
    from copa_harness.store.baselines import baseline_path, save_baseline
    from copa_harness.store.history import note_accepted

    found: dict[Path, Baseline] = {}
    remarks = []
    for entry in entries:
        baseline = entry.baseline
        if baseline is None:
            continue
        path = baseline_path(directory, task=baseline.task, name=baseline.name)
        if path in found and found[path].scores != baseline.scores:
            remarks.append(
                f"{baseline.task} ({baseline.name}): several runs of this session differ and are one baseline; the "
                f"last one was accepted, of {entry.test}"
            )
        found[path] = baseline
    written = []
    for path, baseline in found.items():
        if (n_draws := _luckiest_of(baseline, reports)) >= MIN_DRAWS_REFUSED:
            remarks.append(
                f"{baseline.task} ({baseline.name}): not accepted as baseline, for it is the best of {n_draws} runs "
                "that asked the same, which later runs would be held to. Next: --copa-bless --copa-repeat=3, which "
                "keeps every draw"
            )
            continue
        try:
            changed = _what_changed(path, baseline)
            written.append((save_baseline(directory, baseline), changed))
            note_accepted(directory, baseline)
        except (CopaError, OSError) as error:
            remarks.append(f"the baseline {path} could not be written ({error}); the older one, if any, is intact")
    return written, remarks


def _luckiest_of(baseline: Baseline, reports: Path) -> int:
    """How many runs asked the same and came to other scores, this one included, if none did better; else 0."""
    from copa_harness.report.history import MAX_HISTORY, numbered_reports, read_report

    if baseline.repeats or not baseline.requests:
        return 0
    draws = [dict(baseline.scores)]
    for path in numbered_reports(reports)[-MAX_HISTORY:]:
        try:
            runs = read_report(path).runs
        except CopaError:  # a report that cannot be read shows nothing
            continue
        draws += [dict(run.scores) for run in runs if run.requests == baseline.requests and run.scores not in draws]
    totals = [sum(score or 0.0 for score in draw.values()) for draw in draws]
    return len(draws) if totals[0] >= max(totals) else 0


def _what_changed(path: Path, accepted: Baseline) -> str:
    """What accepting a run does to the baseline that is in its place: nobody should bless a loss unawares."""
    from copa_harness.judge.paired_tests import pair_up
    from copa_harness.store.baselines import read_baseline

    now = f"score {number(accepted.score)} on {counted(len(accepted.scores), f'{accepted.split} example')}"
    if not path.exists():
        return f"{now}; the first one"
    try:
        older = read_baseline(path)
    except CopaError:
        return f"{now}; in place of a file that could not be read"
    parts = [part for part, digest in accepted.fingerprints.items() if older.fingerprints.get(part) != digest]
    if older.scores == accepted.scores and not parts:
        return f"{now}; as before"
    pairs = pair_up(older.scores, accepted.scores)
    moves = [after - before for before, after in zip(pairs.before, pairs.after, strict=True)]
    better, worse = sum(move > 0 for move in moves), sum(move < 0 for move in moves)
    changed = f"; changed: {', '.join(parts)}" if parts else ""
    in_common = "" if older.scores.keys() == accepted.scores.keys() else f" of {len(moves):,} in common"
    return f"{now}, was {number(older.score)}: {better} better, {worse} worse{in_common}{changed}"


def _spent(settings: Settings) -> list[str]:
    """What all processes of the session paid, beside its ceilings; nothing without any."""
    from copa_harness.lm.budget.cost import amount_of
    from copa_harness.lm.budget.ledger import RUNS_FOLDER

    budget = settings.total_budget
    is_here = settings.shared is None
    if budget is None or (is_here and not (settings.cache_dir / RUNS_FOLDER / f"{settings.run_id}.sqlite").exists()):
        return []
    try:
        with ExitStack() as opened:
            if (database := opened_database(settings)) is not None:
                opened.callback(database.close)
            ledger = opened.enter_context(closing(ledger_of(settings, database)))
            spent = ledger.spent
    except CopaError as error:
        return [f"what the session spent cannot be told: {error}"]
    parts = []
    for name, most in budget.ceilings.items():
        if name != "seconds":
            paid = f"${spent.usd:,.6g}" if name == "usd" else f"{amount_of(spent, name):,}"
            parts.append(f"{paid} of {ceiling(name, most)}")
    return [f"the whole session paid {', '.join(parts)}"] if parts else []


def _cut_short(n_cut: int) -> list[str]:
    if not n_cut:
        return []
    what = "evaluation or test was" if n_cut == 1 else "evaluations or tests were"
    return [
        f"budget exhausted: {n_cut} {what} cut short by the ceilings of the session, without a score; raise "
        f"--copa-total-budget and run again, what was answered is cached and free"
    ]


def _written(
    records: Sequence[RunRecord], more: Mapping[str, Any], *, settings: Settings, told: Told
) -> tuple[str, list[str]]:
    """Where the page was written, and what could not be written."""
    from copa_harness.report.files import write_reports
    from copa_harness.report.provenance import environment
    from copa_harness.report.pull_request import append_summary

    if settings.constrain:
        more = {**more, "constrained": True}
    made_in = environment(root=settings.root, seed=settings.seed, budget=settings.budget.name, lm=settings.lm, **more)
    try:
        paths = write_reports(settings.report_dir, records, environment=made_in, told=told)
    except CopaError as error:
        return "", [str(error)]
    try:
        append_summary(paths.comment)
    except OSError as error:
        return _shown(paths.page, settings.root), [f"the job's summary (GITHUB_STEP_SUMMARY) was not written: {error}"]
    return _shown(paths.page, settings.root), []


def _tracked(records: Sequence[RunRecord], settings: Settings) -> list[str]:
    from copa_harness.report.mlflow_tracking import track
    from copa_harness.report.provenance import git_commit

    assert settings.mlflow is not None
    problem = track(records, uri=settings.mlflow, commit=git_commit(settings.root))
    return [problem] if problem else []


def _shown(path: Path, root: Path) -> str:
    return str(path.relative_to(root) if path.is_relative_to(root) else path)
