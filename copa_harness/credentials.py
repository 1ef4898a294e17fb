"""Credentials are never written: masked in texts, refused in documents, and known by their key or their look."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote, quote_plus

MASK = "***"
"""What stands in place of a secret."""


_KEY_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


_SECRET_WORDS = frozenset(
    {
        "token",
        "authorization",
        "password",
        "passwd",
        "secret",
        "secrets",
        "credential",
        "credentials",
        "bearer",
        "apikey",
        "passphrase",
    }
)


_KEY_KINDS = frozenset({"api", "access", "private", "secret", "auth", "signing"})


_MODEL_TOKENS = frozenset({"bos", "eos", "pad", "unk", "mask", "sep", "cls", "special", "added"})


_SECRET_TEXT = re.compile(
    r"""(?xi)
    \b(?: sk | pk | hf | ghp | gho | github_pat | xox[abp] ) [-_] [A-Za-z0-9_\-]{16,}
    | (?<= bearer\s ) [A-Za-z0-9._\-]{12,}
    | (?<= api_key= ) [^\s&,;'"]{8,} | (?<= api-key: ) \s* [^\s&,;'"]{8,}
    """
)


def is_secret_key(key: str) -> bool:
    """Whether a mapping key looks like it names a credential (`api_key`, `HF_TOKEN`, `Authorization`).

    `input_tokens`, `max_tokens`, `eos_token` and the like are not credentials.
    """
    words = [word.lower() for word in _KEY_WORDS.findall(key)]
    if _MODEL_TOKENS.intersection(words):
        return False
    if _SECRET_WORDS.intersection(words):
        return not (words[-1] in {"count", "counts", "id", "ids", "limit", "usage"} and "token" in words)
    return any(second == "key" and first in _KEY_KINDS for first, second in itertools.pairwise(words))


def mask_text(text: str) -> str:
    """The text with everything that looks like a credential (`sk-...`, `Bearer ...`) replaced."""
    return _SECRET_TEXT.sub(MASK, text)


_SHOWN_AT_MOST = 9
"""Characters in a row of a known secret that may show: the last four, as providers like to tell them, say nothing."""


def mask_known(text: str, secrets: Iterable[str]) -> str:
    """The text without these secrets: as they are, URL-encoded, or a longer piece of them.

    Args:
        text: What an endpoint said, say. Mask before anything is cut off: half a secret is not recognized elsewhere.
        secrets: Any.
    """
    hidden = bytearray(len(text))
    for form in {form for secret in secrets for form in (secret, quote(secret, safe=""), quote_plus(secret)) if form}:
        size = min(len(form), _SHOWN_AT_MOST + 1)
        for piece in {form[start : start + size] for start in range(len(form) - size + 1)}:
            found = text.find(piece)
            while found >= 0:
                hidden[found : found + size] = b"\1" * size
                found = text.find(piece, found + 1)
    runs = itertools.groupby(zip(text, hidden, strict=True), key=lambda pair: pair[1])
    return "".join(MASK if is_hidden else "".join(letter for letter, _ in run) for is_hidden, run in runs)


def mask_secrets(value: Any) -> Any:
    """A JSON value with the values of credential-like keys, and credential-like text, replaced by `***`."""
    if isinstance(value, Mapping):
        return {
            key: MASK if item not in (None, "", [], {}) and is_secret_key(str(key)) else mask_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [mask_secrets(item) for item in value]
    return mask_text(value) if isinstance(value, str) else value


def find_credential(value: Any, *, trail: str = "") -> str | None:
    """Where in a JSON value something stands that by key *and* content looks like a credential; None when nowhere.

    For documents that must come back as they were: there a data field that is merely called `token` is no secret.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            here = f"{trail} > {key}" if trail else str(key)
            if isinstance(item, str) and is_secret_key(str(key)) and _looks_random(item):
                return here
            if found := find_credential(item, trail=here):
                return found
    elif isinstance(value, list):
        for index, item in enumerate(value):
            if found := find_credential(item, trail=f"{trail} > {index}" if trail else str(index)):
                return found
    elif isinstance(value, str) and _SECRET_TEXT.search(value):
        return trail or "the value"
    return None


def _looks_random(text: str) -> bool:
    return len(text) >= 12 and not any(c.isspace() for c in text) and any(c.isdigit() for c in text)
