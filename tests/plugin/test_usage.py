"""Using the plugin wrongly, or not at all: one clear error each, and no trace where no copa test ran."""

import re

import pytest

# pytester forgets what an inner run imported; this is imported once, here, for all of them.
import copa_harness.session.options  # noqa: F401
from copa_harness.pytest_options import marker_text
from copa_harness.session.options import marker_options

STRICT = ("-W", "error", "--strict-markers", "--strict-config", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")


@pytest.fixture
def run(pytester):
    return lambda *arguments: pytester.runpytest_inprocess(*STRICT, *arguments)


def marked(pytester, arguments):
    pytester.makepyfile(f"import pytest\n@pytest.mark.copa({arguments})\ndef test_it(copa_run): pass\n")


def test_help_states_every_option_with_its_default(run):
    text = run("--help").stdout.str()
    for option in ("budget", "lm", "prompt-lm", "seed", "threads", "cache-dir", "report-dir", "disable", "bless"):
        assert f"--copa-{option}" in text
    assert text.count("[default:") >= 10
    assert "copa_budget" in text


def test_the_marker_is_documented(run):
    run("--markers").stdout.fnmatch_lines(["@pytest.mark.copa(strategy=*"])


def test_the_marker_is_documented_with_every_argument_it_takes():
    assert re.findall(r"^    (\w+): .", marker_text(), flags=re.M) == list(marker_options())


def test_wrong_marker_arguments_are_one_usage_error_that_names_them_all(pytester, run):
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.copa(min_scor=0.5)
        def test_unknown(copa_run): pass
        @pytest.mark.copa(min_score=85)
        def test_out_of_range(copa_run): pass
        @pytest.mark.copa(strategy="p -> v")
        def test_strategy(copa_run): pass
        @pytest.mark.copa("p")
        def test_positional(copa_run): pass
        @pytest.mark.copa
        def test_without_fixture(): pass
        @pytest.mark.copa
        @pytest.mark.parametrize("strategy", ["p", "mipro3"])
        def test_parametrized(copa_run, strategy): pass
        """
    )
    result = run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        [
            "ERROR: *test_unknown: copa marker: unknown argument 'min_scor'. Did you mean 'min_score'?*",
            "ERROR: *test_out_of_range: *min_score=85; expected a number from 0 to 1*",
            "ERROR: *test_strategy: copa marker: *'v'*",
            "ERROR: *test_positional: *positional argument 'p'; expected keywords, for instance copa(strategy='p')*",
            "ERROR: *test_without_fixture: *nothing would run; add copa_run to its arguments*",
            "ERROR: *test_parametrized[[]mipro3[]]: *Did you mean 'miprov2'?*",
        ]
    )
    assert "Traceback" not in result.stderr.str() + result.stdout.str()


@pytest.mark.parametrize(
    ("arguments", "environment", "ini", "source"),
    [
        (["--copa-budget=lite"], {"COPA_BUDGET": "light"}, "light", "--copa-budget"),
        ([], {"COPA_BUDGET": "lite"}, "light", "environment variable COPA_BUDGET"),
        ([], {}, "lite", "ini option copa_budget"),
    ],
)
def test_the_strongest_source_of_a_setting_wins_and_is_named(
    pytester, run, monkeypatch, arguments, environment, ini, source
):
    marked(pytester, "")
    pytester.makeini(f"[pytest]\ncopa_budget = {ini}\n")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = run(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {source}: *lite*"])


def test_collection_shows_the_ceilings_in_one_line_and_writes_nothing(pytester, run):
    marked(pytester, "")
    before = sorted(pytester.path.iterdir())
    result = run("--collect-only", "--copa-budget=calls=12")
    result.stdout.fnmatch_lines(["copa: budget calls=12 = 12 calls per run, lm embedded, seed 0, cache .copa_cache"])
    assert [path for path in pytester.path.iterdir() if path not in before and path.name != "__pycache__"] == []


def test_deselected_copa_tests_leave_no_trace(pytester, run):
    marked(pytester, "min_scor=1")
    pytester.makepyfile(test_other="def test_other(): pass")
    result = run("-k", "other")
    result.assert_outcomes(passed=1, deselected=1)
    assert "copa: budget" not in result.stdout.str()


@pytest.mark.parametrize("how", ["option", "environment", "ini"])
def test_disabled_copa_tests_are_skipped_with_the_reason(pytester, run, monkeypatch, how):
    marked(pytester, "min_scor=1")
    if how == "environment":
        monkeypatch.setenv("COPA_DISABLE", "1")
    if how == "ini":
        pytester.makeini("[pytest]\ncopa_disable = true\n")
    result = run("-rs", *(["--copa-disable"] if how == "option" else []))
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*copa tests are disabled (--copa-disable)*"])
    assert not (pytester.path / ".copa_cache").exists()


def test_without_a_task_the_error_says_how_to_define_one(pytester, run):
    marked(pytester, "")
    result = run()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*no task to test: define a fixture copa_task*"])
    assert "Traceback" not in result.stdout.str()


@pytest.mark.parametrize("missing", ["cacheprovider", "terminal", "xdist"])
def test_a_plain_suite_runs_without_other_plugins(pytester, run, missing):
    pytester.makepyfile("def test_plain(): pass")
    assert run("-p", f"no:{missing}").ret == 0
