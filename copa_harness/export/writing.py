"""`copa export ARTIFACT --to FORM`: a folder with the program in that form, and a check that replays the test rows.

Every form is one module of `formats` with `write(export)`, which fills the folder and returns what to say about it. The
scripts in it are templates, and need nothing of this package.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pprint import pformat
from typing import Any

from copa_harness.atomic_files import temporary_name, write_atomic
from copa_harness.errors import ArtifactError, ConfigurationError
from copa_harness.export.annotations import parsing_of
from copa_harness.export.formats import FORMS
from copa_harness.export.scored import PredictorKept, RowKept, Scored, read_scored
from copa_harness.lm.local.sources.names import EMBEDDED, is_local_name, named_place
from copa_harness.lm.local.sources.source import ModelSource
from copa_harness.store.artifacts import Artifact, load_artifact

ADAPTER, BASE = "adapter", "base"
"""Folders of an export: the LoRA adapter, and the model that ships with this package."""


@dataclass(frozen=True, slots=True)
class Export:
    """A folder being filled.

    Attributes:
        folder: Where.
        artifact: From what.
        scored: What it keeps.
    """

    folder: Path
    artifact: Artifact
    scored: Scored

    @property
    def is_local(self) -> bool:
        """Whether the model runs where it is asked, by transformers."""
        return is_local_name(self.scored.base)

    def prompts(self) -> dict[str, dict[str, Any]]:
        """What a script needs of every predictor: messages, slots, settings, and how its outputs are read.

        Raises:
            ConfigurationError: A predictor has no messages that can be written down, or in another layout.
        """
        if self.scored.adapter != "ChatAdapter":
            raise ConfigurationError(
                f"got prompts in the layout of {self.scored.adapter}; expected ChatAdapter's, whose answers a plain "
                "script can read; remedy: --to dspy"
            )
        return {one.name: self._prompt(one) for one in self.scored.predictors}

    def _prompt(self, one: PredictorKept) -> dict[str, Any]:
        if one.problem:
            raise ConfigurationError(f"the prompt of {one.name!r} cannot be written as text: {one.problem}")
        return {
            "messages": [dict(message) for message in one.messages],
            "slots": dict(one.slots),
            "outputs": {field.name: parsing_of(field.type) for field in one.fields if not field.is_input},
            "settings": {**one.settings, **one.bounds},
        }

    def the_only_model(self) -> str:
        """The model of every predictor.

        Raises:
            ConfigurationError: They have several.
        """
        names = {one.model for one in self.scored.predictors}
        if len(names) > 1:
            raise ConfigurationError(
                f"got a program on {len(names)} models ({', '.join(sorted(names))}); expected one: copa_harness.load "
                "takes several"
            )
        return names.pop()

    def write_answer(self, *, source: str = "literal", needs: str = "", **more: Any) -> None:
        """Write `answer.py`, for the kind of model that was scored, and `check.py`.

        Args:
            source: Where its prompts stand: in it, or in the `text` or `json` files beside it.
            needs: What has to be installed or running.
            **more: Replaces what the template is given.
        """
        local = self.is_local and more.get("engine") != "openai"
        given = {"source": source, "prompts": _literal(self.prompts()), "needs": needs, **self._engine(local), **more}
        self.render("answer.py", **given)
        self.write_check(whole_program=False)

    def _engine(self, local: bool) -> dict[str, Any]:
        from copa_harness.lm.local.engine import DEFAULT_MAX_TOKENS

        model = self.the_only_model()
        if not local:
            return {"engine": "openai", "model": model.partition("/")[2] or model, "base_url": self.scored.api_base}
        lora = f'str(HERE / "{ADAPTER}")' if self.copy_adapter() else "None"
        place = self.base_place()
        base = f'str(HERE / "{BASE}")' if place == BASE else repr(place)
        return {"engine": "transformers", "base": base, "lora": lora, "default_max_tokens": DEFAULT_MAX_TOKENS}

    def write_check(self, *, whole_program: bool) -> None:
        """Write the test rows and `check.py`."""
        rows = [
            {"id": row.id, "inputs": row.inputs, "predicted": row.predicted or None, "calls": self._calls(row)}
            for row in self.scored.rows
            if row.outcome in ("ok", "unparsed") and (whole_program or self._calls(row))
        ]
        self.write("rows.jsonl", "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
        unreadable = "Exception" if whole_program else "ValueError"
        self.render("check.py", whole_program=whole_program, unreadable=unreadable)

    def _calls(self, row: RowKept) -> Sequence[Mapping[str, Any]]:
        """What predictors were given and answered; nothing was kept of a call whose answer could not be read."""
        if row.calls or row.outcome == "ok" or self.scored.kind not in ("Predict", "ChainOfThought"):
            return row.calls
        return [{"predictor": self.scored.predictors[0].name, "inputs": row.inputs, "outputs": None}]

    def copy_adapter(self) -> bool:
        """Copy the LoRA adapter, naming its base; whether there is one."""
        if self.artifact.lora_directory is None:
            return False
        target = self.folder / ADAPTER
        target.mkdir(exist_ok=True)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.copyfile(self.artifact.lora_directory / name, target / name)
        config = json.loads((target / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = self.base_place()
        self.write(f"{ADAPTER}/adapter_config.json", json.dumps(config, indent=2) + "\n")
        return True

    def base_place(self) -> str:
        """The base model's folder or id; the shipped model is copied beside the scripts, since nobody else has it."""
        if not self.is_local:
            return self.scored.base.partition("/")[2]
        place, remedy = named_place(self.scored.base, option="base model")
        if self.scored.base == EMBEDDED:
            shutil.copytree(
                place,
                self.folder / BASE,
                ignore=shutil.ignore_patterns("*.py", "__pycache__", "pretrain"),
                dirs_exist_ok=True,
            )
            return BASE
        cache = self.artifact.directory.absolute().parents[1]
        source = ModelSource(place, name=self.scored.base, keep_in=cache / "safetensors", remedy=remedy)
        return str(source.directory() if source.is_file or Path(place).is_dir() else place)

    def example(self) -> str:
        """Arguments of a call, for docstrings."""
        one = self.scored.predictors[0]
        return ", ".join(f"{field.name}=..." for field in one.fields if field.is_input)

    def render(self, name: str, **more: Any) -> None:
        """Write a script from its template."""
        import jinja2

        scripts = jinja2.Environment(
            loader=jinja2.PackageLoader("copa_harness.export"),
            autoescape=False,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            undefined=jinja2.StrictUndefined,
        )
        scripts.filters["literal"] = _literal
        given = {
            "task": self.scored.task,
            "strategy": self.scored.strategy,
            "score": self.scored.score,
            "n": len(self.scored.rows),
            "example": self.example(),
        }
        self.write(name, scripts.get_template(f"{name}.jinja").render(**{**given, **more}))

    def write(self, name: str, text: str) -> None:
        """Write a file of the folder."""
        write_atomic(self.folder / name, text)


def export_artifact(directory: Path, *, to: str, place: Path | None = None) -> tuple[Path, list[str]]:
    """Write an artifact in another form.

    Args:
        directory: The artifact's folder.
        to: One of `FORMS`.
        place: The folder to make; by default `<task>-<form>` here.

    Returns:
        The folder, and what to say about it.

    Raises:
        ArtifactError: The artifact is damaged, or was never scored.
        ConfigurationError: It cannot be had in this form, or something is in the way.
    """
    artifact = load_artifact(directory)
    scored = read_scored(artifact)
    target = Path(f"{scored.task}-{to}") if place is None else place
    if target.exists():
        raise ConfigurationError(f"got {target}, which is there already; expected the name of a folder to make")
    partial = temporary_name(target.absolute())
    try:
        partial.mkdir(parents=True)
        export = Export(partial, artifact, scored)
        said = import_module(f"copa_harness.export.formats.{FORMS[to]}").write(export)
        if scored.constrained:
            said.append(
                "its answers were chosen among the allowed values (--copa-constrain); here they are generated, and the "
                "check tells which differ"
            )
        partial.rename(target)
    except OSError as error:
        raise ArtifactError(f"cannot write {target} ({error})") from error
    finally:
        if partial.exists():
            shutil.rmtree(partial)
    return target, said


def _literal(value: Any) -> str:
    return pformat(value, width=110, sort_dicts=False)
