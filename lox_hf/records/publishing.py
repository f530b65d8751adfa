"""What was published on the Hub, and whether it is what it says."""

import math
from dataclasses import dataclass, field
from typing import Any, Self

from lox_hf.records.base import JsonRecord, ModelReference


@dataclass(frozen=True)
class PushedFile(JsonRecord):
    """One file of a commit.

    Attributes:
        path: Path in the repository.
        size_bytes: Its size.
    """

    path: str
    size_bytes: int


@dataclass(frozen=True)
class PushReport(JsonRecord):
    """What was published, or would be.

    Attributes:
        repo_id: The repository on the Hub.
        kind: "checkpoint", "adapter", "hardened adapter" or "subspace".
        private: Whether the repository is private.
        commit_url: URL of the commit; empty where nothing was sent.
        files: Every file of the commit.
        left_out: Files of the folder that are not published.
        removed: Files of an earlier push that the commit takes away.
        warnings: What whoever publishes should know.
        card: The model card.

    Example:
        >>> from lox_hf import push_to_hub
        >>> push_to_hub("hardened", "org/hardened", dry_run=True).total_bytes  # doctest: +SKIP
        1610612736
    """

    repo_id: str
    kind: str
    private: bool
    commit_url: str
    files: tuple[PushedFile, ...]
    left_out: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    card: str = ""

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the report with its files."""
        lists = {name: tuple(data.get(name, ())) for name in ("left_out", "removed", "warnings")}
        return super().from_dict({**data, **lists, "files": tuple(map(PushedFile.from_dict, data["files"]))})


@dataclass(frozen=True)
class TensorCheck(JsonRecord):
    """One published tensor against what it should be.

    Attributes:
        name: Checkpoint name.
        verdict: "exact" (every bit), "rounding" (edited, and within what another machine's rounding explains) or
            "different".
        edited: Whether LoX edits it; the others must be those of the aligned model.
        entries: Numbers in it.
        differing: Numbers of which the bits differ.
        largest_ulps: Largest difference, in spacings of the stored dtype at the larger of the aligned and the
            recomputed number; 0.0 for tensors that are not edited.
        relative_error: ||published - recomputed||_F / ||change||_F; NaN where nothing was recomputed.
        detail: What is wrong where it is no number: missing, extra, another shape or dtype.

    Example:
        >>> from lox_hf.records import TensorCheck
        >>> TensorCheck("lm_head.weight", "exact", True, 6400).differing
        0
    """

    name: str
    verdict: str
    edited: bool
    entries: int = 0
    differing: int = 0
    largest_ulps: float = 0.0
    relative_error: float = math.nan
    detail: str = ""


@dataclass(frozen=True)
class VerificationReport(JsonRecord):
    """Whether a published model is what it says: its weights recomputed from the two models that it names.

    Attributes:
        model: The published model.
        aligned: The aligned model that was read.
        base: The model before alignment that was read; None where it is not known.
        config: The settings, as the model's stamp says.
        verified: Whether nothing is wrong.
        tensors: One check a tensor.
        problems: What is wrong besides the weights.
        seconds: Wall time, in seconds.
        versions: Versions of lox_hf, torch and Python.

    Example:
        >>> from lox_hf import verify
        >>> report = verify("org/hardened")  # doctest: +SKIP
        >>> report.verified, [check.name for check in report.wrong]  # doctest: +SKIP
        (True, [])
    """

    model: ModelReference
    aligned: ModelReference
    base: ModelReference | None
    config: dict[str, Any]
    verified: bool
    tensors: tuple[TensorCheck, ...]
    problems: tuple[str, ...] = ()
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def wrong(self) -> tuple[TensorCheck, ...]:
        """The tensors that are not what they should be."""
        return tuple(check for check in self.tensors if check.verdict == "different")

    @property
    def rounded(self) -> tuple[TensorCheck, ...]:
        """The tensors that differ by rounding only."""
        return tuple(check for check in self.tensors if check.verdict == "rounding")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build the report with its nested records."""
        models = {
            name: ModelReference.from_dict(data[name]) if data.get(name) else None
            for name in ("model", "aligned", "base")
        }
        checks = tuple(map(TensorCheck.from_dict, data["tensors"]))
        return super().from_dict({**data, **models, "tensors": checks, "problems": tuple(data.get("problems", ()))})
