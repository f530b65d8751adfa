"""A folder that several processes fill in parts, and that a run after a kill goes on with; published as any other."""

import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from lox_hf.errors import OutputError
from lox_hf.records import TensorReport
from lox_hf.weights.journal import PartJournal
from lox_hf.weights.output_file import OutputFile, output_errors
from lox_hf.weights.writer import FolderWriter


class PartsWriter(FolderWriter):
    """A `FolderWriter` with a journal of what is finished.

    Args:
        output_dir: Folder to publish; it must not exist, or be empty.
        run: What has to be equal for a later run to go on where a killed one stopped.
        is_first: Whether this process makes, locks and publishes the folder; the others fill files that it made.
        is_shared: Several processes write: after an error the parts that are finished stay, as after a kill.

    Attributes:
        journal: The parts that are finished.
    """

    def __init__(
        self, output_dir: str | Path, run: Mapping[str, object], *, is_first: bool = True, is_shared: bool = False
    ) -> None:
        super().__init__(output_dir)
        self.journal = PartJournal(self.partial, run)
        self._is_first, self._is_shared = is_first, is_shared

    def check(self, needed_bytes: int, inputs: list[Path]) -> None:
        """Check that the output can be written, and that no other run has work in it.

        Args:
            needed_bytes: Bytes that will be written.
            inputs: Folders that are read.

        Raises:
            OutputError: As in a `FolderWriter`, or if parts of another run are finished there.
        """
        super().check(needed_bytes, inputs)
        others = self.journal.of_another_run()
        if others:
            raise OutputError(
                f"{self.partial} holds finished parts of a run that was killed, with other settings or files "
                f"({others}). Start that one again, or remove the folder, or choose another output."
            )

    def __enter__(self) -> Self:
        return super().__enter__() if self._is_first else self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_first:
            super().__exit__(kind, value, trace)
        else:
            self._close_all()

    def open(self, name: str) -> OutputFile:
        """Open a file that was created, by this process or another.

        Args:
            name: Relative path.

        Returns:
            The open file.

        Raises:
            OutputError: If it is not there.
        """
        with output_errors(self.output):
            return self._keep(OutputFile(self.partial / name, None, self.output))

    def close(self, file: OutputFile) -> None:
        """Close a file that this process does not write to any more.

        Args:
            file: An open file of the folder.

        Raises:
            OutputError: If the disk does not take what was written.
        """
        self._files.remove(file)
        with output_errors(self.output):
            file.close()

    def finish(self, reports: Mapping[str, Sequence[TensorReport]]) -> str:
        """Flush this process's files to disk, and enter the tensors of a part as finished.

        Args:
            reports: Reports of the matrices of each tensor of the part.

        Returns:
            Name of the journal's entry.

        Raises:
            OutputError: If the disk is full.
        """
        with output_errors(self.output):
            for file in self._files:
                file.flush()
            return self.journal.enter(reports)

    def _take_up(self) -> None:
        """Go on with what a killed run left, where it is of this run; otherwise start with an empty folder."""
        if not self.journal.is_of_this_run():
            super()._take_up()
        self.journal.begin()

    def _give_up(self) -> None:
        """Remove the folder, or say why it stays: the others' finished parts are not this process's to drop."""
        if self._is_shared and self.journal.entries():
            warnings.warn(
                f"What is finished stays in {self.partial}: the same command goes on from there. Remove that folder "
                "if you do not want to.",
                stacklevel=3,
            )
            return
        with suppress(OSError):
            self.journal.end()  # first: what a cut leaves of the rest is not gone on with
        shutil.rmtree(self.partial, ignore_errors=True)

    def _make_final(self) -> None:
        self.journal.end()
