"""What the owner of the Space decides, by environment variables."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

MAX_GB = "LOX_SPACE_MAX_GB"
ALLOW_FOLDERS = "LOX_SPACE_ALLOW_FOLDERS"


@dataclass(frozen=True)
class Settings:
    """Limits of the Space.

    Attributes:
        max_bytes: Size up to which a model is accepted, each of the two.
        allow_folders: Whether folders of this machine are read; for a Space on one's own machine only.
        job_seconds: After this time a job is ended.
        keep_seconds: How long a hardened model waits to be pushed.
    """

    max_bytes: int = 6 * 10**9
    allow_folders: bool = False
    job_seconds: float = 3600
    keep_seconds: float = 1800

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Read the environment variables.

        Raises:
            SystemExit: If one does not hold what it should.
        """
        size = environment.get(MAX_GB, "6")
        try:
            max_bytes = float(size) * 1e9
        except ValueError:
            max_bytes = math.nan
        if not 0 < max_bytes < math.inf:
            raise SystemExit(f"{MAX_GB} is the size of a model in GB, such as 6; got '{size}'.")
        return cls(int(max_bytes), environment.get(ALLOW_FOLDERS, "").lower() in ("1", "true", "yes"))
