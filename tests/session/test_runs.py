"""The session without pytest's hooks: what is shared, what is recorded, and what the test split is asked."""

import dspy
import pytest
from dspy.clients.provider import Provider, TrainingJob

from copa_harness import ScriptedLM, Task
from copa_harness.errors import ConfigurationError
from copa_harness.session import CopaSession, Settings

WORDS = [a + b for a in "abcdef" for b in "uvwxyz"]


def shouted(example, prediction, trace=None):
    return prediction.answer == example.answer


def rows(words):
    return [dspy.Example(question=word, answer=word.upper()).with_inputs("question") for word in words]


def answer(messages, model):
    """Right when shown how or trained, else repeats the question."""
    word = messages[-1]["content"].split("[[ ## question ## ]]")[1].strip().split()[0]
    return {"answer": word.upper() if len(messages) > 2 or "@" in model else word}


class Job(TrainingJob):
    def status(self):
        return "done" if self.done() else "running"


class Trainer(Provider):
    """Fine-tunes in no time: the tuned model is the same script under another name."""

    def __init__(self):
        super().__init__()
        self.finetunable = True
        self.TrainingJob = Job
        self.n_trained = 0

    def __deepcopy__(self, memo):
        return self

    def finetune(self, job, model, train_data, train_data_format, train_kwargs=None):
        self.n_trained += 1
        return f"{model}@{len(train_data)}rows"


@pytest.fixture
def task():
    program = dspy.Predict("question -> answer")
    return Task("shout", program, shouted, rows(WORDS[:12]), rows(WORDS[12:18]), rows(WORDS[18:]))


@pytest.fixture
def settings(tmp_path):
    return Settings(root=tmp_path, cache_dir=tmp_path / "cache", report_dir=tmp_path / "reports")


@pytest.fixture
def session(settings):
    with CopaSession(settings) as session:
        yield session


def scripted(session, provider=None):
    return ScriptedLM(
        answer, model="scripted/shout", fingerprint=lambda name: name, gateway=session.models.gateway, provider=provider
    )


def records(session):
    return [entry.record for entry in session.entries]


def test_the_test_split_is_asked_by_final_evaluations_only(session, task):
    lm = scripted(session)
    run = session.run(task, lm=lm, settings=session.settings.merged(strategy="p"))
    asked_of_test = {word for word in WORDS[18:] if any(f"\n{word}\n" in r.prompt for r in lm.requests)}
    n_before = sum(any(f"\n{word}\n" in request.prompt for word in WORDS[18:]) for request in lm.requests)
    assert asked_of_test == set(WORDS[18:])
    assert n_before == 2 * 18  # once as written, once optimized
    assert run.score == 1.0


def test_an_optimization_is_made_once_and_its_cost_told_once(session, task):
    lm = scripted(session)
    asked = session.settings.merged(strategy="p")
    first, second = (session.run(task, lm=lm, settings=asked, test=name) for name in ("first", "second"))
    assert first.usage.paid_calls > 0
    assert second.usage.paid_calls == 0
    assert second.usage.cached_calls == first.usage.paid_calls
    assert second.program is first.program
    paid = sum(record.usage.paid_calls for record in records(session))
    assert paid == lm.calls


def test_another_session_finds_it_on_disk(settings, task):
    asked = settings.merged(strategy="p")
    with CopaSession(settings) as session:
        first = session.run(task, lm=scripted(session), settings=asked)
    with CopaSession(settings) as session:
        lm = scripted(session)
        second = session.run(task, lm=lm, settings=asked)
    assert second.from_disk
    assert not first.from_disk
    assert lm.calls == 0
    assert second.evaluation.results == first.evaluation.results
    assert "done earlier for" in second.phases[0].note
    n_used = first.record.optimization.charged_calls
    assert (
        f"optimization used {n_used:,} of 400 calls (budget light) and paid {n_used:,} of them here" in first.describe()
    )
    assert f"optimization used {n_used:,} of 400 calls (budget light) and paid 0 of them here" in second.describe()


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"budget": 50}, {"strategy": "demos -> instructions"}, {"epsilon": 0.5}], ids=str
)
def test_whatever_could_change_the_outcome_is_another_optimization(session, task, change):
    lm = scripted(session)
    session.run(task, lm=lm, settings=session.settings.merged(strategy="p"))
    other = session.run(task, lm=lm, settings=session.settings.merged(**{"strategy": "p", **change}))
    assert not other.phases[0].note.startswith("shared")


def test_another_metric_is_another_optimization(session, task):
    lm = scripted(session)

    def strict(example, prediction, trace=None):
        return float(prediction.answer == example.answer)

    other = Task("shout", task.program, strict, task.trainset, task.valset, task.testset)
    asked = session.settings.merged(strategy="p")
    session.run(task, lm=lm, settings=asked)
    assert not session.run(other, lm=lm, settings=asked).phases[0].note.startswith("shared")


def test_the_finetuned_model_is_what_w_ends_with_and_is_recorded_as_w(session, task):
    trainer = Trainer()
    base = scripted(session, trainer)
    tuned = session.finetuned_lm(task, lm=base)
    assert session.evaluate(task, lm=tuned, test="t").score == 1.0
    assert session.run(task, lm=base, settings=session.settings.merged(strategy="w")).score == 1.0
    assert trainer.n_trained == 1
    assert [record.strategy for record in records(session)] == ["w", "none", "w"]
    assert {record.lm for record in records(session)} == {"scripted/shout"}
    assert "@" in records(session)[0].served_lm


def test_a_program_given_to_evaluate_is_recorded_as_such(session, task):
    shown = task.program.deepcopy()
    shown.demos = task.trainset[:2]
    result = session.evaluate(task, program=shown, lm=scripted(session), split="val")
    assert result.score == 1.0
    assert (records(session)[0].strategy, records(session)[0].split) == ("given program", "val")


def test_the_plain_program_is_evaluated_as_baseline(session, task):
    session.evaluate(task, lm=scripted(session))
    assert records(session)[0].phases[0].phase == "test evaluation"
    assert records(session)[0].strategy == "none"


def test_the_artifact_holds_the_optimized_program_and_no_model(session, task):
    from copa_harness.store.artifacts import load_artifact

    run = session.run(task, lm=scripted(session), settings=session.settings.merged(strategy="p"))
    artifact = load_artifact(run.artifact)
    fresh = dspy.Predict("question -> answer")
    fresh.load_state(artifact.program_state)
    assert len(fresh.demos) == len(run.program.demos) > 0
    assert artifact.lora_directory is None


@pytest.mark.parametrize("split", ["dev", "testset", ""])
def test_an_unknown_split_is_refused(session, task, split):
    with pytest.raises(ConfigurationError, match="expected one of 'train', 'val', 'test'"):
        session.evaluate(task, lm=scripted(session), split=split)


def test_what_is_no_task_or_no_model_is_refused(session, task):
    with pytest.raises(ConfigurationError, match="got a int, expected a copa_harness"):
        session.run(3, lm=scripted(session))
    with pytest.raises(ConfigurationError, match="as a language model; expected"):
        session.evaluate(task, lm="openai/gpt-5")


def test_an_unusable_cache_directory_is_refused_with_the_option_to_change_it(settings, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(ConfigurationError, match="--copa-cache-dir"):
        CopaSession(settings)
