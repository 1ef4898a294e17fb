import re
from dataclasses import replace

from copa_harness.report.examples import NOTHING_TOLD, Told
from copa_harness.report.pull_request import MARK, MAX_COMMENT, annotations_of, append_summary, comment_text, headline
from copa_harness.results import GateResult, Usage, Verdict
from tests.report.test_summary import BASE, BETTER, REGRESSION

WORSE = replace(BETTER, test="suites/test_a.py::test_p", gates=(REGRESSION,), verdict=Verdict.FAIL)
LOCATIONS = {"suites/test_a.py::test_p": ("suites/test_a.py", 7)}


def comment(*runs, told=NOTHING_TOLD):
    return comment_text(runs, environment={"seed": 0, "commit": "abc"}, told=told)


def test_the_first_line_says_what_got_worse_by_how_much_and_whether_it_could_be_noise():
    first = comment(BASE, WORSE).splitlines()[1]
    assert "Worse than the accepted result: iris, p: -0.240" in first
    assert "on 75 examples, 18 worse and 0 better" in first
    assert "chance would do this with p \\< 0.0001" in first
    assert "Worse than main" in headline([WORSE], told=Told(against="main"))


def test_an_unchanged_suite_is_one_line_and_says_what_it_paid():
    same = GateResult("max_regression=0.05", Verdict.PASS, "nothing changed", {"difference": 0.0, "n": 75})
    said = headline([BASE, replace(BETTER, gates=(same,), usage=Usage(cached_calls=5))], told=NOTHING_TOLD)
    assert said == "No run is worse than the accepted result: 2 pass, 0 calls paid."


def test_what_failed_otherwise_what_was_cut_short_and_what_is_open_is_said():
    low = GateResult("min_score=0.9", Verdict.FAIL, "got 0.76, expected at least 0.9.")
    assert headline([replace(BETTER, gates=(low,), verdict=Verdict.FAIL)], told=NOTHING_TOLD).startswith(
        "Failed: iris, p: min_score=0.9: got 0.76"
    )
    unsure = replace(BETTER, gates=(replace(low, verdict=Verdict.UNDECIDED),), verdict=Verdict.UNDECIDED)
    assert headline([unsure], told=NOTHING_TOLD) == "Nothing failed; 1 run could not be decided: iris, p."
    assert headline([BASE], told=Told(remarks=("budget exhausted: ...",))) == "budget exhausted: ..."


def test_the_comment_has_its_mark_the_table_the_gates_and_the_receipt():
    text = comment(BASE, WORSE, told=Told(notes=("said",), remarks=("mind this",)))
    assert text.startswith(MARK)
    assert "| iris" in text
    assert "- **fail** iris, p: `max_regression=0.05`: a drop is shown" in text
    assert text.index("mind this") < text.index("<details>") < text.index("- said")


def test_markup_of_others_is_text_in_the_comment():
    evil = "</details><img src=x> @everyone #1 [a](b) \x1b[31m\u202e | cell"
    gate = GateResult("min_score=0.9", Verdict.FAIL, evil)
    text = comment(replace(WORSE, task="a|b<i>", gates=(gate,)), told=Told(notes=(evil,)))
    assert re.search(r"(?<!\\)<img", text) is None
    assert "@everyone" not in text  # GitHub looks for names after Markdown is read: a comment keeps them apart
    assert "#1" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert text.count("</details>") == 1
    assert "<i>" not in text


def test_a_comment_is_never_longer_than_github_takes():
    gate = GateResult("min_score=0.9", Verdict.FAIL, "x" * 5000)
    many = [replace(WORSE, task=f"t{i}", gates=(gate,)) for i in range(30)]
    assert len(comment(*many)) < MAX_COMMENT + 100


def test_annotations_stand_at_the_line_of_the_test():
    unsure = GateResult("min_score=0.9", Verdict.UNDECIDED, "50 % of\nrows, or: so")
    record = replace(WORSE, gates=(REGRESSION, unsure))
    found = [one.command() for one in annotations_of([record], locations=LOCATIONS, failed={})]
    assert found == [
        "::error file=suites/test_a.py,line=7,title=iris%2C p%3A fail::max_regression=0.05: a drop is shown",
        "::warning file=suites/test_a.py,line=7,title=iris%2C p%3A undecided::min_score=0.9: 50 %25 of%0Arows, or: so",
    ]


def test_a_test_that_failed_by_itself_is_annotated_once():
    failed = {"suites/test_a.py::test_p": "assert 0.5 > 0.9"}
    (one,) = annotations_of([BASE], locations=LOCATIONS, failed=failed)
    assert (one.level, one.line, one.message) == ("error", 7, "assert 0.5 > 0.9")
    (same,) = annotations_of([WORSE], locations=LOCATIONS, failed=failed)
    assert same.message.endswith("a drop is shown")


def test_the_jobs_summary_gets_the_comment(tmp_path, monkeypatch):
    (tmp_path / "comment.md").write_text("said\n")
    append_summary(tmp_path / "comment.md")  # nobody asked
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    (tmp_path / "summary.md").write_text("before\n")
    append_summary(tmp_path / "comment.md")
    assert (tmp_path / "summary.md").read_text() == "before\nsaid\n"
