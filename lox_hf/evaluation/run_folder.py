"""The folder of one run: what was answered and judged so far, a line each, so that a kill loses nothing."""

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lox_hf.errors import OutputError

RUN_NAME = "run.json"


class RunFolder:
    """A folder that one process at a time fills, and that goes on where a killed one stopped.

    `run.json` says what the run measures; a rerun with other settings is refused, since its lines would not belong to
    those that are there.

    Args:
        folder: The folder; made where it does not exist. None keeps everything in memory.
        settings: What the lines depend on, as JSON values.

    Attributes:
        kept: What an earlier process found for itself and later ones keep to, such as the size of batches.

    Raises:
        OutputError: If the folder holds something else, another run, cannot be written, or is in use.
    """

    def __init__(self, folder: str | Path | None, settings: dict[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder).expanduser().absolute()
        self.settings = settings
        self.kept: dict[str, Any] = {}
        self._lock: int | None = None
        self._journals: list[Journal] = []

    def __enter__(self) -> Self:
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._take_lock(self.folder)
                self._claim(self.folder / RUN_NAME)
            except OSError as error:
                self._release()
                raise error if isinstance(error, OutputError) else self._unwritable(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for journal in self._journals:
            journal.close()
        self._release()

    def journal(self, name: str) -> "Journal":
        """Open one list of lines of this run."""
        self._journals.append(Journal(None if self.folder is None else self.folder / name))
        return self._journals[-1]

    def keep(self, **found: Any) -> None:
        """Keep values for later processes; what is kept already is not written again.

        Raises:
            OutputError: If the disk does not take it.
        """
        if found != {name: self.kept.get(name) for name in found}:
            self.kept |= found
            self._write_settings()

    def write(self, name: str, text: str) -> None:
        """Write a whole file: it appears complete or not at all.

        Raises:
            OutputError: If the disk does not take it.
        """
        if self.folder is None:
            return
        target = self.folder / name
        partial = target.with_name(f".{name}.partial")
        try:
            with partial.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            partial.rename(target)
        except OSError as error:
            raise self._unwritable(error) from error

    def _take_lock(self, folder: Path) -> None:
        self._lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(f"Another run is writing {folder}: wait for it, or choose another folder.") from error

    def _claim(self, path: Path) -> None:
        """Check that the folder is this run's, or make it so."""
        if not path.exists():
            others = [item.name for item in path.parent.iterdir() if not item.name.startswith(".")]
            if others:
                raise OutputError(
                    f"The output {path.parent} holds something else ({', '.join(sorted(others)[:3])}): choose another."
                )
            self._write_settings()
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            settings, self.kept = dict(found["settings"]), dict(found["kept"])
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path} is not a run's settings: choose another folder, or remove it.") from error
        wanted = json.loads(json.dumps(self.settings))  # as JSON gives it back
        names = [name for name in {**settings, **wanted} if settings.get(name) != wanted.get(name)]
        if names:
            differing = "; ".join(f"{n}: {settings.get(n)!r} there, {wanted.get(n)!r} now" for n in names)
            raise OutputError(
                f"The output {path.parent} holds a run with other settings ({differing}): choose another folder."
            )

    def _write_settings(self) -> None:
        self.write(RUN_NAME, json.dumps({"settings": self.settings, "kept": self.kept}, indent=2) + "\n")

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(f"The output {self.folder} cannot be written: {error.strerror or error}.")


class Journal:
    """Items by position, a JSON line each, written as they come; a line that a kill cut short is dropped.

    Args:
        path: The file; None keeps the items in memory.

    Attributes:
        items: What is there, by position.

    Raises:
        OutputError: If the file is damaged or cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.items: dict[int, dict[str, Any]] = {}
        self._stream = None
        if path is not None:
            try:
                self._stream = path.open("a+b")
            except OSError as error:
                raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from error
            self._load(path)

    def add(self, position: int, item: dict[str, Any]) -> None:
        """Keep an item; the first one of a position stays.

        Raises:
            OutputError: If the disk does not take it.
        """
        if position in self.items:
            return
        self.items[position] = item
        if self._stream is not None:
            # ASCII: a tokenizer can produce lone surrogates, which have no UTF-8.
            line = json.dumps({"position": position, **item}) + "\n"
            try:
                self._stream.write(line.encode("ascii"))
                self._stream.flush()  # a kill of the process loses nothing that the system has
            except OSError as error:
                raise OutputError(f"{self.path} cannot be written: {error.strerror or error}.") from error

    def close(self) -> None:
        """Flush to disk and close."""
        if self._stream is not None:
            os.fsync(self._stream.fileno())
            self._stream.close()

    def _load(self, path: Path) -> None:
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data) and self._stream is not None:
            self._stream.truncate(whole)
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                item = json.loads(line)
                self.items.setdefault(int(item.pop("position")), item)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise OutputError(
                    f"{path} is damaged in line {number}: remove that line, and the run makes it anew."
                ) from error
