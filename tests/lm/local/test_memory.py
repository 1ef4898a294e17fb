"""Too little memory: what counts as such, and the one clear error it becomes wherever it strikes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import dspy
import numpy as np
import pytest
import torch
from dspy.lm15 import Config, Message, Request

from copa_harness.errors import OutOfMemoryError, ProviderError
from copa_harness.evaluate import evaluate
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.factory import build_lm
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.local.engine import TransformersEngine
from copa_harness.lm.local.llama import LlamaDecoder
from copa_harness.lm.local.memory import is_out_of_memory, oom_message
from copa_harness.lm.local.model import LocalModel
from copa_harness.testing.tiny_models import write_tiny_model

TORCH_ON_A_CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "80000000000000 bytes. Error code 12 (Cannot allocate memory)\nException raised from ... \nframe #0: c10::..."
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("memory") / "tiny", seed=12)


@pytest.fixture
def engine(folder, tmp_path):
    return TransformersEngine(folder, name="hf:tiny", lora_dir=tmp_path)


def request(text="zebra"):
    return Request(model="hf:tiny", messages=(Message.user(text),), config=Config(max_tokens=6))


@pytest.fixture
def fails(engine, monkeypatch):
    """Makes every forward pass raise."""

    def set_failure(error):
        def forward(*args, **kwargs):
            raise error

        assert engine.generator.model.decoder is not None
        monkeypatch.setattr(LlamaDecoder, "read", forward)

    return set_failure


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (TORCH_ON_A_CPU, True),
        (MemoryError(), True),
        (np._core._exceptions._ArrayMemoryError((2, 3), np.dtype("float64")), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 400 bytes."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_too_little_memory_is_known_by_every_name_it_has(error, expected):
    assert is_out_of_memory(error) is expected


def test_torch_itself_says_what_is_taken_for_too_little_memory():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert "\n" not in oom_message(raised.value)


@pytest.mark.parametrize(
    "error", [TORCH_ON_A_CPU, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried ...")]
)
def test_one_prompt_too_many_is_one_error_with_a_remedy_for_every_kind(error, engine, fails):
    fails(error)
    with pytest.raises(OutOfMemoryError, match=r"one prompt of \d+ tokens alone, .*max_tokens=6.*remedy: fewer") as it:
        engine.complete(request(), seed=0)
    assert not isinstance(it.value, ProviderError)
    assert "frame #0" not in str(it.value)


def test_everybody_in_a_batch_hears_of_it(engine, fails):
    fails(TORCH_ON_A_CPU)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(engine.complete, request(f"case {i}"), seed=0) for i in range(4)]
    assert all(isinstance(future.exception(), OutOfMemoryError) for future in futures)


def test_an_evaluation_ends_with_it_instead_of_counting_failed_answers(folder, tmp_path, monkeypatch):
    lm = build_lm(f"hf:{folder}", gateway=Gateway(cache=None), cache_dir=tmp_path, max_tokens=6)
    monkeypatch.setattr("copa_harness.lm.local.scheduler.free_bytes", lambda device: 1000)
    rows = [dspy.Example(question=f"q{i}", answer="a").with_inputs("question") for i in range(3)]
    program = dspy.Predict("question -> answer")
    with open_scope("run") as scope, pytest.raises(OutOfMemoryError, match=r"needs about .* MB on cpu, where 0 MB are"):
        evaluate(program, rows, metric=lambda example, prediction, trace=None: True, split="test", lm=lm)
    assert scope.failures == {}
    assert scope.usage().calls == 0


def test_weights_that_do_not_fit_are_no_mistake_in_the_folder(folder, monkeypatch):
    import transformers

    def too_large(*args, **kwargs):
        raise TORCH_ON_A_CPU

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", too_large)
    with pytest.raises(OutOfMemoryError, match=r"weights of .*tiny in float32 .*remedy: a smaller model"):
        LocalModel(folder, device="cpu", dtype="float32")


def test_neither_is_what_is_made_of_the_weights_while_they_are_loaded(folder, tmp_path, monkeypatch):
    def too_large(*args, **kwargs):
        raise TORCH_ON_A_CPU

    monkeypatch.setattr("copa_harness.lm.local.scheduler.LocalModel", too_large)
    engine = TransformersEngine(folder, name="hf:tiny", lora_dir=tmp_path, dtype="float16")
    with pytest.raises(OutOfMemoryError, match=r"holds the weights of .*tiny in float16, but not what is made of them"):
        engine.complete(request(), seed=0)
