"""Folders that several machines share: finished LoRA trainings and artifacts, in any place that fsspec knows.

What is kept is content-addressed or named by all it depends on, so two machines that keep the same write the same. The
file `manifest.json` of a folder is written last and names the others: a folder that has one is whole. Whoever takes a
folder checks its manifest's checksums as if it lay here from the beginning.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path, PurePosixPath

from copa_harness.atomic_files import temporary_name
from copa_harness.errors import ConfigurationError

_MANIFEST = "manifest.json"


class SharedFiles:
    """A place for folders.

    Args:
        url: `s3://bucket/prefix`, `memory://x`, the path of a shared folder, ...
        alone: While it is held, nobody else on any machine makes what has that name; by default nobody is kept out.

    Raises:
        ConfigurationError: fsspec does not know it, or lacks a package for it.
    """

    def __init__(self, url: str, *, alone: Callable[[str], AbstractContextManager[None]] | None = None) -> None:
        self.url = url
        self.alone: Callable[[str], AbstractContextManager[None]] = alone or (lambda name: nullcontext())
        self._told = False
        try:
            import fsspec

            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigurationError(f"--copa-shared-files={url}: {error}") from error

    def put(self, name: str, folder: Path, *, anew: bool = False) -> None:
        """Keep a whole folder under a name; a failure is a warning: others make it again.

        Args:
            name: Where.
            folder: What.
            anew: Whether it replaces one with another manifest; else the first one stays.
        """
        target = f"{self._root}/{name}"
        try:
            if self._files.exists(f"{target}/{_MANIFEST}") and not (
                anew and self._files.cat_file(f"{target}/{_MANIFEST}") != (folder / _MANIFEST).read_bytes()
            ):
                return
            paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
            for path in sorted(paths, key=lambda path: path == folder / _MANIFEST):
                place = f"{target}/{path.relative_to(folder).as_posix()}"
                self._files.makedirs(place.rpartition("/")[0], exist_ok=True)
                self._files.put_file(str(path), place)
        except Exception as error:  # noqa: BLE001 - every kind of place has errors of its own
            self._warn(f"{name} could not be kept in {self.url} ({error}); other machines make it again")

    def get(self, name: str, folder: Path) -> bool:
        """Put the folder of this name here, in place of whatever lies there; whether there is one."""
        source, partial = f"{self._root}/{name}", temporary_name(folder)
        try:
            if not self._files.exists(f"{source}/{_MANIFEST}"):
                return False
            manifest = self._files.cat_file(f"{source}/{_MANIFEST}")
            for relative in map(PurePosixPath, json.loads(manifest)["files"]):
                if relative.is_absolute() or ".." in relative.parts or "\\" in str(relative):
                    raise ValueError(f"{relative} leads out of its folder")
                target = partial / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                self._files.get_file(f"{source}/{relative}", str(target))
            (partial / _MANIFEST).write_bytes(manifest)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        except Exception as error:  # noqa: BLE001 - as above
            self._warn(f"{name} could not be read from {self.url} ({error}); it is made again")
            return False
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return True

    def _warn(self, message: str) -> None:
        if not self._told:
            self._told = True
            warnings.warn(message, RuntimeWarning, stacklevel=3)


_current: SharedFiles | None = None


def current_files() -> SharedFiles | None:
    """Where this process shares folders, None outside `sharing_files`."""
    return _current


@contextmanager
def sharing_files(files: SharedFiles) -> Iterator[None]:
    """While the block runs, what this process trains and makes is shared there, and looked for."""
    global _current
    before, _current = _current, files
    try:
        yield
    finally:
        _current = before
