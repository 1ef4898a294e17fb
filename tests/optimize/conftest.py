"""A toy task with a scripted model whose skill depends on its prompt and its weights, as a real model's does."""

import re
from types import SimpleNamespace

import dspy
import numpy as np
import pytest
from dspy.clients.provider import Provider, TrainingJob

from copa_harness.lm.scripted import ScriptedLM

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
