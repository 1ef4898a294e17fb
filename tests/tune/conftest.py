from __future__ import annotations

from typing import Literal

import dspy
import pytest

from copa_harness.lm.gateway import Gateway
from copa_harness.lm.local.engine import TransformersEngine
from copa_harness.lm.metered import MeteredLM
from copa_harness.testing.tiny_models import write_tiny_model

COLOURS = ("red", "green", "blue")


class Classify(dspy.Signature):
    """Say the colour."""

    size: float = dspy.InputField()
    note: str = dspy.InputField()
    colour: Literal["red", "green", "blue"] = dspy.OutputField()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def engine(tiny_folder, tmp_path):
    return TransformersEngine(tiny_folder, name="hf:tiny", lora_dir=tmp_path / "loras")


@pytest.fixture
def lm(engine):
    return MeteredLM("hf:tiny", engine=engine, gateway=Gateway(cache=None), max_tokens=16)


@pytest.fixture
def program():
    return dspy.Predict(Classify)


@pytest.fixture
def examples():
    """Nine labelled examples, the colour given by the note."""
    return [
        dspy.Example(size=0.5 + i, note=f"n{COLOURS[i % 3]} {i}", colour=COLOURS[i % 3]).with_inputs("size", "note")
        for i in range(9)
    ]
