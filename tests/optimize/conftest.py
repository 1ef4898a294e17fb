"""A toy task with a scripted model whose skill depends on its prompt and its weights, as a real model's does."""

import json
import re
from types import SimpleNamespace

import dspy
import numpy as np
import pytest
from dspy.clients.provider import Provider, TrainingJob

from copa_harness import COPA
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.optimize.options import SearchOptions
from copa_harness.optimize.search.scoring import Validation
from copa_harness.optimize.search_context import SearchContext

RULE = re.compile(r"If size is (below|at least) ([\d.]+) answer (\w+), otherwise answer (\w+)\.")


def field(text, name):
    found = re.search(rf"\[\[ ## {name} ## \]\]\s*\n?([^\n\[]+)", text)
    return found.group(1).strip() if found else None


def make_rows(n, *, seed, noise=0.12):
    """Rows whose label is right except for a share of noise: no prompt and no weights reach a perfect score."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        size, weight = round(float(generator.uniform(0, 10)), 1), round(float(generator.uniform(0, 10)), 1)
        kind = "big" if (size >= 5) != (generator.random() < noise) else "small"
        rows.append(dspy.Example(size=str(size), weight=str(weight), kind=kind).with_inputs("size", "weight"))
    return rows


def answer_of(messages, model):
    """Tuned: nearly right. Else follows a rule in the instruction, copies the nearest demonstration, or says small."""
    size = float(field(messages[-1]["content"], "size"))
    rule = RULE.search(messages[0]["content"])
    if "@" in model:
        return "big" if size >= 5.3 else "small"
    if rule:
        holds = size < float(rule.group(2)) if rule.group(1) == "below" else size >= float(rule.group(2))
        return rule.group(3) if holds else rule.group(4)
    demos = [
        (float(field(messages[i]["content"], "size")), field(messages[i + 1]["content"], "kind"))
        for i in range(1, len(messages) - 2, 2)
    ]
    demos = [(where, kind) for where, kind in demos if kind in ("big", "small")]
    return min(demos, key=lambda demo: abs(demo[0] - size))[1] if demos else "small"


class Job(TrainingJob):
    def status(self):
        return "done" if self.done() else "running"


class FakeProvider(Provider):
    """Gives the model a new name; the scripted model is better under it."""

    def __init__(self):
        super().__init__()
        self.finetunable = True
        self.TrainingJob = Job
        self.trained = []

    def __deepcopy__(self, memo):
        return self

    def launch(self, lm, launch_kwargs=None):
        pass

    def kill(self, lm, launch_kwargs=None):
        pass

    def finetune(self, job, model, train_data, train_data_format, train_kwargs=None):
        self.trained.append(train_data)
        return f"{model.split('@')[0]}@{len(train_data)}"


@pytest.fixture(scope="session")
def toy_factory():
    """Makes a fresh `toy`, for tests that need several."""
    return make_toy


@pytest.fixture
def toy():
    """Task pieces: `program()`, `metric`, `train`, `val`, `lm(**kwargs)`, `provider`."""
    return make_toy()


def make_toy():
    provider = FakeProvider()

    def lm(**kwargs):
        def answers(messages, model):
            if not re.search(r"\[\[ ## size ## \]\]\n[\d.]+\n", messages[-1]["content"]):
                return "not an answer to anything"
            return {"kind": answer_of(messages, model)}

        return ScriptedLM(answers, **{"fingerprint": lambda model: f"toy:{model}", **kwargs})

    return SimpleNamespace(
        program=lambda: dspy.Predict(dspy.Signature("size, weight -> kind", "Tell the kind from the sizes.")),
        metric=lambda example, prediction, trace=None: float(example.kind == prediction.kind),
        train=make_rows(24, seed=1),
        val=make_rows(16, seed=2),
        lm=lm,
        provider=provider,
        make_rows=make_rows,
    )


def context_of(toy, student, *, prompt_lm=None, teacher=None, **settings):
    """What a search over a program of the toy task is given; settings are those of `SearchOptions`."""
    options, validation = (
        SearchOptions(threads=4, **settings),
        Validation(toy.val, metric=toy.metric, threads=4, seed=0),
    )
    return SearchContext(student, toy.train, validation, toy.metric, options, prompt_lm=prompt_lm, teacher=teacher)


class TwoStages(dspy.Module):
    """A hint by one model, the answer by another."""

    def __init__(self):
        super().__init__()
        self.look = dspy.Predict(dspy.Signature("size, weight -> hint", "Say what strikes you."))
        self.tell = dspy.Predict(dspy.Signature("hint, size -> kind", "Tell the kind."))

    def forward(self, size, weight):
        return self.tell(hint=self.look(size=size, weight=weight).hint, size=size)


def first_stage(messages, model):
    size = field(messages[-1]["content"], "size")
    return {"hint": "large" if float(size) >= 5 else "little"} if size else "no idea"


def second_stage(messages, model):
    """Right when it is shown demonstrations, told how, or tuned; else always small."""
    hint = field(messages[-1]["content"], "hint")
    knows = len(messages) > 2 or "@" in model or "by the hint" in messages[0]["content"]
    return {"kind": "big" if hint == "large" and knows else "small"} if hint else "no idea"


def stage_writer():
    """A prompt LM that answers whatever field it is asked for, in JSON where GEPA wants it."""

    def answers(messages):
        text = messages[-1]["content"]
        if "JSON object" in text:
            return json.dumps({"new_instruction": "Tell it by the hint."})
        asked = [part.split(" ## ]]")[0] for part in text.split("Respond with")[-1].split("`[[ ## ")[1:]]
        return {name: "Tell it by the hint." for name in asked if name != "completed"}

    return ScriptedLM(answers, model="scripted/writer")


@pytest.fixture
def stages():
    """A program of two stages on two models: `compiled(strategy, ...)`, `look_lm`, `tell_lm`, `writer`, `strays()`."""
    look_lm = ScriptedLM(first_stage, model="scripted/look", fingerprint=lambda m: f"1{m}", provider=FakeProvider())
    tell_lm = ScriptedLM(second_stage, model="scripted/tell", fingerprint=lambda m: f"2{m}", provider=FakeProvider())
    writer = stage_writer()

    def metric(example, prediction, trace=None):
        return float(example.kind == prediction.kind)

    def program():
        program = TwoStages()
        program.look.lm, program.tell.lm = look_lm, tell_lm
        return program

    def compiled(strategy, *, budget=150, n_train=16, n_val=8, teacher=None, student=None, **settings):
        given = {"metric": metric, "prompt_lm": writer, "threads": 4, **settings}
        return COPA(strategy=strategy, budget=budget, **given).compile(
            student or program(), trainset=make_rows(n_train, seed=1), valset=make_rows(n_val, seed=2), teacher=teacher
        )

    def strays():
        """Requests that went to the model of the other stage."""
        wrong = [request for request in look_lm.requests if "`[[ ## hint ## ]]`" not in request.prompt]
        return wrong + [request for request in tell_lm.requests if "`[[ ## kind ## ]]`" not in request.prompt]

    return SimpleNamespace(
        program=program,
        compiled=compiled,
        look_lm=look_lm,
        tell_lm=tell_lm,
        writer=writer,
        strays=strays,
        metric=metric,
    )
