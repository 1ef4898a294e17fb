"""The cache key of one completion, and the JSON form of requests and answers.

The key is the SHA-256 of, in this order: a format version, the canonical request, the rollout id, the candidate index,
and the fingerprint of what answers it. The canonical request is DSPy's own serialization of `dspy.lm15.Request`: model
name, system text, messages, tools and generation settings. The order of keys inside tools and schemas is kept on
purpose: chat templates print them in order, so another order is another prompt. Credentials never are part of a
request.
"""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

from dspy.lm15 import Request, Response

from copa_harness.lm.dspy_internals import request_to_dict, response_from_dict, response_to_dict

KEY_VERSION = 1
"""Raised when the meaning of a key changes; older entries are then never found again."""

_PRICE = "copa_usd"

_SECONDS = "copa_seconds"

_STORED = "copa_stored"

_OURS = (_PRICE, _SECONDS, _STORED)


def request_key(request: Request, *, rollout_id: object, candidate: int, fingerprint: str) -> str:
    """The key under which one completion is stored.

    Args:
        request: The canonical request.
        rollout_id: DSPy's rollout id (an int as a rule), or None for the plain request.
        candidate: Index of the completion among the `n` of one call, from 0.
        fingerprint: What answers: see `Engine.fingerprint`.

    Returns:
        64 hexadecimal digits. Equal arguments give equal keys; any difference gives another key.
    """
    material = [KEY_VERSION, request_to_dict(request), rollout_id, candidate, fingerprint]
    return hashlib.sha256(_ENCODER.encode(material).encode("utf-8")).hexdigest()


def response_record(response: Response, *, usd: float | None = None, seconds: float | None = None) -> dict[str, Any]:
    """The answer as JSON data, with its price in dollars and the seconds it took, if known, and the time it is now.

    Raw provider data (headers, ids) is left out.
    """
    record: dict[str, Any] = response_to_dict(response)
    if usd is not None:
        record[_PRICE] = usd
    if seconds is not None:
        record[_SECONDS] = round(seconds, 6)
    record[_STORED] = time.time()
    return record


def replayed_response(record: dict[str, Any]) -> Response:
    """The answer from JSON data, with empty usage: a replay costs nothing, and DSPy must not bill it.

    Raises:
        KeyError: A field is missing.
        TypeError: A field has the wrong type.
        ValueError: A field has an impossible value.
    """
    response: Response = response_from_dict({k: v for k, v in record.items() if k not in (*_OURS, "usage")})
    return response


def recorded_bill(record: dict[str, Any]) -> tuple[Response, float | None]:
    """The answer with the usage it was bought with, and its price in dollars, None if it was not known."""
    price = record.get(_PRICE)
    response: Response = response_from_dict({k: v for k, v in record.items() if k not in _OURS})
    return response, price if isinstance(price, (int, float)) else None


def recorded_seconds(record: dict[str, Any]) -> float | None:
    """The seconds the answer took when it was bought, None if they were not kept."""
    seconds = record.get(_SECONDS)
    return float(seconds) if isinstance(seconds, (int, float)) else None


def stored_at(record: dict[str, Any]) -> float | None:
    """When the answer was bought, in Unix seconds; None if it was not kept."""
    stored = record.get(_STORED)
    return float(stored) if isinstance(stored, (int, float)) else None


def _plain(value: object) -> object:
    if isinstance(value, (tuple, set, frozenset)):
        return sorted(value, key=repr) if isinstance(value, (set, frozenset)) else list(value)
    raise TypeError(f"got a {type(value).__qualname__} inside a model request; only JSON values can be cached")


_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False, default=_plain)
