"""DSPy's optimizers by name through the marker: each runs, keeps to its budget, and says in the report what ran."""

import json

# pytester forgets what an inner run imported; these are imported once, here, for all of them.
import dspy  # noqa: F401
import pytest

import copa_harness.evaluate.runner
import copa_harness.optimize.copa
import copa_harness.report.files
import copa_harness.session.session
import copa_harness.store.artifacts  # noqa: F401
from copa_harness.strategy import OPTIMIZER_NAMES

STRICT = ("-W", "error", "--strict-markers", "--strict-config", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")

CONFTEST = '''
import json
import dspy
import pytest
from dspy.clients.provider import Provider, TrainingJob
from copa_harness import ScriptedLM, Task


class Job(TrainingJob):
    def status(self):
        return "done" if self.done() else "running"


class Trainer(Provider):
    def __init__(self):
        super().__init__()
        self.finetunable = True
        self.TrainingJob = Job

    def __deepcopy__(self, memo):
        return self

    def finetune(self, job, model, train_data, train_data_format, train_kwargs=None):
        return model.split("@")[0] + f"@{len(train_data)}rows"


def shouted(example, prediction, trace=None):
    return prediction.answer == example.answer


def answer(messages, model):
    """Shouts when shown how, told how or trained; knows half of the words anyway."""
    text = messages[-1]["content"]
    if "[[ ## question ## ]]" not in text:
        return "what?"
    word = text.split("[[ ## question ## ]]")[1].strip().split()[0]
    knows = len(messages) > 2 or "@" in model or "SHOUT" in messages[0]["content"] or word[0] in "abc"
    return {"answer": word.upper() if knows and word != "fz" else word}


def write(messages):
    text = messages[-1]["content"]
    if "JSON object" in text:
        return json.dumps({"new_instruction": "SHOUT the word."})
    asked = [part.split(" ## ]]")[0] for part in text.split("Respond with")[-1].split("`[[ ## ")[1:]]
    return {name: "SHOUT the word." for name in asked if name != "completed"}


WORDS = [a + b for a in "abcdef" for b in "uvwxyz"]


def rows(words):
    return [dspy.Example(question=word, answer=word.upper()).with_inputs("question") for word in words]


@pytest.fixture(scope="session")
def copa_task():
    program = dspy.Predict(dspy.Signature("question -> answer", "Say the word."))
    return Task("shout", program, shouted, rows(WORDS[0::3]), rows(WORDS[2::3]), rows(WORDS[1::3]))


@pytest.fixture(scope="session")
def copa_base_lm(copa_session):
    gateway = copa_session.models.gateway
    return ScriptedLM(answer, model="scripted/shout", fingerprint=str, gateway=gateway, provider=Trainer())


@pytest.fixture(scope="session")
def copa_prompt_lm(copa_session):
    return ScriptedLM(write, model="scripted/writer", fingerprint="writer", gateway=copa_session.models.gateway)
'''

SUITE = """
import pytest

@pytest.mark.copa(OPTIONS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_optimizer(copa_run, strategy):
    assert copa_run.completed
    assert copa_run.usage.calls <= copa_run.budget.calls == 160
    assert copa_run.improvement >= 0
"""

SEQUENCES = ["gepa -> w", "w -> miprov2", "bootstrap_fewshot -> w -> copro", "p -> ensemble", "miprov2 -> ensemble"]


@pytest.fixture
def suite(pytester):
    pytester.makeconftest(CONFTEST)

    def run(strategies, *, options=""):
        source = SUITE.replace("OPTIONS", f"budget='calls=160', {options}").replace("STRATEGIES", repr(strategies))
        pytester.makepyfile(test_suite=source)
        result = pytester.runpytest_inprocess(*STRICT)
        return result, json.loads((pytester.path / "reports" / "latest.json").read_text())

    return run


def test_every_optimizer_and_sequences_of_them_run_within_the_budget_and_the_second_run_pays_nothing(suite):
    strategies = [*OPTIMIZER_NAMES, *SEQUENCES]
    result, report = suite(strategies)
    result.assert_outcomes(passed=len(strategies))
    assert [run["strategy"] for run in report["runs"] if run["strategy"] != "none"] == strategies
    for run in report["runs"]:
        if run["strategy"] in OPTIMIZER_NAMES:
            notes = " ".join(phase["note"] for phase in run["phases"])
            assert run["strategy"] in notes
            assert "result" in notes
    again, second = suite(strategies)
    again.assert_outcomes(passed=len(strategies))
    assert sum(run["usage"]["paid_calls"] for run in second["runs"]) == 0
    assert sum(run["usage"]["train_steps"] for run in second["runs"]) == 0
    assert [run["score"] for run in second["runs"]] == [run["score"] for run in report["runs"]]


def test_arguments_of_an_optimizer_reach_it_from_the_marker(suite):
    options = "optimizer_kwargs={'miprov2': {'auto': 'light', 'max_bootstrapped_demos': 0, 'max_labeled_demos': 0}}"
    result, report = suite(["miprov2"], options=options)
    result.assert_outcomes(passed=1)
    (run,) = [run for run in report["runs"] if run["strategy"] == "miprov2"]
    assert any("sized by its own arguments: auto='light'" in phase["note"] for phase in run["phases"])


def test_auto_says_in_terminal_and_report_what_it_chose_and_why(suite, pytester):
    result, _ = suite(["auto"])
    result.assert_outcomes(passed=1)
    said = "auto: p -> w -> p, because 24 labelled examples, a model that can be tuned"
    assert said in result.stdout.str() + result.stderr.str()
    assert said in (pytester.path / "reports" / "latest.json").read_text()


def test_limits_and_a_preference_are_kept_through_the_marker_and_told(suite, pytester):
    options = (
        "prefer='shortest within 100 points of best', "
        "constraints={'max_prompt_tokens': 400, 'required_text': 'Be brief.', 'forbidden_text': ['secret']}"
    )
    result, report = suite(["p", "miprov2"], options=options)
    result.assert_outcomes(passed=2)
    runs = [run for run in report["runs"] if run["strategy"] in ("p", "miprov2")]
    for run in runs:
        program = json.loads((pytester.path / "reports" / run["artifact"] / "program.json").read_text())
        assert "Be brief." in program["signature"]["instructions"]
        assert program["demos"] == []  # the shortest of all
        assert run["front"]
    told = (pytester.path / "reports" / "latest.json").read_text()
    assert "shortest" in told or "prompt tokens" in told
