"""Settings and marker arguments: one precedence, every refusal names its source and the way out."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from copa_harness.errors import ConfigurationError
from copa_harness.judge.options import Gates
from copa_harness.optimize.options import SearchOptions
from copa_harness.option_fields import Place, options_of
from copa_harness.pytest_options import worker_number
from copa_harness.session.options import Setting, Settings, marker_arguments, marker_options

ROOT = Path("/somewhere")


def settings(**given):
    return Settings.from_given({name: Setting(value, f"--copa-{name}") for name, value in given.items()}, root=ROOT)


def marker(**keywords):
    return marker_arguments((), keywords)


def test_defaults_are_light_embedded_and_below_the_root():
    plain = settings()
    assert (plain.budget.calls, plain.lm, plain.seed) == (400, "embedded", 0)
    assert plain.cache_dir == ROOT / ".copa_cache"
    assert plain.report_dir == ROOT / "reports"


def test_a_marker_changes_what_nobody_forced():
    merged = settings().merged(**marker(budget="calls=7", seed=3, lm="hf:x"))
    assert (merged.budget.calls, merged.seed, merged.lm) == (7, 3, "hf:x")


def test_a_given_setting_overrules_the_marker():
    merged = settings(budget="medium", seed="1").merged(**marker(budget="calls=7", seed=3, threads=2))
    assert (merged.budget.calls, merged.seed, merged.threads) == (1600, 1, 2)


def test_the_ceiling_on_answers_is_no_gate_and_a_marker_may_set_it():
    assert settings().answer_tokens is None
    assert settings().merged(**marker(answer_tokens=40, max_tokens=9000)).answer_tokens == 40
    assert settings(answer_tokens="60").merged(**marker(answer_tokens=40)).answer_tokens == 60


def test_absolute_directories_are_kept():
    assert settings(cache_dir="/elsewhere/cache").cache_dir == Path("/elsewhere/cache")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("budget", "lite", "--copa-budget: .*lite.*'light'"),
        ("seed", "x", "--copa-seed: got 'x', expected a whole number, 0 or more"),
        ("threads", "0", "--copa-threads: got '0', expected a whole number, 1 or more"),
        ("lm", " ", "--copa-lm: got an empty value"),
    ],
)
def test_an_unusable_value_is_refused_by_its_source(name, value, message):
    with pytest.raises(ConfigurationError, match=message):
        settings(**{name: value})


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"min_scor": 0.5}, "unknown argument 'min_scor'. Did you mean 'min_score'"),
        ({"budgte": "light"}, "Did you mean 'budget'"),
        ({"zzz": 1}, "unknown argument 'zzz'. Known arguments: strategy, budget"),
        ({"min_score": 85}, "min_score=85; expected a number from 0 to 1; write 0.85 for 85 %"),
        ({"min_score": True}, "min_score=True"),
        ({"max_regression": "5%"}, "max_regression='5%'"),
        ({"max_calls": -1}, "max_calls=-1; expected a whole number"),
        ({"strategy": 3}, "strategy=3; expected a strategy"),
        ({"strategy": "p -> v"}, "copa marker: .*'v'"),
        ({"budget": "lots"}, "copa marker: .*'lots'"),
        ({"optimizer_kwargs": [1]}, "optimizer_kwargs=.*a dictionary"),
        ({"lora": 8}, "lora=8; expected a dictionary of LoRA settings"),
        ({"lora": {"learnign_rate": 1}}, r"copa marker: .*learnign_rate; .*Did you mean 'learning_rate'\?"),
        ({"lora": {"rank": 0}}, "copa marker: LoRA setting rank: got 0"),
        ({"lora": {"demonstrations": "some"}}, "expected one of mix, keep, drop"),
        ({"max_cycles": 0}, "max_cycles=0; expected a whole number, 1 or more"),
        ({"sampler": "cmaes"}, "copa marker: got 'cmaes' as the sampler; expected one of tpe, random, gp"),
        ({"groundings": "data"}, r"groundings='data'; expected a list, for instance \['data'"),
        ({"groundings": ["data", "weather"]}, "copa marker: .*weather.*expected a list of one or more of all, data"),
        ({"n_reflected": -1}, "n_reflected=-1; expected a whole number, 0 or more"),
        ({"bootstrap": 1}, "bootstrap=1; expected True or False"),
        ({"pass_score": 2}, "pass_score=2; expected a number from 0 to 1"),
        ({"n_demo_set": 2}, "Did you mean 'n_demo_sets'"),
        ({"constraints": {"max_tokens": 3}}, r"copa marker: .*\['max_tokens'\]; expected some of max_prompt_tokens"),
        ({"constraints": {"forbidden_text": [3]}}, r"copa marker: got forbidden_text=\[3\]; expected a text or a list"),
        ({"constraints": {"max_prompt_tokens": 0.5}}, "max_prompt_tokens=0.5; expected a whole number of at least 1"),
        ({"optimizer_kwargs": {"gepaa": {}}}, r"copa marker: .*'gepaa'.*Did you mean 'gepa'\?"),
        ({"optimizer_kwargs": {"ensemble": {"sise": 3}}}, r"'sise'\] for ensemble; .* Did you mean 'size'\?"),
        ({"optimizer_kwargs": {"knn_fewshot": {"n": 3}}}, "for knn_fewshot; expected some of k, max_boot"),
        ({"optimizer_kwargs": {"miprov2": {"nonsense": 1}}}, r"\['nonsense'\] for miprov2; expected some of auto, "),
        ({"optimizer_kwargs": {"gepa": {"use_marge": 1}}}, r"Did you mean 'use_merge'\?"),
        ({"optimizer_kwargs": {"gepa": {3: 1}}}, "for gepa; expected a dictionary of its arguments by name"),
        ({"undecided_fails": 1}, "undecided_fails=1; expected True or False"),
    ],
)
def test_a_wrong_marker_argument_is_refused_by_name(keywords, message):
    with pytest.raises(ConfigurationError, match=message):
        marker(**keywords)


def test_every_argument_of_copa_is_the_markers_or_left_out_on_purpose():
    import inspect

    from copa_harness import COPA

    of_task_or_session = {"metric", "finetune_data", "journal", "on_progress", "search"}
    named = set(inspect.signature(COPA).parameters) - of_task_or_session
    assert named <= set(marker_options())
    assert set(options_of(SearchOptions)) - set(marker_options()) == {"held_out_share"}  # a LoRA setting


def test_what_the_marker_says_of_the_search_reaches_copa():
    given = {
        "sampler": "gp",
        "pass_score": 0.5,
        "groundings": ["data"],
        "n_reflected": 0,
        "bootstrap": False,
        "n_demo_sets": 2,
        "lora": {"rank": 2},
    }
    from copa_harness import COPA

    said = settings().merged(**marker(strategy="p", min_score=0.9, **given)).search
    assert said == given
    search = COPA(metric=lambda example, prediction, trace=None: 1.0, **said).settings
    assert (search.sampler, search.pass_score, search.groundings, search.n_reflected) == ("gp", 0.5, ("data",), 0)
    assert (search.bootstrap, search.n_demo_sets, search.lora) == (False, 2, {"rank": 2})
    assert settings().merged(**marker(strategy="p")).search == {}


def test_positional_marker_arguments_are_refused_with_the_keyword_to_write():
    with pytest.raises(ConfigurationError, match=r"copa\(strategy='p'\)"):
        marker_arguments(("p",), {})


def test_the_description_says_the_ceiling_and_whether_markers_may_change_it():
    assert settings().describe() == (
        "copa: budget light = 400 calls per run (unless a marker says otherwise), lm embedded, seed 0, "
        "cache .copa_cache"
    )
    assert "heavy = 6,400 calls per run, lm" in settings(budget="heavy").describe()


def test_every_gate_has_a_marker_argument_and_an_ini_default_and_no_environment_variable():
    gates = options_of(Gates)
    assert {name for name, gate in gates.items() if gate.places == Place.MARKER | Place.INI} == {
        name for name, gate in gates.items() if gate.places
    }
    assert set(gates) - set(marker_options()) == {"alpha"}


def test_a_marker_overrules_the_defaults_of_gates():
    plain = Settings.from_given(
        {
            "min_score": Setting("0.5", "ini option copa_min_score", overrules_marker=False),
            "max_calls": Setting("30", "ini", overrules_marker=False),
        },
        root=ROOT,
    )
    merged = plain.merged(**marker(min_score=0.9, max_usd=2))
    assert merged.gates == {"min_score": 0.9, "max_calls": 30, "max_usd": 2}


def test_of_search_options_the_ini_file_gives_defaults_and_the_environment_overrules_the_marker():
    session = Settings.from_given(
        {
            "n_proposed": Setting("2", "ini", overrules_marker=False),
            "n_rounds": Setting("5", "ini", overrules_marker=False),
            "sampler": Setting("gp", "environment variable COPA_SAMPLER"),
        },
        root=ROOT,
    )
    assert session.search == {"n_proposed": 2, "n_rounds": 5, "sampler": "gp"}
    merged = session.merged(**marker(n_proposed=3, sampler="random"))
    assert merged.search == {"n_proposed": 3, "n_rounds": 5, "sampler": "gp"}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_calls", "4e2", 400),
        ("epsilon", "0.05", 0.05),
        ("bootstrap", "off", False),
        ("groundings", "data, history", ["data", "history"]),
        ("lora", '{"rank": 2, "learn_from_demos": true}', {"rank": 2, "learn_from_demos": True}),
        ("constraints", "{'max_prompt_tokens': 9}", {"max_prompt_tokens": 9}),
        ("prefer", "cheapest within 1 point of best", "cheapest within 1 point of best"),
    ],
)
def test_options_are_read_from_text(name, text, value):
    session = Settings.from_given({name: Setting(text, "ini")}, root=ROOT)
    assert {**session.gates, **session.search} == {name: value}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("n_proposed", "many", "here: got 'many', expected a whole number, 0 or more"),
        ("bare_share", "20", "here: got '20', expected a number from 0 to 1; write 0.2 for 20 %"),
        ("lora", "rank=2", "here: got 'rank=2', expected a dictionary of LoRA settings"),
        ("lora", "{'rnak': 2}", "here: got the LoRA settings rnak; .*Did you mean 'rank'"),
        ("sampler", "cmaes", "here: got 'cmaes' as the sampler; expected one of tpe"),
    ],
)
def test_an_unusable_text_of_a_search_option_is_refused_by_its_source(name, text, message):
    with pytest.raises(ConfigurationError, match=message):
        Settings.from_given({name: Setting(text, "here")}, root=ROOT)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"better_than": ""}, "better_than=''; expected the name of a strategy or baseline"),
        ({"max_usd": float("inf")}, "max_usd=inf; expected a number, 0 or more"),
        ({"max_tokens": "1e6"}, "max_tokens='1e6'; expected a number, 0 or more"),
        ({"min_pass_all": 90}, "min_pass_all=90; expected a number from 0 to 1"),
    ],
)
def test_a_wrong_gate_is_refused_by_name(keywords, message):
    with pytest.raises(ConfigurationError, match=message):
        marker(**keywords)


def test_the_description_says_ceilings_of_run_and_session_and_the_modes():
    text = settings(budget="calls=500,usd=2", total_budget="calls=9000", sequential="true").describe()
    assert "budget calls=500,usd=2 = 500 calls, $2 per run, 9,000 calls for the whole session, lm embedded" in text
    assert "seed 0, stopping early, cache" in text


@pytest.mark.parametrize(("workerid", "number"), [(None, None), ("gw0", 0), ("gw12", 12), ("mine", 0)])
def test_a_process_knows_its_number_among_the_workers(workerid, number):
    config = SimpleNamespace() if workerid is None else SimpleNamespace(workerinput={"workerid": workerid})
    assert worker_number(config) == number
