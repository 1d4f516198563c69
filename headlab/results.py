"""Saving and loading every result, together with the record of how it was made; and logs of steps that can be resumed.

Nothing here pickles. A file is written beside its destination and renamed into place, so a full disk or a kill leaves
the file that was there before.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from safetensors import SafetensorError, safe_open

from .errors import HeadlabError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
KINDS = "headlab.results"  # the entry points by which a kind's class is found before anyone has imported it
_kinds: dict[str, type[Result]] = {}
_UNWRITTEN = (OSError, SafetensorError)  # what a full disk raises; safetensors has its own error for it


class Result:
    """Base of everything that headlab saves. A subclass names its `kind` and turns itself into plain data and back.

    So that `Result.load` finds it, a kind is also an entry point of the group `headlab.results` in `pyproject.toml`.
    """

    kind: ClassVar[str] = ""
    record: dict[str, Any]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if kind := cls.__dict__.get("kind"):
            _kinds[kind] = cls

    def save(self, path: str | Path) -> Path:
        """Write the result to a JSON file, in one step. Returns the path."""
        data = {"headlab": FORMAT, "kind": self.kind} | self.to_plain()
        text = json.dumps(data, indent=1, allow_nan=False)
        return write(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a result of this kind (or, from `Result` itself, of any kind).

        Raises:
            HeadlabError: there is no such file, it is damaged, or it holds something else.
        """
        path = Path(path)
        found = _class_of(kind_of(path))
        if found is None:
            raise HeadlabError(f"{path} is not a result that this version of headlab can read")
        if not issubclass(found, cls):
            raise HeadlabError(f"{path} holds a {found.kind}, but a {cls.kind} was expected")
        try:
            return found._read(path)
        except HeadlabError as error:  # what the file says cannot be: a score that is not finite, a head twice
            raise HeadlabError(f"{path} is damaged: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, SafetensorError):
            raise HeadlabError(f"{path} is damaged: it does not hold what a {found.kind} holds") from None

    def to_plain(self) -> dict[str, Any]:
        """The result and its record as JSON can hold them."""
        return {"record": self.record} | self._body()

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Self:
        """The other way round."""
        body = dict(data)
        return cls._from_body(body, body.pop("record"))

    @classmethod
    def _read(cls, path: Path) -> Self:
        return cls.from_plain({key: value for key, value in read_json(path).items() if key not in ("headlab", "kind")})

    def _body(self) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def _from_body(cls, body: dict[str, Any], record: dict[str, Any]) -> Self:
        raise NotImplementedError


class TensorResult(Result):
    """Base of results that are mostly tensors: safetensors files, in whose header everything else is text."""

    def save(self, path: str | Path) -> Path:
        """Write the result to a safetensors file, in one step. Returns the path."""
        from safetensors.torch import save_file  # which imports torch

        texts, tensors = self._parts()
        meta = {"headlab": str(FORMAT), "kind": self.kind, "record": json.dumps(self.record)} | texts
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        return write(path, lambda temporary: save_file(whole, temporary, metadata=meta))

    @classmethod
    def _read(cls, path: Path) -> Self:
        with safe_open(str(path), framework="pt") as file:
            texts = dict(file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return cls._from_parts(texts, tensors, json.loads(texts["record"]))

    def _parts(self) -> tuple[dict[str, str], dict[str, Tensor]]:
        """Texts and tensors, by name."""
        raise NotImplementedError

    @classmethod
    def _from_parts(cls, texts: dict[str, str], tensors: dict[str, Tensor], record: dict[str, Any]) -> Self:
        raise NotImplementedError


def kind_of(path: Path) -> str:
    """Which kind of result a file holds, by what is in it; empty if this version of headlab cannot read it.

    Raises:
        HeadlabError: there is no such file, or it is no result at all.
    """
    if not _holds_tensors(path):
        about = read_json(path)
        return str(about.get("kind")) if about.get("headlab") == FORMAT else ""
    try:
        with safe_open(str(path), framework="np") as file:
            texts = file.metadata() or {}
    except SafetensorError as error:
        raise HeadlabError(f"{path} is damaged: {error}") from None
    return str(texts.get("kind")) if texts.get("headlab") == str(FORMAT) else ""


def _holds_tensors(path: Path) -> bool:
    """Whether a file begins as safetensors files do: with the length of a header, and a brace."""
    try:
        with open(path, "rb") as file:
            begin = file.read(9)
            return begin[8:] == b"{" and int.from_bytes(begin[:8], "little") <= os.fstat(file.fileno()).st_size
    except OSError:
        return False  # whoever reads it says why


def _class_of(kind: str) -> type[Result] | None:
    if kind not in _kinds:
        for home in entry_points(group=KINDS, name=kind):
            home.load()
    return _kinds.get(kind)


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HeadlabError(f"there is no file {path}") from None
    except OSError as error:
        raise HeadlabError(f"could not read {path}: {_reason(error)}") from error
    except (UnicodeDecodeError, json.JSONDecodeError):
        why = "it is neither JSON nor a safetensors file"
        raise HeadlabError(f"{path} is not a headlab result, or cut off ({why}): remove it to make it again") from None
    if not isinstance(data, dict):
        raise HeadlabError(f"{path} is not a headlab result")
    return data


def write(path: str | Path, writer: Callable[[Path], object]) -> Path:
    """Let `writer` fill a temporary file, then rename it to `path`: the old file stays whole until the new one is.

    Raises:
        HeadlabError: the file cannot be written (a full disk, a missing permission); the old file is untouched.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        os.close(handle)
        writer(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes it private; a result is an ordinary file
        os.replace(temporary, path)
    except _UNWRITTEN as error:
        raise HeadlabError(f"could not write {path}: {_reason(error)}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return path


def _reason(error: Exception) -> object:
    return getattr(error, "strerror", None) or error


@contextmanager
def building(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` when the block ends well, and is removed otherwise.

    Raises:
        HeadlabError: `folder` exists and is not empty, or cannot be written.
    """
    import shutil

    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise HeadlabError(f"{folder} already holds something: choose another folder, or remove it first")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise HeadlabError(f"could not write {folder}: {_reason(error)}") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        if folder.is_dir():
            folder.rmdir()
        os.replace(temporary, folder)
    except _UNWRITTEN as error:
        raise HeadlabError(f"could not write {folder}: {_reason(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class StepLog:
    """A file with one JSON line per finished step, the first saying what is computed; a killed run goes on after the last.

    The steps hold nothing that differs from run to run (no times, no host), so that a resumed file equals, bit for bit,
    that of a run that was never stopped.
    """

    def __init__(self, path: str | Path | None, header: dict[str, Any]) -> None:
        """Open the log of a computation, or start it. Without a path the steps live in memory only.

        Raises:
            HeadlabError: the file was begun for another computation.
        """
        self.path = None if path is None else Path(path)
        self.done: list[dict[str, Any]] = []
        header = json.loads(json.dumps(header))  # as it will read back: tuples become lists
        if self.path is None:
            return
        if self.path.exists():
            self.done = self._read(header)
        else:
            self._append(header)

    def _read(self, header: dict[str, Any]) -> list[dict[str, Any]]:
        assert self.path is not None
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise HeadlabError(f"could not read {self.path}: {_reason(error)}") from error
        whole = data[: data.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError:
            lines = [None]
        begun = bool(lines) or json.dumps(header).encode().startswith(data)
        if not begun or not all(isinstance(line, dict) for line in lines):
            raise HeadlabError(f"{self.path} is not a log of headlab: move it away")
        if lines and lines[0] != header:
            differ = sorted(k for k in header.keys() | lines[0].keys() if header.get(k) != lines[0].get(k))
            raise HeadlabError(
                f"{self.path} was begun for another computation (it differs in: {', '.join(differ)}): "
                "choose another file or folder, or remove it"
            )
        if len(whole) < len(data):  # the kill came in the middle of a line
            with open(self.path, "rb+") as file:
                file.truncate(len(whole))
        if not lines:
            self._append(header)
        return lines[1:]

    def append(self, step: dict[str, Any]) -> None:
        """Add a finished step and have it on disk before going on."""
        self.done.append(step)
        if self.path is not None:
            self._append(step)

    def _append(self, data: dict[str, Any]) -> None:
        assert self.path is not None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(data, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            message = f"could not write {self.path}: {_reason(error)}; run again to go on from the last step"
            raise HeadlabError(message) from error
