"""What of an unpublished folder is finished, so that a run after a kill goes on from there."""

import hashlib
import json
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from lox_hf.records import TensorReport
from lox_hf.run_folder import RUN_NAME, differences, write_whole

JOURNAL = ".journal"


class PartJournal:
    """Small files beside the weights: whose run it is, and one for every finished part.

    A part is entered when its bytes are on the disk, so what is entered needs no second look. Several processes may
    enter parts at once; the lock is the unpublished folder's. A folder that is begun anew gets another token, and what
    a process of an earlier run enters late counts no more.

    Args:
        folder: The unpublished folder.
        run: What has to be equal for a later run to go on: settings, inputs, versions.

    Attributes:
        token: What the entries of this folder are named by; empty before `begin` or `join`.
    """

    def __init__(self, folder: Path, run: Mapping[str, object]) -> None:
        self.folder = folder / JOURNAL
        self.token = ""
        self._run = json.loads(json.dumps(run))

    def is_of_this_run(self) -> bool:
        """Whether what stands here was written under the same settings from the same inputs."""
        return self._read_run().get("run") == self._run

    def of_another_run(self) -> str:
        """How a run differs whose finished parts stand here; empty where there are none, or they are of this run."""
        found = self._read_run()
        has_parts = any(self.folder.glob(f"{found.get('token')}-*.json"))
        run = found.get("run")
        return differences(run, self._run) if has_parts and isinstance(run, dict) else ""

    def begin(self, *, anew: bool = False) -> None:
        """Start a journal, or go on with the one of this run; `anew` lets nothing of that one count."""
        if not anew and self.is_of_this_run():
            self.token = str(self._read_run()["token"])
            return
        self.token = secrets.token_hex(8)
        write_whole(self.folder / RUN_NAME, json.dumps({"token": self.token, "run": self._run}))

    def join(self, token: str) -> bool:
        """Take part in what another process has begun; False where this process does not see it."""
        self.token = token
        return self._read_run().get("token") == token

    def enter(self, reports: Mapping[str, Sequence[TensorReport]]) -> str:
        """Enter the tensors of a finished part.

        Args:
            reports: Reports of the matrices of each tensor; none for a tensor that was copied.

        Returns:
            Name of the entry.
        """
        entry = f"{self.token}-{hashlib.sha256(chr(10).join(reports).encode()).hexdigest()[:16]}.json"
        content = {name: [item.to_dict() for item in items] for name, items in reports.items()}
        write_whole(self.folder / entry, json.dumps(content))
        return entry

    def entries(self) -> list[str]:
        """Names of the finished parts."""
        return sorted(path.name for path in self.folder.glob(f"{self.token}-*.json"))

    def read(self, entry: str) -> dict[str, list[TensorReport]]:
        """Return the reports of a finished part by tensor."""
        content = json.loads((self.folder / entry).read_text(encoding="utf-8"))
        return {name: [TensorReport.from_dict(item) for item in items] for name, items in content.items()}

    def end(self) -> None:
        """Remove the journal: the folder is about to be published, or to be removed."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)

    def _read_run(self) -> dict[str, object]:
        path = self.folder / RUN_NAME
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
