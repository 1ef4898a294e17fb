"""Artifacts: the deployable result of a run, one folder that explains and proves itself.

    <artifact>/program.json     the program's state (instructions, demonstrations), without any model settings
    <artifact>/lora/            the LoRA adapter, when the weights were tuned (safetensors and JSON only)
    <artifact>/scored-*.json    its prompts and its scored answers on the test split, once it was scored
    <artifact>/manifest.json    who made it, from what, and the SHA-256 of every file

The folder appears whole: it is filled under a temporary name and renamed. Loading verifies every checksum, follows no
link, and refuses what nobody wrote, hidden files too. No pickle is ever copied or read.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from copa_harness.atomic_files import remove_leftovers, temporary_name, write_atomic
from copa_harness.credentials import is_secret_key, mask_secrets
from copa_harness.documents import from_json, hash_file, hash_json, parse_json, pretty_json, to_json, to_jsonable
from copa_harness.errors import ArtifactError
from copa_harness.results import SCHEMA

KIND = "copa_harness artifact"
PROGRAM = "program.json"
MANIFEST = "manifest.json"
LORA = "lora"
SCORED = "scored-"
"""How the name of the file with the scored answers begins; the hash of its content follows."""

_PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib"})
_DATA_LISTS = frozenset({"demos", "train", "traces"})


@dataclass(frozen=True, slots=True)
class Artifact:
    """A verified artifact.

    Attributes:
        directory: where it lies.
        program_state: for `program.load_state`; model settings are not part of it.
        lora_directory: the LoRA adapter's folder; None for base weights.
        manifest: what was given to `save_artifact` (model, strategy, scores, versions, ...).
        fingerprint: SHA-256 over the content of program and weights (not the manifest, not the scored answers).
        scored: what `add_scored` kept; None if nothing was.
    """

    directory: Path
    program_state: dict[str, Any]
    lora_directory: Path | None
    manifest: dict[str, Any]
    fingerprint: str
    scored: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ArtifactFile:
    """A file of an artifact, as its manifest has it."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `manifest.json` says: the fingerprint over the content, what was recorded of the making, and every file."""

    fingerprint: str
    about: dict[str, Any]
    files: dict[str, ArtifactFile]
    schema: int = SCHEMA
    kind: str = KIND


def save_artifact(
    directory: Path,
    *,
    program_state: Mapping[str, Any],
    lora_directory: Path | None,
    manifest: Mapping[str, Any],
) -> Path:
    """Write an artifact.

    Args:
        directory: the artifact's own folder. One that holds an older artifact is replaced, one that already holds
            this very content is left alone, and a folder with anything else in it is refused.
        program_state: as from `program.dump_state()`; a predictor's `lm` entry is dropped.
        lora_directory: folder of the LoRA adapter to copy, or None.
        manifest: what to record about the making; values under credential-like keys are masked.

    Returns:
        `directory`.

    Raises:
        ArtifactError: pickles among the weights, a credential in the program state, a foreign folder in the way.
        OSError: the folder cannot be written or the disk is full; an older artifact is intact.
    """
    target = Path(directory)
    _refuse_foreign(target)
    state = _without_models(to_jsonable(program_state, fallback=None))
    _refuse_secrets(state, trail="program state")
    about = mask_secrets(to_jsonable(manifest))
    remove_leftovers(target.parent)
    temporary = temporary_name(target)
    try:
        temporary.mkdir(parents=True)
        write_atomic(temporary / PROGRAM, pretty_json(state))
        if lora_directory is not None:
            _copy_weights(Path(lora_directory), temporary / LORA)
        paths = {name: temporary / name for name in _file_names(temporary)}
        files = {name: ArtifactFile(hash_file(path), path.stat().st_size) for name, path in paths.items()}
        write_atomic(temporary / MANIFEST, _manifest_text(Manifest(_fingerprint(files), about, files)))
        _put_in_place(temporary, target)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
    return target


def add_scored(directory: Path, scored: Mapping[str, Any]) -> None:
    """Keep scored answers with an artifact, in place of older ones; whoever reads it meanwhile finds it whole.

    Args:
        directory: the artifact's folder.
        scored: plain JSON types.

    Raises:
        ArtifactError: there is no artifact, or a damaged one.
        OSError: the folder cannot be written.
    """
    manifest, name = verify_artifact(directory), _scored_name(scored)
    if name not in manifest.files:
        write_atomic(directory / name, pretty_json(scored))
        files = {known: file for known, file in manifest.files.items() if not known.startswith(SCORED)}
        files[name] = ArtifactFile(hash_file(directory / name), (directory / name).stat().st_size)
        write_atomic(directory / MANIFEST, _manifest_text(Manifest(manifest.fingerprint, manifest.about, files)))
    for older in directory.glob(f"{SCORED}*.json"):
        if older.name != name:
            older.unlink(missing_ok=True)


def holds_scored(directory: Path, scored: Mapping[str, Any]) -> bool:
    """Whether an artifact keeps exactly these scored answers.

    Raises:
        ArtifactError: there is no artifact, or a damaged one.
    """
    return _scored_name(scored) in verify_artifact(directory).files


def _scored_name(scored: Mapping[str, Any]) -> str:
    return f"{SCORED}{hash_json(scored)[:12]}.json"


def load_artifact(path: Path) -> Artifact:
    """Read and verify an artifact.

    Args:
        path: the artifact's folder, or its manifest.json.

    Raises:
        ArtifactError: missing, incomplete, changed since it was written, or of another schema; says which and what
            to do.
    """
    directory = Path(path).parent if Path(path).name == MANIFEST else Path(path)
    manifest = verify_artifact(directory)
    files = manifest.files
    strangers = sorted(set(_everything(directory)) - set(files) - {MANIFEST})
    if strangers:
        raise ArtifactError(
            f"artifact {directory}: {', '.join(strangers[:5])} not in its manifest. Next: move out what is foreign."
        )
    return Artifact(
        directory=directory,
        program_state=_read_object(directory, PROGRAM, "program's state"),
        lora_directory=directory / LORA if any(name.startswith(f"{LORA}/") for name in files) else None,
        manifest=manifest.about,
        fingerprint=manifest.fingerprint,
        scored=next(
            (_read_object(directory, name, "scored answers") for name in files if name.startswith(SCORED)), None
        ),
    )


def verify_artifact(directory: Path) -> Manifest:
    """The manifest of an artifact whose files are all there as they were written; whatever else lies there.

    Raises:
        ArtifactError: As `load_artifact`.
    """
    if links := [name for name in _everything(directory) if (directory / name).is_symlink()]:
        names = ", ".join(links[:5])
        raise ArtifactError(
            f"artifact {directory}: {names}: got a link, which may lead anywhere; expected files. {_AGAIN}"
        )
    manifest = _read_manifest(directory)
    files = manifest.files
    for name, expected in files.items():
        file = directory / _safe(name, directory)
        if not file.is_file():
            raise ArtifactError(f"artifact {directory}: {name} is missing. {_AGAIN}")
        got = hash_file(file)
        if got != expected.sha256:
            raise ArtifactError(
                f"artifact {directory}: {name} was changed (sha256 {got[:12]}, the manifest says "
                f"{expected.sha256[:12]}). {_AGAIN}"
            )
    if PROGRAM not in files or manifest.fingerprint != _fingerprint(files):
        raise ArtifactError(f"artifact {directory}: {MANIFEST} was changed. {_AGAIN}")
    return manifest


_AGAIN = "Next: run the suite again to make it anew, or restore the folder from where it was copied."


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    try:
        document = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"no artifact at {directory}: there is no {MANIFEST}. {_AGAIN}") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"artifact {directory}: {MANIFEST} cannot be read ({error}). {_AGAIN}") from error
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise ArtifactError(f"{path} is not the manifest of a copa_harness artifact. {_AGAIN}")
    if document.get("schema") != SCHEMA:
        raise ArtifactError(
            f"artifact {directory} has schema {document.get('schema')!r}, this version reads {SCHEMA}. Next: load it "
            f"with the copa_harness that wrote it, or run the suite again."
        )
    try:
        return from_json(Manifest, document)
    except ValueError as error:
        raise ArtifactError(
            f"artifact {directory}: {MANIFEST} is incomplete; expected files, about, fingerprint ({error}). {_AGAIN}"
        ) from error


def _read_object(directory: Path, name: str, what: str) -> dict[str, Any]:
    try:
        state = parse_json((directory / name).read_bytes())
        if isinstance(state, dict):
            return state
        why = f"got {type(state).__name__}, expected an object"
    except (OSError, ValueError) as error:
        why = str(error)
    raise ArtifactError(f"artifact {directory}: {name} holds no {what} ({why}). {_AGAIN}")


def _manifest_text(manifest: Manifest) -> str:
    document = to_json(manifest)
    head = {name: document.pop(name) for name in ("schema", "kind")}
    return pretty_json(head | document)


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename into place; an older artifact steps aside first and is removed last."""
    if target.exists():
        if _same_content(temporary, target):
            return
        aside = target.parent / f"{temporary.name}.old"
        target.rename(aside)
        try:
            temporary.rename(target)
        except OSError:
            aside.rename(target)
            raise
        shutil.rmtree(aside)
    else:
        temporary.rename(target)


def _same_content(new: Path, old: Path) -> bool:
    """Whether the older artifact is intact and equal, manifest included."""
    try:
        load_artifact(old)
    except ArtifactError:
        return False
    return (new / MANIFEST).read_bytes() == (old / MANIFEST).read_bytes()


def _refuse_foreign(target: Path) -> None:
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST).is_file())):
        raise ArtifactError(
            f"{target} exists and is no artifact (no {MANIFEST}); it is not overwritten. Next: choose another folder."
        )


def _copy_weights(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise ArtifactError(f"no LoRA adapter at {source}: expected a folder. Next: train again, or pass None.")
    names = list(_file_names(source))
    if not any(name.endswith(".safetensors") for name in names):
        raise ArtifactError(f"no LoRA adapter at {source}: expected a .safetensors file, got {names[:5] or 'nothing'}.")
    for name in names:
        if Path(name).suffix.lower() in _PICKLES:
            raise ArtifactError(
                f"{source / name} may hold a pickle, which can run code when loaded; expected safetensors and JSON. "
                f"Next: save the weights as safetensors."
            )
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _file_names(directory: Path) -> Iterator[str]:
    """Relative POSIX names of the regular files below a folder, sorted; hidden ones (locks, temporaries) left out."""
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            yield relative.as_posix()


def _everything(directory: Path) -> Iterator[str]:
    """Relative POSIX names of whatever lies below a folder and is no folder: hidden files and links too."""
    for path in sorted(directory.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            yield path.relative_to(directory).as_posix()


def _fingerprint(files: Mapping[str, ArtifactFile]) -> str:
    return hash_json({name: file.sha256 for name, file in files.items() if not name.startswith(SCORED)})


def _safe(name: str, directory: Path) -> str:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in name:
        raise ArtifactError(f"artifact {directory}: {name!r} in its manifest leads outside the folder. {_AGAIN}")
    return name


def _without_models(state: Any) -> Any:
    """Program state without `lm` entries: which model serves is the loader's to say, and endpoints hold credentials."""
    if isinstance(state, dict):
        return {
            key: None if key == "lm" else item if key in _DATA_LISTS else _without_models(item)
            for key, item in state.items()
        }
    return [_without_models(item) for item in state] if isinstance(state, list) else state


def _refuse_secrets(state: Any, *, trail: str) -> None:
    """Raise when a credential stands among the settings; demonstrations are data, where a field may be a `token`."""
    if isinstance(state, dict):
        for key, item in state.items():
            if isinstance(item, str) and item and is_secret_key(key):
                raise ArtifactError(f"{trail} > {key} looks like a credential; it is not written. Next: remove it.")
            if key not in _DATA_LISTS:
                _refuse_secrets(item, trail=f"{trail} > {key}")
    elif isinstance(state, list):
        for index, item in enumerate(state):
            _refuse_secrets(item, trail=f"{trail} > {index}")
