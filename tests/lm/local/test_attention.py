"""The cascade path: which models take it, and that it gives what the library's own path gives."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from dspy.lm15 import Config, Message, Request

from copa_harness.lm.local.engine import TransformersEngine
from copa_harness.testing.tiny_models import write_tiny_model

OWN = ("llama", "qwen2", "qwen3")
FITTING = (*OWN, "gpt2", "gpt_neox")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models in memory by architecture."""
    from copa_harness.lm.local.model import LocalModel

    root, loaded = tmp_path_factory.mktemp("cascade"), {}

    def model(architecture):
        if architecture not in loaded:
            folder = write_tiny_model(root / architecture, architecture=architecture)
            loaded[architecture] = LocalModel(folder, device="cpu", dtype="float32")
        return loaded[architecture]

    return model


@pytest.mark.parametrize(
    ("architecture", "fits"),
    [*((name, True) for name in FITTING), ("mistral", False), ("gemma3_text", False), ("lfm2", False)],
)
def test_full_attention_models_cascade_and_windows_and_convolutions_do_not(architecture, fits, models):
    assert models(architecture).cascades is fits


@pytest.mark.parametrize("architecture", FITTING)
def test_rows_behind_several_prefixes_get_the_logits_they_get_alone(architecture, models):
    import torch

    from copa_harness.lm.local.decoding import LibraryReader, Row, next_logits

    model, draw = models(architecture), random.Random(5)
    prefixes = [[draw.randrange(10, 380) for _ in range(n)] for n in (20, 0, 11)]
    tails = [[draw.randrange(10, 380) for _ in range(draw.randint(1, 9))] for _ in range(7)]
    owners = [0, 0, 0, 1, 1, 2, 2]
    with torch.inference_mode():
        states = []
        for prefix in prefixes:
            cache = model.new_cache()
            if prefix:
                model.model(torch.tensor([prefix]), past_key_values=cache, use_cache=True)
            states.append((cache,) if prefix else ())
        rows = [Row(tail, n_shared=len(prefixes[i]), shared=states[i]) for i, tail in zip(owners, tails, strict=True)]
        readers = [LibraryReader(model.model), *([model.decoder] if model.decoder else [])]
        together = [next_logits(reader, rows, device=model.device, pad_id=model.pad_id) for reader in readers]
        alone = [
            model.model(torch.tensor([prefixes[i] + tail])).logits[0, -1] for i, tail in zip(owners, tails, strict=True)
        ]
    assert len(readers) == (2 if architecture in OWN else 1)
    assert all((logits - torch.stack(alone)).abs().max() < 1e-4 for logits in together)


@pytest.mark.parametrize("n_at_once", [1, 5, 4096])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_continuations_have_the_log_probabilities_they_have_alone(architecture, n_at_once, models):
    import torch

    from copa_harness.lm.local.decoding import CascadeRun, LibraryReader, Row
    from copa_harness.lm.local.memory import TokenLimits

    limits = TokenLimits(read=n_at_once, scored=n_at_once)
    model, draw = models(architecture), random.Random(6)
    tails = [[draw.randrange(10, 380) for _ in range(n)] for n in (7, 4, 1)]
    choices = [[[20], [21, 22, 23]], [[30, 31], [32], [33, 34]], [[40, 41, 42, 43], [40, 41], [42, 43]]]
    with torch.inference_mode():
        run = CascadeRun(model.decoder or LibraryReader(model.model), device=model.device, pad_id=0, limits=limits)
        rows = [Row(tail) for tail in tails]
        run.add(rows, room=3)
        scores = run.score(dict(zip(rows, choices, strict=True)))
        for tail, row, own in zip(tails, rows, choices, strict=True):
            for choice, score in zip(own, scores[row], strict=True):
                logprobs = model.model(torch.tensor([tail + choice])).logits[0].log_softmax(-1)
                steps = range(len(tail) - 1, len(tail) - 1 + len(choice))
                assert score == pytest.approx(
                    sum(float(logprobs[s, t]) for s, t in zip(steps, choice, strict=True)), abs=1e-4
                )


@pytest.mark.parametrize("n_at_once", [1, 7, 4096])
@pytest.mark.parametrize(("architecture", "temperature"), [("llama", 0.0), ("gpt2", 0.0), ("llama", 0.7)])
def test_of_a_long_list_only_continuations_that_cannot_win_go_without_a_score(
    architecture, temperature, n_at_once, models
):
    import torch

    from copa_harness.lm.local.decoding import CascadeRun, DecodingRules, LibraryReader, Row, RowState
    from copa_harness.lm.local.memory import TokenLimits

    limits = TokenLimits(read=n_at_once, scored=n_at_once)
    model, draw = models(architecture), random.Random(8)
    rows = [
        Row([draw.randrange(10, 380) for _ in range(n)], state=RowState(DecodingRules(1, temperature=temperature)))
        for n in (6, 1, 9)
    ]
    starts = [[draw.randrange(10, 380) for _ in range(draw.randint(0, 2))] for _ in range(5)]
    ends = [[draw.randrange(10, 380) for _ in range(draw.randint(1, 3))] for _ in range(40)]
    choices = [[*draw.choice(starts), *end] for end in ends]
    scores = {}
    with torch.inference_mode():
        run = CascadeRun(model.decoder or LibraryReader(model.model), device=model.device, pad_id=0, limits=limits)
        run.add(rows, room=3)
        scores = run.score(dict.fromkeys(rows, choices))
        for row in rows:
            alone = []
            for choice in choices:
                logprobs = model.model(torch.tensor([row.ids + choice])).logits[0].log_softmax(-1)
                steps = range(len(row.ids) - 1, len(row.ids) - 1 + len(choice))
                alone.append(sum(float(logprobs[s, t]) for s, t in zip(steps, choice, strict=True)))
            kept = [k for k, score in enumerate(scores[row]) if score > float("-inf")]
            assert [scores[row][k] for k in kept] == pytest.approx([alone[k] for k in kept], abs=1e-4)
            assert max(alone) == pytest.approx(max(scores[row]), abs=1e-4)
            assert (len(kept) < len(choices)) is (temperature == 0)


@pytest.mark.parametrize("seed", range(4))
def test_the_cascade_loop_and_the_librarys_generate_give_the_same_tokens(seed, tmp_path, monkeypatch):
    draw = random.Random(seed)
    architecture = draw.choice(FITTING)
    engine = TransformersEngine(
        write_tiny_model(tmp_path / "m", architecture=architecture, seed=seed),
        name="hf:tiny",
        lora_dir=tmp_path,
    )
    monkeypatch.setattr("copa_harness.lm.local.scheduler.MAX_BATCH", draw.choice([2, 5, 64]))
    systems = ["zebra 0.1 question " * draw.randint(4, 12), "answer 2.3 " * 8, None]
    requests = [
        Request(
            model="hf:tiny",
            system=draw.choice(systems),
            messages=(Message.user("field " * draw.randint(1, 12) + str(i)),),
            config=Config(max_tokens=draw.randint(1, 16), temperature=draw.choice([0.0, 0.0, 0.8]), top_p=0.95),
        )
        for i in range(24)
    ]
    answers = {}
    for cascades in (True, False):
        engine.generator.cascades = cascades
        with ThreadPoolExecutor(draw.choice([4, 24])) as pool:
            answers[cascades] = [r.text for r in pool.map(lambda request: engine.complete(request, seed=3), requests)]
    assert engine.generator.model.cascades
    assert answers[True] == answers[False]


@pytest.mark.parametrize("architecture", FITTING)
def test_a_lone_row_repeats_itself_in_few_steps_and_gives_the_same_tokens(architecture, tmp_path, monkeypatch):
    folder = write_tiny_model(tmp_path / "m", architecture=architecture, seed=3)
    engine = TransformersEngine(folder, name="hf:tiny", lora_dir=tmp_path)
    request = Request(
        model="hf:tiny", messages=(Message.user("zebra field " * 6),), config=Config(max_tokens=48, logprobs=1)
    )
    answers, steps = {}, {}
    for n_tokens in (16, 0):
        monkeypatch.setattr("copa_harness.lm.local.decoding.STEP_TOKENS", n_tokens)
        before = engine.generator.n_steps
        answers[n_tokens] = engine.complete(request, seed=0)
        steps[n_tokens] = engine.generator.n_steps - before
    assert engine.generator.cascades
    assert answers[16].text == answers[0].text
    for one, other in zip(answers[16].logprobs, answers[0].logprobs, strict=True):
        assert (one.token_id, one.logprob) == (other.token_id, pytest.approx(other.logprob, abs=1e-4))
    assert steps[16] <= steps[0]


def test_rope_that_depends_on_length_is_never_padded(tmp_path):
    import json

    from copa_harness.lm.local.model import LocalModel

    folder = write_tiny_model(tmp_path / "dynamic")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    model = LocalModel(folder, device="cpu", dtype="float32")
    assert (model.pads, model.shares_prefix, model.cascades) == (False, False, False)


@pytest.mark.parametrize("architecture", OWN)
def test_a_model_too_large_to_be_laid_out_twice_is_computed_as_it_lies(architecture, models, monkeypatch):
    import torch

    from copa_harness.lm.local import llama
    from copa_harness.lm.local.decoding import Row, next_logits

    model = models(architecture)
    monkeypatch.setattr(llama, "PACK_LIMIT_BYTES", 0)
    decoder = llama.LlamaDecoder(model.decoder.shape, model.model.state_dict())
    own = {tensor.data_ptr() for tensor in model.model.parameters()}
    layer = decoder._layers[0]
    assert {weight.data_ptr() for weight in [*layer.qkv.weights, *layer.gate_up.weights]} <= own
    ids = [20, 31, 42, 53]
    with torch.inference_mode():
        logits = next_logits(decoder, [Row(ids)], device="cpu", pad_id=0)
        alone = model.model(torch.tensor([ids])).logits[0, -1]
    assert (logits[0] - alone).abs().max() < 1e-4
    assert decoder.n_parameters == sum(parameter.numel() for parameter in model.model.parameters())
