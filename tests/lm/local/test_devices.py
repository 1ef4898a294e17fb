"""Devices of local models: words checked early, one GPU for each process of several, one model in memory."""

from __future__ import annotations

import pytest
import torch

from copa_harness.errors import ConfigurationError
from copa_harness.lm.factory import build_lm
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.local.devices import choose_device
from copa_harness.lm.local.engine import TransformersEngine
from copa_harness.testing.tiny_models import write_tiny_model


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that there are so many."""

    def pretend(n):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n)

    return pretend


@pytest.mark.parametrize(
    ("n_gpus", "asked", "worker", "expected"),
    [
        (0, None, None, "cpu"),
        (0, None, 3, "cpu"),
        (1, None, None, "cuda"),
        (4, None, None, "cuda"),
        (4, None, 0, "cuda:0"),
        (4, None, 3, "cuda:3"),
        (4, None, 6, "cuda:2"),
        (1, None, 1, "cuda:0"),
        (4, "cuda", 1, "cuda:1"),
        (4, "cuda", None, "cuda"),
        (4, "cuda:2", 1, "cuda:2"),
        (4, "cpu", 1, "cpu"),
    ],
)
def test_every_process_of_several_has_a_gpu_of_its_own_unless_one_was_named(n_gpus, asked, worker, expected, gpus):
    gpus(n_gpus)
    assert choose_device(asked, worker=worker) == expected


def test_a_gpu_that_is_not_there_is_a_clear_error(gpus):
    gpus(2)
    with pytest.raises(ConfigurationError, match="got the device 'cuda:2'; visible CUDA devices: cuda:0, cuda:1; rem"):
        choose_device("cuda:2")
    gpus(0)
    with pytest.raises(ConfigurationError, match=r"visible CUDA devices: none: no driver.*--copa-device=cpu"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"device": "gpu"}, "got the device 'gpu'; expected cpu, cuda"),
        ({"device": "cuda:x"}, "got the device 'cuda:x'"),
        ({"dtype": "fp16"}, "got dtype 'fp16'; expected float32, bfloat16 or float16"),
        ({"dtype": "int8"}, "got dtype 'int8'"),
    ],
)
def test_words_that_mean_nothing_are_refused_before_anything_is_loaded(setting, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        build_lm("embedded", gateway=Gateway(cache=None), cache_dir=tmp_path, **setting)


def test_engines_that_mean_the_same_device_in_other_words_share_one_model(tmp_path, gpus):
    gpus(0)
    folder = write_tiny_model(tmp_path / "tiny")
    given = [{}, {"device": "cpu"}, {"worker": 0}, {"worker": 1, "device": "cpu"}]
    engines = [TransformersEngine(folder, name=f"hf:{i}", lora_dir=tmp_path, **one) for i, one in enumerate(given)]
    assert len({id(engine.model) for engine in engines}) == 1
