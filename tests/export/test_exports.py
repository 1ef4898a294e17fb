"""What is exported answers as it was scored, without this package, and its check says when it does not."""

import json
import os
import subprocess
import sys
from importlib import import_module
from typing import Literal

import dspy
import pytest

import copa_harness
from copa_harness.cli import main
from copa_harness.documents import to_json
from copa_harness.errors import ArtifactError, ConfigurationError
from copa_harness.evaluate import evaluate
from copa_harness.export import writing
from copa_harness.export.formats import FORMS
from copa_harness.export.scored import read_scored, scored_of
from copa_harness.lm.factory import build_lm
from copa_harness.lm.gateway import Gateway
from copa_harness.store.artifacts import add_scored, load_artifact, save_artifact
from copa_harness.tasks import iris

ALONE = "import runpy, sys; sys.modules['copa_harness'] = None; sys.argv[:] = ['check.py']; sys.path.insert(0, '.'); "
ALONE += "runpy.run_path('check.py', run_name='__main__')"

WORDS = ("one", "{{word}}", "a\nb", 'say "no"')


def check(folder, **environment):
    """The export's own check, where this package cannot be imported."""
    return subprocess.run(
        [sys.executable, "-c", ALONE],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": "", "OPENAI_API_KEY": "none", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def exact(example, prediction, trace=None):
    return prediction.loud == example.loud


@pytest.fixture
def server(stubs):
    """Shouts the word; `broken` has it say something else, a word of one letter is answered without layout."""

    class Shouting(stubs.StubServer):
        broken = False

        def takes_over(self, connection, path, headers, body):
            word = json.loads(body)["messages"][-1]["content"].split("[[ ## word ## ]]\n")[1].split("\n\nRespond")[0]
            loud = "nothing" if self.broken else word.upper()
            text = (
                "?"
                if len(word) == 1
                else f"[[ ## loud ## ]]\n{loud}\n\n[[ ## kind ## ]]\nlong\n\n[[ ## completed ## ]]"
            )
            self._reply(connection, 200, stubs.completion(text))
            return True

    with Shouting() as server:
        yield server


def artifact_of(folder, program, lm, examples, metric, **more):
    """As a finished run leaves it."""
    directory = folder / "cache" / "artifacts" / "run"
    evaluation = evaluate(program, examples, metric=metric, split="test", lm=lm)
    lora = more.pop("lora_directory", None)
    save_artifact(directory, program_state=program.dump_state(), lora_directory=lora, manifest={})
    add_scored(directory, to_json(scored_of(program, lm, evaluation, task="shout", strategy="p", **more)))
    return directory


def shouting_program():
    program = dspy.Predict("word -> loud, kind: Literal['long', 'short']")
    program.signature = program.signature.with_instructions("Shout {word} it's \"loud\" '''now'''.\n----- user -----")
    program.demos = [{"word": "hi", "loud": "HI", "kind": "short"}]
    return program


@pytest.fixture
def shouted(tmp_path, server):
    lm = build_lm("openai/m", gateway=Gateway(cache=None), cache_dir=tmp_path / "cache", api_base=server.url)
    examples = [dspy.Example(word=word, loud=word.upper()).with_inputs("word") for word in (*WORDS, "x")]
    return artifact_of(tmp_path, shouting_program(), lm, examples, exact, api_base=server.url)


@pytest.mark.parametrize("form", ["text", "messages", "dspy", "openai"])
def test_what_an_endpoint_answered_is_replayed_by_every_form(form, shouted, server, tmp_path, capsys):
    server.requests.clear()
    assert main(["export", str(shouted), str(tmp_path / form), "--to", form]) == 0
    assert f"python {tmp_path / form / 'check.py'}" in capsys.readouterr().out
    done = check(tmp_path / form)
    assert (done.returncode, done.stdout.strip()) == (0, "5 of 5 rows are answered as they were scored"), done.stderr
    server.broken = True
    done = check(tmp_path / form)
    assert done.returncode == 1
    assert "1 of 5 rows" in done.stdout  # the one that cannot be read is as it was
    assert "scored {'loud': 'ONE', 'kind': 'long'}" in done.stdout


def test_a_prompt_that_was_changed_by_hand_fails_the_check_or_asks_otherwise(shouted, server, tmp_path):
    writing.export_artifact(shouted, to="text", place=tmp_path / "out")
    prompt = tmp_path / "out" / "prompt.txt"
    assert "{{{word}}}" not in prompt.read_text()
    assert prompt.read_text().count("{{word}}") == 1
    prompt.write_text(prompt.read_text().replace("{{word}}", "the word"))
    assert check(tmp_path / "out").returncode == 1


def test_every_form_sends_what_was_scored(shouted, server, tmp_path):
    kept = read_scored(load_artifact(shouted))
    scripts = [
        writing.export_artifact(shouted, to=form, place=tmp_path / form)[0] for form in ("text", "messages", "openai")
    ]
    code = "import json; from answer import messages; print(json.dumps(messages(word='{{word}} \\\\1')))"
    sent = {subprocess.check_output([sys.executable, "-c", code], cwd=folder) for folder in scripts}
    assert len(sent) == 1
    with dspy.context(adapter=dspy.ChatAdapter()):
        expected = dspy.ChatAdapter().format(
            shouting_program().signature, shouting_program().demos, {"word": "{{word}} \\1"}
        )
    assert json.loads(sent.pop()) == [{"role": one["role"], "content": one["content"]} for one in expected]
    assert kept.predictors[0].bounds["max_tokens"] > 0


def test_a_loaded_program_answers_in_one_line(shouted, server):
    program = copa_harness.load(shouted)
    assert program(word="two").loud == "TWO"
    assert program.demos == shouting_program().demos


def test_loading_needs_no_pytest_and_writes_nothing(shouted, tmp_path):
    before = sorted((tmp_path / "cache").rglob("*"))
    code = f"import sys, copa_harness; copa_harness.load({str(shouted)!r}); "
    code += "print({'pytest', 'torch'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
    assert sorted((tmp_path / "cache").rglob("*")) == before


class Twice(dspy.Module):
    """Asks two predictors, the second about the first's answer."""

    def __init__(self):
        super().__init__()
        self.first = dspy.Predict("word -> loud")
        self.second = dspy.ChainOfThought("word -> loud: list[str]")

    def forward(self, word):
        return self.second(word=self.first(word=word).loud)


def scripted(answers=lambda messages: {"reasoning": "so", "loud": '["A"]'}, **more):
    return copa_harness.ScriptedLM(answers, **more)


def test_a_program_of_a_class_is_made_again_and_one_that_changed_is_refused(tmp_path, monkeypatch):
    examples = [dspy.Example(word="a", loud=["A"]).with_inputs("word")]
    directory = artifact_of(tmp_path, Twice(), scripted(), examples, exact)
    kept = read_scored(load_artifact(directory))
    assert kept.kind.endswith("test_exports:Twice")
    assert [call["predictor"] for call in kept.rows[0].calls] == ["first", "second.predict"]
    assert copa_harness.load(directory, lm=scripted())(word="a").loud == ["A"]
    other = Twice()
    other.first = dspy.Predict("word, more -> loud")
    with pytest.raises(ConfigurationError, match=r"not the one of task 'shout' that was scored"):
        copa_harness.load(directory, program=other, lm=scripted())
    with pytest.raises(ConfigurationError, match=r"expected load\(\.\.\., lm=\.\.\.\)"):
        copa_harness.load(directory)


def test_a_class_that_no_module_offers_has_to_be_given(tmp_path):
    class Hidden(Twice):
        pass

    examples = [dspy.Example(word="a", loud=["A"]).with_inputs("word")]
    directory = artifact_of(tmp_path, Hidden(), scripted(), examples, exact)
    with pytest.raises(ConfigurationError, match="cannot be imported; remedy"):
        copa_harness.load(directory, lm=scripted())
    assert copa_harness.load(directory, program=Hidden(), lm=scripted())(word="a").loud == ["A"]
    with pytest.raises(ConfigurationError, match="define it outside of tests"):
        writing.export_artifact(directory, to="dspy", place=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_constraints_and_types_of_fields_come_back(tmp_path):
    class Fields(dspy.Signature):
        """Rate it."""

        word: str = dspy.InputField(desc="what to rate")
        stars: int = dspy.OutputField(desc="how good", ge=1, le=5)
        names: list[Literal["a", "b"]] | None = dspy.OutputField()

    program = dspy.ChainOfThought(Fields)
    lm = scripted(lambda messages: {"reasoning": "so", "stars": 3, "names": ["a"]})
    examples = [dspy.Example(word="a", loud="").with_inputs("word")]
    directory = artifact_of(
        tmp_path, program, lm, examples, lambda example, prediction, trace=None: prediction.stars == 3
    )
    assert copa_harness.load(directory, lm=lm)(word="a").toDict() == {"reasoning": "so", "stars": 3, "names": ["a"]}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Three flowers on the shipped model with a LoRA adapter."""
    folder, task = tmp_path_factory.mktemp("tuned"), iris()
    lm = build_lm("embedded", gateway=Gateway(cache=None), cache_dir=folder / "cache")
    lora = folder / "cache" / "lora" / "made"
    name = small_lora(lm.engine, lora)
    return artifact_of(folder, task.program, lm.copy(model=name), task.testset[:3], task.metric, lora_directory=lora)


def small_lora(engine, folder):
    import peft
    import torch

    from copa_harness.lm.local.files import write_manifest
    from copa_harness.lm.local.model import share_weights, silence_peft

    with silence_peft():
        config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(share_weights(engine.model), config)
        draw = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=draw) * 0.05
        model.save_pretrained(folder)
    write_manifest(folder, base_fingerprint=engine.fingerprint("embedded"), details={})
    return engine.add_lora(folder)


@pytest.mark.parametrize("form", ["peft", "dspy"])
def test_tuned_weights_answer_as_they_were_scored_by_transformers_and_peft(form, tuned, tmp_path):
    folder, _ = writing.export_artifact(tuned, to=form, place=tmp_path / form)
    done = check(folder)
    assert (done.returncode, done.stdout.strip()) == (0, "3 of 3 rows are answered as they were scored"), done.stderr
    if form == "peft":
        rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
        rows[0]["calls"][0]["outputs"] = {"answer": "another"}
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert "2 of 3 rows" in check(folder).stdout


def test_a_loaded_program_has_its_tuned_weights(tuned):
    kept = read_scored(load_artifact(tuned))
    program = copa_harness.load(tuned)
    assert "@" in program.lm.model
    assert [program(**row.inputs).answer for row in kept.rows if row.outcome == "ok"] == [
        row.predicted["answer"] for row in kept.rows if row.outcome == "ok"
    ]


def test_vllm_gets_a_command_with_the_adapter_and_a_function_that_asks_it(tuned, tmp_path, stubs):
    folder, said = writing.export_artifact(tuned, to="vllm", place=tmp_path / "out")
    model = read_scored(load_artifact(tuned)).model
    expected = f"vllm serve base --dtype float32 --enable-lora --max-lora-rank 4 --lora-modules {model}=./adapter"
    assert said == [expected]
    assert expected in (folder / "serve.sh").read_text()
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    assert (folder / "base" / "model.safetensors").is_file()
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    outputs = [row["calls"][0]["outputs"] for row in rows if row["calls"]]
    replies = [
        stubs.Reply(body=stubs.completion(f"[[ ## answer ## ]]\n{one['answer']}\n\n[[ ## completed ## ]]"))
        for one in outputs
    ]
    with stubs.StubServer(replies) as server:
        done = check(folder, OPENAI_BASE_URL=server.url)
        assert done.returncode == 0, done.stdout + done.stderr
        assert {body["model"] for body in server.bodies} == {model}


@pytest.mark.parametrize(
    ("form", "message"),
    [("openai", "expected --to vllm, which serves both"), ("gguf", "got no file for the adapter")],
)
def test_what_would_not_answer_as_scored_is_refused(form, message, tuned, capsys):
    assert main(["export", str(tuned), "--to", form]) == 2
    assert message in capsys.readouterr().err


def test_other_refusals_say_what_to_do(shouted, tmp_path, capsys):
    assert main(["export", str(shouted)]) == 2
    assert "expected --to and one of text, messages" in capsys.readouterr().err
    for form, message in {"peft": "got base weights only", "vllm": "expected --to openai"}.items():
        assert main(["export", str(shouted), str(tmp_path / form), "--to", form]) == 2
        assert message in capsys.readouterr().err
    assert main(["export", str(shouted), str(tmp_path), "--to", "text"]) == 2
    assert "is there already" in capsys.readouterr().err
    plain = save_artifact(tmp_path / "plain", program_state={}, lora_directory=None, manifest={})
    with pytest.raises(ArtifactError, match=r"it has no scored answers\. Next: run the suite"):
        writing.export_artifact(plain, to="text", place=tmp_path / "out")


def test_the_command_line_offers_every_form(capsys):
    assert tuple(FORMS) == ("text", "messages", "dspy", "openai", "peft", "vllm")
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "{" + ",".join((*FORMS, "gguf")) + "}" in capsys.readouterr().out
    assert all(callable(import_module(f"copa_harness.export.formats.{module}").write) for module in FORMS.values())


def test_scored_answers_are_replaced_as_a_whole_and_leave_the_fingerprint(tmp_path):
    folder = save_artifact(tmp_path / "run", program_state={}, lora_directory=None, manifest={})
    before = load_artifact(folder).fingerprint
    for answers in ({"n": 1}, {"n": 2}, {"n": 2}):
        add_scored(folder, answers)
        found = load_artifact(folder)
        assert (found.scored, found.fingerprint) == (answers, before)
    assert len(list(folder.glob("scored-*.json"))) == 1


def test_an_export_holds_no_credential(shouted, server, tmp_path, monkeypatch):
    lm = build_lm(
        "openai/m",
        gateway=Gateway(cache=None),
        cache_dir=tmp_path / "cache",
        api_base=server.url,
        api_key="sk-abcdefghijklmnopqrstuvwx",
    )
    examples = [dspy.Example(word="one", loud="ONE").with_inputs("word")]
    directory = artifact_of(tmp_path, shouting_program(), lm, examples, exact, api_base=server.url)
    for form in ("dspy", "openai", "messages"):
        writing.export_artifact(directory, to=form, place=tmp_path / form)
    texts = [path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert not any("abcdefghijklmnopqrstuvwx" in text for text in texts)
