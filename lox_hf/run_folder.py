"""The folder of one run: what was answered and judged so far, a line each, so that a kill loses nothing."""

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lox_hf.errors import OutputError

RUN_NAME = "run.json"
HASH = re.compile(r"[0-9a-f]{16,}")
MOST_SHOWN = 600
"""Characters of what differs that a message shows."""


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
        self._texts: dict[str, str] = {}
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

    def check(self) -> None:
        """Refuse a folder that holds something else, before any work; what is missing is not made.

        Raises:
            OutputError: If it does, or is no folder.
        """
        if self.folder is None or not self.folder.exists() or (self.folder / RUN_NAME).exists():
            return
        if not self.folder.is_dir():
            raise OutputError(f"The output {self.folder} is a file: choose another folder.")
        others = sorted(item.name for item in self.folder.iterdir() if not item.name.startswith("."))
        if others:
            raise OutputError(
                f"The output {self.folder} holds something else ({', '.join(others[:3])}): choose another folder."
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = [failure for journal in self._journals if (failure := journal.close())]
        self._release()
        if failed and error is None:  # an error on its way out is not masked
            raise failed[0]

    def journal(self, name: str, *, fresh: bool = False) -> "Journal":
        """Open one list of lines of this run.

        Args:
            name: Name of the file.
            fresh: Drop what is there.

        Returns:
            The journal; it is closed with the folder.

        Raises:
            OutputError: If the file is damaged or cannot be written.
        """
        self._journals.append(Journal(None if self.folder is None else self.folder / name, fresh=fresh))
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
        """Write a whole file, whose name may lead into folders: it appears complete or not at all.

        Raises:
            OutputError: If the disk does not take it.
        """
        if self.folder is None:
            self._texts[name] = text
            return
        try:
            write_whole(self.folder / name, text)
        except OSError as error:
            raise self._unwritable(error) from error

    def read(self, name: str) -> str:
        """Read a whole file of this or an earlier process; empty where there is none."""
        if self.folder is None:
            return self._texts.get(name, "")
        path = self.folder / name
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def _take_lock(self, folder: Path) -> None:
        self._lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"Another run is writing {folder}: wait for it, or choose another folder.") from error

    def _claim(self, path: Path) -> None:
        """Check that the folder is this run's, or make it so."""
        if not path.exists():
            self.check()
            self._write_settings()
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            settings, self.kept = dict(found["settings"]), dict(found["kept"])
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path} is not a run's settings: choose another folder, or remove it.") from error
        wanted = json.loads(json.dumps(self.settings))  # as JSON gives it back
        differing = differences(settings, wanted)
        if differing and self._is_empty(path.parent):
            self._write_settings()  # a run that got nowhere holds nothing that could be mixed up
        elif differing:
            raise OutputError(
                f"The output {path.parent} holds a run with other settings ({differing}): choose another folder."
            )

    @staticmethod
    def _is_empty(folder: Path) -> bool:
        """Whether there is nothing but settings and empty lists."""
        others = (item for item in folder.iterdir() if item.name != RUN_NAME and not item.name.startswith("."))
        return not any(item.is_dir() or item.stat().st_size for item in others)

    def _write_settings(self) -> None:
        self.write(RUN_NAME, json.dumps({"settings": self.settings, "kept": self.kept}, indent=2) + "\n")

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(f"The output {self.folder} cannot be written: {error.strerror or error}.")


def write_whole(path: Path, text: str) -> None:
    """Write a file, on the disk and by one rename, so that nobody ever reads half of it; its folder is made.

    Args:
        path: The file.
        text: Its content.

    Raises:
        OSError: If the disk does not take it.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def differences(
    there: Mapping[str, Any], now: Mapping[str, Any], sides: tuple[str, str] = ("there", "now")
) -> str:
    """Say how the settings of a run, or of one of its results, differ from those of now; empty where they do not.

    Args:
        there: Settings in the folder, as JSON gives them back.
        now: The same of this run. Under "weights" stand hashes by model.
        sides: What the two are called.

    Returns:
        What differs and how; of hashes, which say nothing to a reader, only what they are of.

    Example:
        >>> differences({"n": 5, "weights": {"base": "0" * 16}}, {"n": 6, "weights": {"base": "1" * 16}})
        'n: 5 there, 6 now; the weights of base have changed since, or are of another model'
    """
    words = "; ".join(_differing(there, now, sides))
    return words if len(words) <= MOST_SHOWN else f"{words[:MOST_SHOWN]} ..."


def _differing(
    there: Mapping[str, Any], now: Mapping[str, Any], sides: tuple[str, str], place: str = ""
) -> Iterator[str]:
    """What differs, entry by entry; of settings within settings only those that do."""
    for name in {**there, **now}:
        old, new, whole = there.get(name), now.get(name), f"{place}{name}"
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differing(old, new, sides, f"{whole}.")
        elif not all(isinstance(value, str) and HASH.fullmatch(value) for value in (old, new)):
            yield f"{whole}: {old!r} {sides[0]}, {new!r} {sides[1]}"
        elif whole in ("weights", "weights_sample"):
            yield "the weights: another model's"
        elif place == "weights.":
            yield f"the weights of {name} have changed since, or are of another model"
        else:
            yield f"{whole}: its content has changed since"


class Journal:
    """Items by position, a JSON line each, written as they come; a line that a kill cut short is dropped.

    Args:
        path: The file; None keeps the items in memory.
        fresh: Drop what is there.

    Attributes:
        items: What is there, by position.

    Raises:
        OutputError: If the file is damaged or cannot be written.
    """

    def __init__(self, path: Path | None, *, fresh: bool = False) -> None:
        self.path = path
        self.items: dict[int, dict[str, Any]] = {}
        self._file: int | None = None
        if path is not None:
            try:
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | (os.O_TRUNC if fresh else 0), 0o644)
            except OSError as error:
                raise self._unwritable(error) from error
            self._load(path, self._file)

    def add(self, position: int, item: dict[str, Any]) -> None:
        """Keep an item; the first one of a position stays.

        Raises:
            OutputError: If the disk does not take it.
        """
        if position in self.items:
            return
        self.items[position] = item
        if self._file is not None:
            # ASCII: a tokenizer can produce lone surrogates, which have no UTF-8.
            line = (json.dumps({"position": position, **item}) + "\n").encode("ascii")
            try:
                while line:  # at once to the system, so that a kill of the process loses nothing
                    line = line[os.write(self._file, line) :]
            except OSError as error:
                raise self._unwritable(error) from error

    def close(self) -> OutputError | None:
        """Flush to disk and close; an error is returned, since another one may be on its way."""
        if self._file is None:
            return None
        file, self._file = self._file, None
        try:
            os.fsync(file)
        except OSError as error:
            return self._unwritable(error)
        finally:
            os.close(file)
        return None

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(f"{self.path} cannot be written: {error.strerror or error}. What is there is kept.")

    def _load(self, path: Path, file: int) -> None:
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(file, whole)
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                item = json.loads(line)
                self.items.setdefault(int(item.pop("position")), item)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise OutputError(
                    f"{path} is damaged in line {number}: remove that line, and the run makes it anew."
                ) from error
