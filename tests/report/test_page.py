"""The page: what stands on it, that nothing on it is obeyed, and that it works in a browser."""

import os
import shutil
from dataclasses import replace

import pytest

from copa_harness.judge.intervals import mean_interval
from copa_harness.report.examples import (
    MAX_CHARACTERS,
    NOTHING_TOLD,
    RunDetails,
    Told,
    examples_shown,
    text_of,
)
from copa_harness.report.page import changes, curve_of, folded, page_html
from copa_harness.report.records import RunRecord
from copa_harness.results import EvaluationResult, ExampleResult, GateResult, Verdict
from tests.report.conftest import optimization

EVIL = "<script>alert(1)</script><img src=http://example.com/x onerror=alert(2)>\x1b[31m\u202egnp.exe{{ 7*7 }}\"'"


def evaluation(scores, answer="yes"):
    rows = tuple(
        ExampleResult(f"e{i}", score, inputs={"question": f"q{i}"}, expected={"answer": "yes"}, predicted={"a": answer})
        for i, score in enumerate(scores)
    )
    return EvaluationResult("test", "m", rows, mean_interval(scores))


BEFORE, AFTER = evaluation([1.0, 0.0, 0.0, 1.0], "no"), evaluation([0.0, 1.0, 0.0, 1.0])


def record(strategy, result, **more):
    names = {"test": f"t::{strategy}", "task": "iris", "strategy": strategy, "lm": "embedded", "split": "test"}
    return RunRecord.from_evaluation(result, **names | more)


def trial(score, n=10, outcome="complete"):
    return {"study": "p", "outcome": outcome, "n": n, "score": score, "n_validation": 20}


FAILED = GateResult("max_regression=0.05", Verdict.FAIL, "a drop is shown")
RUNS = [
    record("none", BEFORE),
    record("p", AFTER, gates=(FAILED,), optimization=optimization(score_before=0.5, score_after=0.8)),
]
DETAILS = RunDetails(
    examples=examples_shown(AFTER, BEFORE),
    n_examples=4,
    prompts_before={"self": "Say\nthe flower."},
    prompts_after={"self": "Say\nthe right flower."},
    trials=(trial(0.4), trial(0.7), trial(0.6, 5, "dropped")),
    fingerprints={"data": "abc"},
)
TOLD = Told(details={0: replace(DETAILS, examples=examples_shown(BEFORE, None), trials=()), 1: DETAILS})


def page(runs=RUNS, told=TOLD, **environment):
    return page_html(runs, environment=environment, told=told)


def test_examples_that_got_worse_come_first():
    assert [(row.id, row.change) for row in examples_shown(AFTER, BEFORE)] == [
        ("e0", "worse"),
        ("e1", "better"),
        ("e2", "same"),
        ("e3", "same"),
    ]
    assert {row.change for row in examples_shown(AFTER, None)} == {"same"}


def test_where_there_is_an_accepted_result_examples_are_compared_with_it():
    shown = examples_shown(AFTER, BEFORE, accepted={"e1": 1.0, "e3": 0.0})
    assert {row.id: row.change for row in shown} == {"e0": "worse", "e1": "same", "e2": "same", "e3": "better"}
    text = page(told=Told(details={1: replace(DETAILS, examples=shown)}))
    assert "Compared with the accepted result." in text
    assert "Score of the accepted result 0.000, as written 1.000, now 1.000." in text


def test_long_texts_are_cut_in_the_middle_and_credentials_are_masked():
    text = text_of("a" * MAX_CHARACTERS + "z" * MAX_CHARACTERS)
    assert text.startswith("aaa")
    assert text.endswith("zzz")
    assert "2,000 characters left out" in text
    assert "sk-abcdefghijklmnopqrstuvwxyz123456" not in text_of("key sk-abcdefghijklmnopqrstuvwxyz123456")


def test_what_needs_attention_is_open_and_told_first():
    text = page(commit="0123456789abcdef")
    assert text.index("What did not pass") < text.index(">Runs<")
    assert 'id="run-2" open' in text
    assert 'id="run-1" open' not in text
    assert "a drop is shown" in text
    assert "commit 0123456789" in text
    assert "What did not pass" not in page([RUNS[0]])


def test_a_prompt_is_shown_as_what_changed_and_as_it_is_sent():
    text = page()
    assert "Say\nthe <ins>right </ins>flower." in text
    same = replace(DETAILS, prompts_before=DETAILS.prompts_after)
    assert "the program: as written" in page(told=Told(details={1: same}))
    assert changes("a\nb\n", "a\nb\n") == []
    assert changes("a b c\n", "a x c\n") == [("same", "a "), ("gone", "b"), ("new", "x"), ("same", " c\n")]


def test_what_did_not_change_is_folded_to_its_length():
    same = "".join(f"line {i}\n" for i in range(20))
    pieces = folded(changes(same + "old\n", same + "new\n"))
    assert ("folded", "[17 lines as before]\n") in pieces
    assert pieces[-2:] == [("gone", "old"), ("new", "new")] or [kind for kind, _ in pieces][-3:] == [
        "gone",
        "new",
        "same",
    ]


def test_a_search_is_a_staircase_of_the_best_score_over_the_examples_it_scored():
    curve = curve_of([trial(0.4), trial(0.7), trial(0.6, 5, "dropped")], start=0.5)
    assert (curve.n, curve.low, curve.high) == (25, 0.4, 0.7)
    assert [dropped for *_, dropped in curve.dots] == [False, False, True]
    assert curve.text.endswith("the best went from 0.500 to 0.700")
    assert curve_of([], start=0.5) is None


def test_whatever_a_model_writes_is_text():
    rows = (ExampleResult("e", 0.0, inputs={EVIL: EVIL}, expected={"a": EVIL}, predicted={"a": EVIL}, error=EVIL),)
    result = EvaluationResult("test", EVIL, rows, mean_interval([0.0]))
    gate = GateResult(EVIL, Verdict.FAIL, EVIL)
    runs = [record(EVIL, result, task=EVIL, gates=(gate,), test=EVIL, optimization=optimization(notes=(EVIL,)))]
    details = RunDetails(
        examples=examples_shown(result, result),
        n_examples=1,
        prompts_before={EVIL: "x"},
        prompts_after={EVIL: EVIL},
        trials=({**trial(0.4), "study": EVIL}, trial(0.7)),
        fingerprints={EVIL: EVIL},
    )
    text = page(runs, Told(details={0: details}, notes=(EVIL,), remarks=(EVIL,)), **{EVIL: EVIL, "lm": EVIL})
    assert text.count("<script>") == 1
    assert "<img" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "&lt;U+202E&gt;" in text
    assert "{{ 7*7 }}" in text  # nothing is a template twice


def test_the_page_needs_nothing_else():
    text = page()
    assert "default-src 'none'" in text
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text


def test_a_report_without_runs_is_a_page():
    assert "runs: none" in page([], NOTHING_TOLD)


# In a browser


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    known = [os.environ.get("CHROMIUM"), *map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))]
    path = next((one for one in known if one), None)
    if path is None:
        pytest.skip("no Chromium found (apt-get install chromium, or CHROMIUM=path)")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """A function that opens the page at a width; what it asked of the network and said on the console is kept."""
    file = tmp_path / "latest.html"
    gate = GateResult("min_score=0.9", Verdict.FAIL, EVIL)
    rows = (*AFTER.results, ExampleResult("evil", 0.0, inputs={"q": EVIL}, expected={"a": EVIL}, predicted={"a": EVIL}))
    after = EvaluationResult("test", "m", rows, mean_interval([row.score for row in rows]))
    details = replace(DETAILS, examples=examples_shown(after, BEFORE), n_examples=5)
    runs = [RUNS[0], record("p", after, gates=(FAILED, gate), optimization=RUNS[1].optimization)]
    file.write_text(page(runs, Told(details={0: TOLD.details[0], 1: details}), versions={"dspy": "3.4.1"}))
    contexts = []

    def open_at(width, *, dark=False):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light"
        )
        contexts.append(context)
        shown = context.new_page()
        shown.requests, shown.said = [], []
        shown.on("request", lambda request: shown.requests.append(request.url))
        shown.on("console", lambda message: shown.said.append(message.text))
        shown.on("pageerror", lambda error: shown.said.append(str(error)))
        shown.on("dialog", lambda dialog: (shown.said.append(dialog.message), dialog.dismiss()))
        shown.goto(file.as_uri())
        return shown

    yield open_at
    for context in contexts:
        context.close()


def visible(shown):
    return shown.locator("#run-2 .ex:visible").count()


def test_the_filter_shows_what_got_worse_and_a_row_opens(opened):
    shown = opened(1280)
    assert visible(shown) == 5
    shown.click("#run-2 button[data-show=worse]")
    assert visible(shown) == 1
    assert shown.get_attribute("#run-2 button[data-show=worse]", "aria-pressed") == "true"
    assert shown.inner_text("#run-2 .examples [role=status]") == "1 got worse shown"
    shown.click("#run-2 .ex.worse > summary")
    assert shown.inner_text("#run-2 .ex.worse .sides pre >> nth=2") == "no"
    assert shown.inner_text("#run-2 .ex.worse .sides pre >> nth=3") == "yes"
    shown.click("#run-2 button[data-show=all]")
    assert visible(shown) == 5


def test_a_link_opens_its_run(opened):
    shown = opened(1280)
    assert not shown.evaluate("document.getElementById('run-1').open")
    shown.click("table.runs a[href='#run-1']")
    shown.wait_for_function("document.getElementById('run-1').open")


@pytest.mark.parametrize("width", [390, 820, 1100, 1280])
def test_no_request_leaves_nothing_is_run_and_nothing_sticks_out(opened, width):
    shown = opened(width, dark=width == 820)
    shown.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    shown.wait_for_timeout(100)
    assert [url for url in shown.requests if not url.startswith(("file:", "data:"))] == []
    assert shown.said == []
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.evaluate("(one => one.scrollWidth - one.clientWidth)(document.querySelector('.scroll'))") <= 0
    if width >= 1100:  # long names break, so that no table has to be scrolled
        wider = "[...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth).length"
        words = "document.querySelectorAll('.scroll td:nth-child(2):not([style*=right])')"
        shown.evaluate(f"{words}.forEach(one => one.append('_x'.repeat(60)))")
        assert shown.evaluate(wider) == 0


def test_a_screen_reader_gets_names_and_a_table(opened):
    shown = opened(390)
    assert shown.locator("html").get_attribute("lang") == "en"
    assert shown.get_by_role("table", name="Every run with its score").count() == 1
    assert shown.get_by_role("row").count() >= 3
    assert shown.get_by_role("img", name="candidates over").count() == 1
    nameless = (
        "[...document.querySelectorAll('button, summary, a, [role=region]')].filter(e => !e.textContent.trim()).length"
    )
    assert shown.evaluate(nameless) == 0
