"""What a session finds beyond a score: the 2 x 2 of weights and prompts, groups, rivals, and what is asked for it."""

import dspy
import pytest
from dspy.clients.provider import Provider, TrainingJob

from copa_harness import ScriptedLM, Task
from copa_harness.errors import TaskError
from copa_harness.session import CopaSession, Settings

WORDS = [a + b for a in "abcdef" for b in "uvwxyz"]


def shouted(example, prediction, trace=None):
    return prediction.answer == example.answer


def rows(words):
    return [dspy.Example(question=word, answer=word.upper()).with_inputs("question") for word in words]


def answer(messages, model):
    """Words ending in u to w are learned from demonstrations, the others from weights; z takes both."""
    word = messages[-1]["content"].split("[[ ## question ## ]]")[1].strip().split()[0]
    shown, trained = len(messages) > 2, "@" in model
    knows = (word[1] in "uvw" and shown) or (word[1] in "xy" and trained) or (shown and trained)
    return {"answer": word.upper() if knows else word}


class Job(TrainingJob):
    def status(self):
        return "done" if self.done() else "running"


class Trainer(Provider):
    """Fine-tunes in no time: the tuned model is the same script under another name."""

    def __init__(self):
        super().__init__()
        self.finetunable = True
        self.TrainingJob = Job

    def __deepcopy__(self, memo):
        return self

    def finetune(self, job, model, train_data, train_data_format, train_kwargs=None):
        return f"{model}@{len(train_data)}rows"


def a_task(**more):
    program = dspy.Predict("question -> answer")
    return Task("shout", program, shouted, rows(WORDS[:12]), rows(WORDS[12:18]), rows(WORDS[18:]), **more)


@pytest.fixture
def session(tmp_path):
    settings = Settings(root=tmp_path, cache_dir=tmp_path / "cache", report_dir=tmp_path / "reports")
    with CopaSession(settings) as session:
        yield session


def scripted(session, script=answer):
    gateway = session.models.gateway
    return ScriptedLM(
        script,
        model="scripted/shout",
        fingerprint=lambda name: name,
        gateway=gateway,
        provider=Trainer(),
        temperature=1.0,
    )


@pytest.mark.parametrize(
    ("group", "message"), [("speaker", "no field 'speaker' to take its group from"), (3, "group is 3")]
)
def test_a_group_that_does_not_exist_is_refused(group, message):
    with pytest.raises(TaskError, match=message):
        a_task(group=group)


def test_a_strategy_with_weights_and_prompts_is_attributed_to_both(session):
    run = session.run(a_task(), lm=scripted(session), settings=session.settings.merged(strategy="p -> w"))
    found = run.attribution
    assert run.score == 1.0
    assert found.means["base_plain"] == 0.0
    assert found.means["base_optimized"] == pytest.approx(1 / 2)
    assert found.means["tuned_plain"] == pytest.approx(1 / 3)
    assert found.interaction.difference == pytest.approx(1 - 1 / 2 - 1 / 3)
    assert session.entries[-1].record.attribution == found
    phases = {phase.phase: phase.usage.paid_calls for phase in session.entries[-1].record.phases}
    assert phases["evaluate: optimized prompts, base weights"] == 18
    assert phases["evaluate: plain prompts, tuned weights"] == 18


def test_what_costs_nothing_new_is_not_measured_for_the_attribution(session):
    def never_learns(messages):
        return {"answer": messages[-1]["content"].split("[[ ## question ## ]]")[1].strip().split()[0]}

    lm = scripted(session, never_learns)
    run = session.run(a_task(), lm=lm, settings=session.settings.merged(strategy="p -> w", budget=60))
    assert run.attribution.both.difference == 0.0
    paid = sum(entry.record.usage.paid_calls for entry in session.entries)
    assert paid == lm.calls


@pytest.mark.parametrize("strategy", ["p", "w", "none"])
def test_a_strategy_with_one_kind_of_step_has_nothing_to_attribute(session, strategy):
    assert (
        session.run(a_task(), lm=scripted(session), settings=session.settings.merged(strategy=strategy)).attribution
        is None
    )


def test_a_rival_may_be_the_program_as_written(session):
    asked = session.settings.merged(strategy="p", better_than="none")
    run = session.run(a_task(), lm=scripted(session), settings=asked)
    assert [gate.gate for gate in run.gates] == ["max_error_rate=0", "better_than=none"]
    assert run.verdict.value == "pass"


@pytest.mark.parametrize("group", ["speaker", lambda example: example.question[0]], ids=["field", "callable"])
def test_examples_of_one_group_count_together(session, group):
    def with_speaker(words):
        return [
            dspy.Example(question=word, answer=word.upper(), speaker=word[0]).with_inputs("question") for word in words
        ]

    splits = with_speaker(WORDS[:12]), with_speaker(WORDS[12:18]), with_speaker(WORDS[18:])
    task = Task("shout", dspy.Predict("question -> answer"), shouted, *splits, group=group)

    def partly(messages):
        word = messages[-1]["content"].split("[[ ## question ## ]]")[1].strip().split()[0]
        return {"answer": word.upper() if word[0] in "de" else word}

    evaluation = session.evaluate(task, lm=scripted(session, partly))
    alone = session.evaluate(a_task(), lm=scripted(session, partly))
    assert evaluation.score == alone.score
    assert evaluation.interval.high - evaluation.interval.low > 1.3 * (alone.interval.high - alone.interval.low)


def test_near_repeats_of_training_examples_are_told_and_not_refused(session):
    def sentences(last):
        return [
            dspy.Example(question=f"the quick brown fox jumps over the lazy dog near {word}", answer=word).with_inputs(
                "question"
            )
            for word in last
        ]

    program = dspy.Predict("question -> answer")
    task = Task("near", program, shouted, sentences(["rivers"]), sentences(["lakes"]), sentences(["seas"]))
    lm = scripted(session, lambda messages: {"answer": "seas"})
    run = session.run(task, lm=lm, settings=session.settings.merged(strategy="none"))
    assert run.verdict.value == "pass"
    (note,) = session.entries[-1].notes
    assert "1 of 1 example nearly repeat something seen (not refused)" in note


def test_ceilings_of_the_session_end_an_attribution_but_not_the_run(tmp_path):
    from copa_harness.optimize.options import parse_budget

    settings = Settings(root=tmp_path, cache_dir=tmp_path / "cache", report_dir=tmp_path / "reports")
    with CopaSession(settings) as session:
        lm = scripted(session)
        session.run(a_task(), lm=lm, settings=session.settings.merged(strategy="p -> w"))
        n_paid = lm.calls
    bounded = Settings(
        root=tmp_path,
        cache_dir=tmp_path / "other",
        report_dir=tmp_path / "reports",
        total_budget=parse_budget(f"calls={n_paid - 20}"),
        threads=1,
    )
    with CopaSession(bounded) as session:
        run = session.run(a_task(), lm=scripted(session), settings=session.settings.merged(strategy="p -> w"))
    assert run.score == 1.0
    assert run.attribution is None
    assert any("was not measured" in note for note in session.entries[-1].notes)
