"""Spans for whoever has set up OpenTelemetry's SDK, nothing for anybody else."""

import subprocess
import sys

import pytest

from copa_harness.tracing import span

SESSION = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

spans, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(spans))
trace.set_tracer_provider(provider)

import dspy
from pathlib import Path
from copa_harness import ScriptedLM, Task
from copa_harness.errors import ProviderError
from copa_harness.session import CopaSession, Settings

rows = [dspy.Example(word=str(i), loud=str(i)).with_inputs("word") for i in range(12)]
same = lambda example, prediction, trace=None: prediction.loud == example.loud
task = Task("shout", dspy.Predict("word -> loud"), same, rows[:4], rows[4:8], rows[8:])
def answer(messages):
    if messages[-1]["content"].split("\\n")[1] == "9":
        raise ProviderError("secret")
    return {"loud": "10"}
here = Path.cwd()
with CopaSession(Settings(root=here, cache_dir=here / "cache", report_dir=here / "out", budget=20)) as session:
    lm = ScriptedLM(answer, fingerprint="x", gateway=session.models.gateway)
    session.run(task, lm=lm, settings=Settings(root=here, cache_dir=here / "cache", strategy="p", budget=20), test="t")
found = spans.get_finished_spans()
evaluation = next(one for one in found if one.name == "copa.evaluate")
print(sorted({one.name for one in found}))
print({key: evaluation.attributes[key] for key in ("copa.task", "copa.strategy", "copa.score", "copa.calls")})
chats = [one for one in found if one.name == "chat scripted/model"]
print(all(one.parent is not None for one in chats), sorted({str(one.attributes.get("error.type")) for one in chats}))
print(any("secret" in one.to_json() for one in found), chats[0].attributes["gen_ai.usage.output_tokens"] > 0)
"""


def test_evaluations_optimizations_and_paid_calls_are_spans_in_one_another(tmp_path):
    pytest.importorskip("opentelemetry.sdk")
    done = subprocess.run([sys.executable, "-c", SESSION], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        "['chat scripted/model', 'copa.evaluate', 'copa.optimize']",
        "{'copa.task': 'shout', 'copa.strategy': 'none', 'copa.score': 0.3333333333333333, 'copa.calls': 3}",
        "True ['EngineError', 'None']",
        "False True",
    ], done.stderr


def test_nothing_is_imported_for_it():
    code = "import sys, copa_harness.lm.gateway as g; print('opentelemetry.trace' in sys.modules)"
    before = subprocess.check_output(
        [sys.executable, "-c", "import sys, dspy; print('opentelemetry.trace' in sys.modules)"]
    )
    assert subprocess.check_output([sys.executable, "-c", code]) == before


def test_an_error_passes_through_a_span_of_nobody(monkeypatch):
    monkeypatch.delitem(sys.modules, "opentelemetry.trace", raising=False)
    with span("anything", task="x") as note:
        note(score=1)
    with pytest.raises(KeyError), span("anything"):
        raise KeyError
