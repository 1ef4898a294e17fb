"""Which device a local model runs on, and in what arithmetic: checked as words first, against the machine when loading.

Several processes of one session (pytest-xdist's workers) have a GPU each where there are several, instead of all models
on the first one: worker i takes GPU i mod n. Environment variables are left as they are.
"""

from __future__ import annotations

import re

from copa_harness.errors import ConfigurationError

DTYPES = ("float32", "bfloat16", "float16")

DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu")


def checked_device(device: str | None) -> str | None:
    """`device` itself, if torch may have one of that name.

    Raises:
        ConfigurationError: It is no device's name.
    """
    if device is not None and not re.fullmatch(rf"({'|'.join(DEVICE_TYPES)})(:\d+)?", device):
        raise ConfigurationError(
            f"got the device {device!r}; expected {', '.join(DEVICE_TYPES)}, or one of several such as cuda:1"
        )
    return device


def checked_dtype(dtype: str | None) -> str:
    """`dtype`, float32 by default.

    Raises:
        ConfigurationError: It is none of `DTYPES`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigurationError(f"got dtype {dtype!r}; expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    return dtype or DTYPES[0]


def choose_device(asked: str | None, *, worker: int | None = None) -> str:
    """The device to load a model on.

    Args:
        asked: What somebody wants: `cpu`, `cuda`, `cuda:1`, ...; None takes a GPU if there is one.
        worker: This process's number among several that share the machine, from 0; None if it has it for itself. It
            decides between several GPUs where `asked` does not.

    Returns:
        `cuda` without a number, torch's current GPU, to a process that has the machine for itself.

    Raises:
        ConfigurationError: There is no such device.
    """
    import torch

    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked is None and not n_gpus:
        return "cpu"
    if asked in (None, "cuda") and n_gpus:
        return "cuda" if worker is None else f"cuda:{worker % n_gpus}"
    device = torch.device(str(asked))
    if device.type == "cuda" and (device.index or 0) >= n_gpus:
        visible = ", ".join(f"cuda:{i}" for i in range(n_gpus)) or "none: no driver, no GPU, or a torch without CUDA"
        raise ConfigurationError(
            f"got the device {asked!r}; visible CUDA devices: {visible}; remedy: one of them, or --copa-device=cpu"
        )
    return str(asked)
