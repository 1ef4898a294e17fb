"""GGUF files: answers of the dequantized weights by transformers; converted once; bad ones refused in a sentence."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from dspy.lm15 import Config, Message, Request

from copa_harness.errors import ConfigurationError
from copa_harness.lm.factory import build_lm
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.local.engine import TransformersEngine
from copa_harness.lm.local.files import base_fingerprint
from copa_harness.lm.local.sources import gguf as gguf_files
from copa_harness.lm.local.sources.gguf import check_gguf, convert_gguf, read_header
from copa_harness.lm.local.sources.source import ModelSource
from copa_harness.testing.tiny_models import write_tiny_model
from tests.lm.local.gguf_files import write_tiny_gguf

QUESTIONS = ["zebra 0.1", "answer 2.3 question", "[[ ## label ## ]] 12345", "naïve 你好  x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", seed=3)


@pytest.fixture(scope="module")
def files(folder, tmp_path_factory):
    """A GGUF file of the tiny model by quantization, written once."""
    root = tmp_path_factory.mktemp("gguf")
    return {kind: write_tiny_gguf(root / f"tiny-{kind}.gguf", folder, quantization=kind) for kind in ("F32", "Q8_0")}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder of converted models that tests share."""
    return tmp_path_factory.mktemp("kept")


def build(name, cache, **given):
    return build_lm(name, gateway=Gateway(cache=None), cache_dir=cache, **{"max_tokens": 8, **given})


def answers_of_transformers(file):
    """Tokens by transformers alone, from the file as its own reader dequantizes it."""
    import torch
    import transformers

    given = {"gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **given)
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **given)
    answers = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        n = inputs["input_ids"].shape[1]
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=torch.ones_like(inputs["input_ids"]),
            max_new_tokens=8,
            do_sample=False,
        )
        answers.append((n, tokenizer.decode(ids[0, n:], skip_special_tokens=True)))
    return answers


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_answers_are_those_of_transformers_on_the_dequantized_weights(kind, files, kept, tmp_path):
    engine = TransformersEngine(ModelSource(files[kind], keep_in=kept), name="gguf:x", lora_dir=tmp_path)
    requests = [
        Request(model="gguf:x", messages=(Message.user(question),), config=Config(max_tokens=8))
        for question in QUESTIONS
    ]
    answers = [engine.complete(request, seed=0) for request in requests]
    assert [(a.usage.input_tokens, a.text) for a in answers] == answers_of_transformers(files[kind])
    assert len({answer.text for answer in answers}) > 1
    assert engine.generator.model.decoder is not None


def test_a_float32_file_answers_as_the_model_it_was_made_of(files, folder, kept, tmp_path):
    import torch
    from safetensors.torch import load_file

    directory = convert_gguf(files["F32"], keep_in=kept)
    original, converted = (load_file(place / "model.safetensors") for place in (folder, directory))
    assert converted.keys() == original.keys()
    assert all(torch.equal(tensor, converted[name]) for name, tensor in original.items())
    cache = tmp_path / "cache"
    for question in QUESTIONS:
        assert build(f"gguf:{files['F32']}", cache)(question) == build(f"hf:{folder}", cache)(question)


def test_both_ways_to_write_the_name_mean_the_same_and_it_is_converted_once(files, tmp_path, monkeypatch):
    first = build(f"gguf:{files['F32']}", tmp_path)
    answer = first("zebra")
    monkeypatch.setattr(gguf_files, "_load", lambda *given: pytest.fail("read again"))
    second = build(f"hf:{files['F32']}", tmp_path)
    assert second("zebra") == answer
    assert first.engine.directory == second.engine.directory
    assert first.engine.directory.parent == tmp_path / "safetensors"
    assert [entry.name for entry in first.engine.directory.parent.iterdir() if entry.name.endswith(".partial")] == []


def test_the_fingerprint_is_that_of_the_content_wherever_the_file_lies(files, kept, tmp_path):
    other = tmp_path / "renamed.gguf"
    shutil.copyfile(files["F32"], other)
    prints = {
        name: base_fingerprint(convert_gguf(file, keep_in=kept), dtype="float32")
        for name, file in {**files, "other": other}.items()
    }
    assert prints["other"] == prints["F32"] != prints["Q8_0"]


def test_another_file_at_the_same_place_is_another_model(files, kept, tmp_path):
    place = tmp_path / "model.gguf"
    shutil.copyfile(files["F32"], place)
    engine = TransformersEngine(ModelSource(place, keep_in=kept), name="gguf:x", lora_dir=tmp_path)
    before = engine.fingerprint("gguf:x")
    place.unlink()
    shutil.copyfile(files["Q8_0"], place)
    assert engine.fingerprint("gguf:x") != before


def test_files_beside_it_are_not_looked_at(files, kept, tmp_path):
    place = tmp_path / "beside" / "model.gguf"
    place.parent.mkdir()
    shutil.copyfile(files["Q8_0"], place)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (place.parent / name).write_text("{")
    assert convert_gguf(place, keep_in=tmp_path / "kept").is_dir()


def test_every_token_that_ends_an_answer_in_the_file_ends_it_here(folder, tmp_path):
    file = write_tiny_gguf(tmp_path / "m.gguf", folder, tokenizer__ggml__eot_token_id=7)
    engine = TransformersEngine(ModelSource(file, keep_in=tmp_path / "kept"), name="gguf:x", lora_dir=tmp_path)
    assert engine.eos_ids == {1, 7}


def test_linearly_scaled_rotary_positions_are_taken_over(folder, tmp_path):
    settings = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}
    file = write_tiny_gguf(tmp_path / "m.gguf", folder, **settings)
    engine = TransformersEngine(ModelSource(file, keep_in=tmp_path / "kept"), name="gguf:x", lora_dir=tmp_path)
    rope = engine.model.config.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("linear", 4.0)


def test_rotary_positions_scaled_otherwise_are_refused_since_transformers_would_leave_it_out(folder, tmp_path):
    file = write_tiny_gguf(tmp_path / "m.gguf", folder, llama__rope__scaling__type="yarn")
    with pytest.raises(ConfigurationError, match="rotary positions scaled by 'yarn'"):
        convert_gguf(file, keep_in=tmp_path / "kept")


def test_llama_3s_divisors_of_rotary_frequencies_become_its_scaling(tmp_path):
    import gguf
    import torch
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=dict(parameters))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / 500000.0 ** (torch.arange(0, 64, 2).float() / 64)
    file = tmp_path / "m.gguf"
    for divisors, fits in ((plain / scaled, True), (plain / scaled * 1.1, False)):
        writer = gguf.GGUFWriter(str(file), "llama")
        writer.add_tensor("rope_freqs.weight", divisors.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        plain_config = transformers.LlamaConfig(
            hidden_size=256, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}
        )
        if fits:
            assert gguf_files._scaled_rotary(file, read_header(file), plain_config) == {"rope_parameters": parameters}
        else:
            with pytest.raises(ValueError, match="in another way than Llama 3's"):
                gguf_files._scaled_rotary(file, read_header(file), plain_config)


# -- what cannot be used is refused before anything is loaded


def refused(name, tmp_path, **given):
    with pytest.raises(ConfigurationError) as found:
        build(name, tmp_path / "cache", **given)
    assert not (tmp_path / "cache").exists()
    return str(found.value)


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    assert "there is no file at" in refused(f"gguf:{tmp_path / 'none.gguf'}", tmp_path)
    assert "there is no file at" in refused(f"hf:{tmp_path / 'none.gguf'}", tmp_path)
    assert "a folder lies at" in refused(f"gguf:{tmp_path}", tmp_path)
    assert "did you mean 'smollm2'?" in refused("gguf:SmolLM2.gguf", tmp_path)
    (tmp_path / "there.gguf").touch()
    assert f"did you mean 'gguf:{tmp_path / 'there.gguf'}'?" in refused(f"gguf:{tmp_path}", tmp_path)
    (tmp_path / "config.json").touch()
    assert f"did you mean 'gguf:{tmp_path / 'there.gguf'}'?" in refused(f"hf:{tmp_path}", tmp_path)
    assert "did you mean 'gguf:" in refused(str(tmp_path / "x" / "none.gguf"), tmp_path)
    assert "did you mean 'gguf:none.gguf'" in refused("none.gguf", tmp_path)


def test_what_is_no_gguf_is_refused(tmp_path):
    place = tmp_path / "m.gguf"
    for content in (b"", b"PK\x03\x04" + b"\0" * 64):
        place.write_bytes(content)
        assert "is no GGUF file" in refused(f"gguf:{place}", tmp_path)
    place.write_bytes(b"GGUF\x00\x00\x00\x03" + b"\0" * 64)
    assert "expected 2 or 3, little-endian" in refused(f"gguf:{place}", tmp_path)


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.2, 0.5, 0.999])
def test_a_truncated_file_is_refused_wherever_it_ends(share, files, tmp_path):
    place = tmp_path / "m.gguf"
    content = files["F32"].read_bytes()
    place.write_bytes(content[: max(8, int(share * len(content)))])
    assert "is not whole" in refused(f"gguf:{place}", tmp_path)
    assert "remedy: fetch it again" in refused(f"gguf:{place}", tmp_path)


def test_without_the_package_that_reads_them_the_remedy_is_to_install_it(files, tmp_path, monkeypatch):
    real = gguf_files.importlib.util.find_spec
    monkeypatch.setattr(gguf_files.importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name))
    assert "remedy: pip install gguf" in refused(f"gguf:{files['F32']}", tmp_path)


def test_a_part_of_a_model_and_an_adapter_are_refused(folder, tmp_path):
    part = write_tiny_gguf(tmp_path / "part.gguf", folder, split__count=3)
    assert "llama-gguf-split --merge" in refused(f"gguf:{part}", tmp_path)
    adapter = write_tiny_gguf(tmp_path / "adapter.gguf", folder, general__type="adapter")
    assert "a thing of type 'adapter'" in refused(f"gguf:{adapter}", tmp_path)


def test_a_model_without_a_chat_template_is_refused_unless_somebody_gives_one(tmp_path):
    base = write_tiny_model(tmp_path / "base", chat_template=None)
    file = write_tiny_gguf(tmp_path / "base.gguf", base)
    assert "without a chat template" in refused(f"gguf:{file}", tmp_path)
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    assert build(f"gguf:{file}", tmp_path / "cache", chat_template=template)("zebra")


def test_an_architecture_that_transformers_does_not_read_is_refused(files, tmp_path):
    place = tmp_path / "m.gguf"
    place.write_bytes(files["F32"].read_bytes().replace(b"llama", b"lluma"))
    assert "the architecture 'lluma'" in refused(f"gguf:{place}", tmp_path)


@pytest.mark.parametrize(("kind", "name"), [(15, "Q8_K"), (99, "99")])
def test_a_quantization_that_nobody_undoes_is_refused(kind, name, files, tmp_path):
    content = bytearray(files["F32"].read_bytes())
    named = b"blk.0.attn_q.weight"
    place = content.index(named) + len(named)
    struct.pack_into("<I", content, place + 4 + 8 * struct.unpack_from("<I", content, place)[0], kind)
    (tmp_path / "m.gguf").write_bytes(content)
    said = refused(f"gguf:{tmp_path / 'm.gguf'}", tmp_path)
    assert re.search(rf"blk.0.attn_q.weight has a quantization that .* gguf does not undo \(.*{name}", said), said


def test_what_transformers_cannot_read_after_all_is_one_error_and_leaves_nothing(files, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_files, "_USUAL", {"lluma"})
    place = tmp_path / "m.gguf"
    place.write_bytes(files["F32"].read_bytes().replace(b"llama", b"lluma"))
    lm = build(f"gguf:{place}", tmp_path / "cache")
    with pytest.raises(ConfigurationError, match=r"could not read the GGUF file.*lluma"):
        lm("zebra")
    assert [entry for entry in (tmp_path / "cache" / "safetensors").iterdir() if entry.is_dir()] == []


def test_a_damaged_vocabulary_is_one_error_whatever_the_tokenizer_raises(files, tmp_path):
    damaged = tmp_path / "damaged.gguf"
    content = files["F32"].read_bytes()
    word = struct.pack("<Q", 2) + b"er"
    assert content.count(word)
    # merges then name a token that is not there
    damaged.write_bytes(content.replace(word, struct.pack("<Q", 2) + b"@@"))
    with pytest.raises(ConfigurationError, match=r"could not read the GGUF file.*its vocabulary makes no tokenizer"):
        convert_gguf(damaged, keep_in=tmp_path / "kept")
    assert [entry for entry in (tmp_path / "kept").iterdir() if entry.is_dir()] == []


def test_tensors_that_are_missing_are_not_filled_with_noise(files, tmp_path):
    content = files["F32"].read_bytes()
    place = tmp_path / "m.gguf"
    place.write_bytes(content.replace(b"blk.1.ffn_up", b"blk.1.ffn_xx"))
    with pytest.raises(ConfigurationError, match=r"not filled by its tensors: model\.layers\.1\.mlp\.up_proj"):
        convert_gguf(place, keep_in=tmp_path / "kept")


# -- while it is written


def test_a_full_disk_is_known_before(files, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(ConfigurationError, match=r"takes about .* are free; remedy: .*--copa-cache-dir"):
        convert_gguf(files["F32"], keep_in=tmp_path / "kept")


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_half_written(files, tmp_path):
    """In a process whose files may not grow beyond 20 kB."""
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from copa_harness.errors import ConfigurationError\n"
        "from copa_harness.lm.local.sources.gguf import convert_gguf\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n"
        f"    convert_gguf(Path({str(files['F32'])!r}), keep_in=Path({str(tmp_path / 'kept')!r}))\n"
        "except ConfigurationError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "took no whole copy of the model" in done.stdout
    assert [entry for entry in (tmp_path / "kept").iterdir() if entry.is_dir()] == []


def test_what_a_killed_process_left_is_not_used_and_removed(files, tmp_path, monkeypatch):
    code = (
        "import os\n"
        "from pathlib import Path\n"
        "import safetensors.torch\n"
        "from copa_harness.lm.local.sources.gguf import convert_gguf\n"
        "real = safetensors.torch.save_file\n"
        "safetensors.torch.save_file = lambda *a, **k: (real(*a, **k), os._exit(9))\n"
        f"convert_gguf(Path({str(files['F32'])!r}), keep_in=Path({str(tmp_path / 'kept')!r}))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 9
    left = [entry for entry in (tmp_path / "kept").iterdir() if entry.is_dir()]
    assert [entry.name.endswith(".partial") for entry in left] == [True]
    directory = convert_gguf(files["F32"], keep_in=tmp_path / "kept")
    assert (directory / "tokenizer.json").is_file()
    assert [entry for entry in (tmp_path / "kept").iterdir() if entry.is_dir()] == [directory]


def test_a_header_is_read_in_a_fraction_of_what_the_package_takes_and_says_the_same(files):
    import gguf

    header = check_gguf(files["Q8_0"])
    reader = gguf.GGUFReader(files["Q8_0"])
    assert [(t.name, t.shape, t.kind) for t in header.tensors] == [
        (t.name, tuple(map(int, t.shape)), int(t.tensor_type)) for t in reader.tensors
    ]
    assert header.data_start == reader.data_offset
    assert header.settings["general.architecture"] == "llama"
    assert header.settings["tokenizer.ggml.tokens"] == len(reader.fields["tokenizer.ggml.tokens"].data)
    assert os.path.getsize(files["Q8_0"]) > header.data_start
    assert isinstance(header.settings["tokenizer.chat_template"], str)
    assert Path(files["Q8_0"]).exists()
