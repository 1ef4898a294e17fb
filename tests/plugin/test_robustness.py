"""The gate `max_violation_rate` through the plugin: what is asked again, what it says, and that it is paid for once."""

import json

# pytester forgets what an inner run imported; these are imported once, here, for all of them.
import dspy  # noqa: F401
import pytest

import copa_harness.evaluate.runner
import copa_harness.judge.violations
import copa_harness.lm.factory
import copa_harness.optimize.copa
import copa_harness.report.files
import copa_harness.robustness.strategies
import copa_harness.session.session
import copa_harness.session.violations
import copa_harness.store.artifacts
import copa_harness.store.baselines  # noqa: F401

STRICT = ("-W", "error", "--strict-markers", "--strict-config", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")

CONFTEST = '''
import dspy
import pytest
from copa_harness import ScriptedLM, Task
from copa_harness.errors import ProviderError


def answer(messages):
    """Counts words; a tab confuses it, capitals make it babble, and of tuesdays the provider knows nothing."""
    text = messages[-1]["content"].split("[[ ## text ## ]]\\n")[1].split("\\n\\nRespond with")[0]
    if "Tuesday" in text:
        return ProviderError("no tuesdays")
    if text.isupper():
        return "WELL..."
    return {"answer": "0" if "\\t" in text else str(len(text.split()))}


def rows(start, stop):
    texts = [" ".join(["some", "words", "and", "more"][: 2 + i % 3] + [f"w{i}"]) for i in range(start, stop)]
    return [dspy.Example(text=t, answer=str(len(t.split()))).with_inputs("text") for t in texts]


@pytest.fixture(scope="session")
def copa_task():
    return Task("count", dspy.Predict("text -> answer"), lambda e, p, trace=None: e.answer == p.answer,
                rows(0, 6), rows(6, 12), rows(12, 22))


@pytest.fixture(scope="session")
def copa_base_lm(copa_session):
    return ScriptedLM(answer, fingerprint="counts", gateway=copa_session.models.gateway)
'''


@pytest.fixture
def suite(pytester):
    pytester.makeconftest(CONFTEST)

    def run(marker, *options, check="copa_run.check()"):
        source = f"""
            import pytest

            @pytest.mark.copa(strategy="none", {marker})
            def test_it(copa_run):
                {check}
            """
        pytester.makepyfile(source)
        return pytester.runpytest_inprocess(*STRICT, *options)

    return run


def latest(pytester):
    return json.loads((pytester.path / "reports" / "latest.json").read_text())["runs"][-1]


def gate_of(run):
    return next(gate for gate in run["gates"] if gate["gate"].startswith("max_violation_rate"))


def paid(run):
    return sum(phase["usage"]["paid_calls"] for phase in run["phases"])


def test_a_brittle_program_fails_with_the_smallest_change_and_the_second_run_pays_nothing(suite, pytester):
    marker = "max_violation_rate=0.1, perturbations=['white_space', 'field_order']"
    result = suite(marker)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*FAIL*max_violation_rate=0.1: got 0.7*at most 0.1*", "*smallest change that*"])
    first = latest(pytester)
    gate = gate_of(first)
    assert gate["details"]["smallest"].count("->") == 1  # one gap made a tab
    assert "\\t" in gate["details"]["smallest"]
    assert gate["details"]["smallest"].endswith("answered {'answer': '0'}")
    assert "field_order changes nothing here" in gate["message"]
    assert gate["details"]["low"] <= gate["details"]["rate"] <= gate["details"]["high"]
    assert 20 < paid(first) < 80
    suite(marker).assert_outcomes(failed=1)
    assert paid(latest(pytester)) == 0
    assert gate_of(latest(pytester)) == gate


def test_a_program_that_does_not_mind_passes(suite, pytester):
    suite("max_violation_rate=0.0, perturbations=['field_order', 'demo_order']").assert_outcomes(failed=1)
    assert gate_of(latest(pytester))["verdict"] == "error"  # one field and no demonstrations: nothing was changed
    suite("max_violation_rate=0.0, perturbations=['typos']").assert_outcomes(passed=1)
    assert gate_of(latest(pytester))["details"]["by_form"] == {"typos": {"held": 10}}


def test_answers_that_do_not_parse_are_told_apart_from_wrong_ones(suite, pytester):
    suite("max_violation_rate=0.0, perturbations=['case', 'case', 'case']").assert_outcomes(failed=1)
    found = gate_of(latest(pytester))["details"]["by_form"]
    assert sorted(found) == ["case", "case 2", "case 3"]
    outcomes = {outcome for form in found.values() for outcome in form}
    assert outcomes == {"held", "unparsed"}


def test_a_provider_that_fails_is_an_error_and_no_violation(suite, pytester):
    marker = "max_violation_rate=1.0, perturbations=['distractor', 'distractor', 'distractor', 'distractor']"
    suite(marker).assert_outcomes(failed=1)
    gate = gate_of(latest(pytester))
    assert gate["verdict"] == "error"
    assert "got no answer" in gate["message"]
    assert "no tuesdays" in gate["message"]


def test_check_measures_what_the_marker_did_not_ask_for_and_books_it(suite, pytester):
    suite("perturbations=['white_space']", check="copa_run.check(max_violation_rate=1.0)").assert_outcomes(passed=1)
    run = latest(pytester)
    assert gate_of(run)["verdict"] == "pass"
    assert [phase["phase"] for phase in run["phases"]] == ["test evaluation", "changed forms"]
    suite("perturbations=['white_space']").assert_outcomes(passed=1)
    assert [phase["phase"] for phase in latest(pytester)["phases"]] == ["test evaluation"]


def test_a_paraphrase_without_a_writer_is_refused_before_anything_is_spent(suite, pytester):
    result = suite("max_violation_rate=0.1, perturbations=['paraphrase']")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*no model to write it; remedy: name one with --copa-prompt-lm*"])
    assert not (pytester.path / "reports").exists()


def test_unknown_perturbations_are_refused_when_tests_are_collected(suite):
    result = suite("max_violation_rate=0.1, perturbations=['typo']")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*perturbations=*'typo'*expected a list of one or more of*Did you mean 'typos'*"])


def test_stopping_early_leaves_it_undecided_and_says_so(suite, pytester):
    suite("min_score=0.5, max_violation_rate=0.0", "--copa-sequential", "--copa-threads=2").assert_outcomes(passed=1)
    gate = gate_of(latest(pytester))
    assert gate["verdict"] == "undecided"
    assert "--copa-sequential" in gate["message"]


def test_a_plan_bounds_what_it_may_pay(suite):
    result = suite("max_violation_rate=0.0, perturbations=['case', 'typos']", "--copa-plan")
    result.stdout.fnmatch_lines(["*changed forms of the test split (at most)*60*"])


def test_a_robust_search_pays_for_its_forms_once(pytester):
    pytester.makeconftest(CONFTEST)
    source = """
        import pytest

        @pytest.mark.copa(strategy="p", budget="calls=60", n_proposed=0, n_reflected=0, perturbations=["typos"], {})
        def test_it(copa_run):
            copa_run.check()
        """
    paid_by = {}
    for marker in ("robust=False", "robust=True", "robust=True"):
        pytester.makepyfile(source.format(marker))
        pytester.runpytest_inprocess(*STRICT).assert_outcomes(passed=1)
        paid_by.setdefault(marker, []).append(paid(latest(pytester)))
    assert paid_by["robust=True"][0] > 0  # the plain search before it left only the forms to be paid for
    assert paid_by["robust=True"][1] == 0
