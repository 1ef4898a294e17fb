"""A model folder's tokenizer; for the embedded model without transformers, whose import takes longer than all else.

What class of tokenizer a folder gets is for transformers to say: it goes by the model's type as well. Only the shipped
folder, known to need nothing but its `tokenizer.json`, gets a stand-in: the part of a Hugging Face tokenizer that
rendering, tokenizing and decoding need. Whatever else is asked of it, or a chat template beyond plain Jinja, goes to
the library's own tokenizer, loaded then.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from copa_harness.lm.embedded import embedded_model_path

_BEYOND_JINJA = re.compile(r"\b(generation|tojson|strftime_now|namespace|dict|break|continue)\b")
"""What transformers adds to Jinja, or alters in it, beside `raise_exception`."""
_SAFE_JINJA = (3, 1, 6)
"""Older sandboxes can be escaped; transformers refuses them too."""


def read_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        OSError, ValueError, KeyError: transformers cannot load it.
    """
    is_shipped = directory == embedded_model_path().resolve()
    return PlainTokenizer(directory) if is_shipped else library_tokenizer(directory)


def library_tokenizer(directory: Path) -> Any:
    """The same by `transformers.AutoTokenizer`."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)


class PlainTokenizer:
    """Stands for the Hugging Face tokenizer of a folder; any attribute not defined here is that tokenizer's.

    Args:
        directory: a folder with `tokenizer.json`, `tokenizer_config.json` (special tokens as strings) and
            `chat_template.jinja`.
    """

    def __init__(self, directory: Path) -> None:
        from tokenizers import Tokenizer

        self._directory = directory
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        self._special = {name: str(token) for name, token in config.items() if name.endswith("_token")}
        self.chat_template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
        self.eos_token = self._special["eos_token"]
        self.eos_token_id = self._tokenizer.token_to_id(self.eos_token)

    def __call__(
        self,
        text: str,
        *,
        add_special_tokens: bool,
        return_offsets_mapping: bool = False,
        verbose: bool = True,
    ) -> dict[str, Any]:
        """`input_ids` of one text, and `offset_mapping` if asked for."""
        encoded = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        found = {"input_ids": encoded.ids}
        return {**found, "offset_mapping": encoded.offsets} if return_offsets_mapping else found

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """Text of tokens.

        Raises:
            ValueError: `clean_up_tokenization_spaces` is asked for.
        """
        if clean_up_tokenization_spaces:
            raise ValueError("got clean_up_tokenization_spaces=True; expected False, as everywhere in this package")
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> str:
        """Messages as text."""
        source = chat_template or self.chat_template
        if tokenize or not source or _BEYOND_JINJA.search(source) or not _jinja_is_safe():
            options = {"tokenize": tokenize, "add_generation_prompt": add_generation_prompt}
            return self._library.apply_chat_template(  # type: ignore[no-any-return]
                conversation, chat_template=chat_template, **options
            )
        template = _compiled(source)
        return str(
            template.render(
                messages=[dict(message) for message in conversation],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special,
            )
        )

    @functools.cached_property
    def _library(self) -> Any:
        return library_tokenizer(self._directory)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._library, name)


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> Any:
    """A chat template compiled as transformers does it."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)


def _jinja_is_safe() -> bool:
    import jinja2

    return tuple(int(part) for part in re.findall(r"\d+", jinja2.__version__)[:3]) >= _SAFE_JINJA
