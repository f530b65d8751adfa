"""What of an unpublished folder is finished, so that a run after a kill goes on from there."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from lox_hf.records import TensorReport
from lox_hf.run_folder import RUN_NAME, write_whole

JOURNAL = ".journal"


class Journal:
    """Small files beside the weights: whose run it is, and one for every finished part.

    A part is entered when its bytes are on the disk, so what is entered needs no second look. Several processes may
    enter parts at once; the lock is the unpublished folder's.

    Args:
        folder: The unpublished folder.
        run: What has to be equal for a later run to go on: settings, inputs, versions.
    """

    def __init__(self, folder: Path, run: Mapping[str, object]) -> None:
        self.folder = folder / JOURNAL
        self._run = json.dumps(run, sort_keys=True)

    def is_of_this_run(self) -> bool:
        """Whether what stands here was written under the same settings from the same inputs."""
        path = self.folder / RUN_NAME
        return path.is_file() and path.read_text(encoding="utf-8") == self._run

    def begin(self) -> None:
        """Start a journal, or go on with the one of this run."""
        write_whole(self.folder / RUN_NAME, self._run)

    def enter(self, reports: Mapping[str, Sequence[TensorReport]]) -> str:
        """Enter the tensors of a finished part.

        Args:
            reports: Reports of the matrices of each tensor; none for a tensor that was copied.

        Returns:
            Name of the entry.
        """
        entry = hashlib.sha256("\n".join(reports).encode()).hexdigest()[:16] + ".json"
        content = {name: [item.to_dict() for item in items] for name, items in reports.items()}
        write_whole(self.folder / entry, json.dumps(content))
        return entry

    def entries(self) -> list[str]:
        """Names of the finished parts."""
        return sorted(path.name for path in self.folder.glob("[!.]*.json") if path.name != RUN_NAME)

    def read(self, entry: str) -> dict[str, list[TensorReport]]:
        """Return the reports of a finished part by tensor."""
        content = json.loads((self.folder / entry).read_text(encoding="utf-8"))
        return {name: [TensorReport.from_dict(item) for item in items] for name, items in content.items()}

    def end(self) -> None:
        """Remove the journal: the folder is about to be published."""
        shutil.rmtree(self.folder)
