"""Printed numbers: formats, and the fixed features from which the number tokens' embeddings are made.

Symbols: v a printed value, u in [0, 1) its value as a share of its format's range (5.1 -> .51, 47 -> .47, 13.2 ->
.132). The embedding row of a number token during pretraining is ``features(v) @ P + r`` with learned P, r, so that
what is learned at one number holds for its neighbours. This module knows nothing of episodes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FORMATS: tuple[str, ...] = ("d.d", "dd", "d", "ddd", "0.dd", "dd.d", "d.dd")
FORMAT_RANGE = {"d.d": 10.0, "dd": 100.0, "d": 10.0, "ddd": 1000.0, "0.dd": 1.0, "dd.d": 100.0, "d.dd": 10.0}
_FREQUENCIES = np.array([0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16])
_LOG_FREQUENCIES = np.array([0.25, 0.5, 1.0, 2.0])


def print_number(share: float, fmt: str) -> str:
    """The text of ``share`` (0..1 of the format's range) in one of ``FORMATS``."""
    share = min(max(share, 0.0), 0.9999)
    value = share * FORMAT_RANGE[fmt]
    if fmt in ("dd", "d", "ddd"):
        return str(int(value))
    if fmt == "0.dd" or fmt == "d.dd":
        return f"{min(value, 0.99 if fmt == '0.dd' else 9.99):.2f}"
    return f"{min(value, 9.9 if fmt == 'd.d' else 99.9):.1f}"


def token_share(text: str) -> float:
    """U of a number token, by the format its text has."""
    value = float(text)
    if "." not in text:
        return value / 10.0 ** len(text)
    decimals = len(text.split(".")[1])
    if decimals == 2:
        return value if value < 1 else value / 10.0
    return value / 10.0 if value < 10 else value / 100.0


def number_features(texts: list[str]) -> npt.NDArray[np.float32]:
    """Fixed features of number tokens, shape (n, n_features): waves of u, waves of log value, and the format.

    Amplitudes fall as 1 / sqrt(frequency), so that inner products of two rows are a smooth kernel of their distance.
    """
    share = np.array([token_share(text) for text in texts])
    angle = 2 * np.pi * share[:, None] * _FREQUENCIES
    damp = np.sqrt(np.maximum(_FREQUENCIES, 1.0))
    log_value = np.log10(np.array([float(text) for text in texts]) + 0.1)
    log_angle = np.pi * log_value[:, None] * _LOG_FREQUENCIES
    kinds = ["d", "dd", "ddd", "d.d", "dd.d", "0.dd", "d.dd"]
    kind = np.zeros((len(texts), len(kinds)))
    for row, text in enumerate(texts):
        kind[row, kinds.index(_kind(text))] = 1.0
    columns = [
        np.cos(angle) / damp,
        np.sin(angle) / damp,
        2 * share[:, None] - 1,
        0.4 * np.cos(log_angle),
        0.4 * np.sin(log_angle),
        0.5 * kind,
        np.ones((len(texts), 1)),
    ]
    return np.concatenate(columns, axis=1).astype(np.float32)


def _kind(text: str) -> str:
    if "." not in text:
        return "d" * len(text)
    whole, decimals = text.split(".")
    if len(decimals) == 2:
        return "0.dd" if whole == "0" else "d.dd"
    return "d.d" if len(whole) == 1 else "dd.d"


def number_strings_of(vocabulary: dict[str, int]) -> list[str]:
    """The number tokens of a vocabulary, in order of id."""
    numbers = [
        token for token in vocabulary if token[0].isdigit() and token.isascii() and token.replace(".", "", 1).isdigit()
    ]
    return sorted(numbers, key=lambda token: vocabulary[token])
