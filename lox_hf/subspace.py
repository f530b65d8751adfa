"""`SafetySubspace`: the directions of every matrix as one artefact, so that another alpha costs no decomposition."""

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lox_hf.config import CONFIG_NAME, LoxConfig
from lox_hf.core.geometry import coordinates
from lox_hf.core.lowrank import LowRank
from lox_hf.edit.batches import place_of
from lox_hf.edit.model import each_tensor
from lox_hf.edit.tensor import Directions, FactorSource, matrices, matrix_names, naming, tensor_report
from lox_hf.errors import CheckpointError, ConfigError, listing
from lox_hf.hub_files import fetch_file, push_folder, resolve
from lox_hf.inputs import ModelLike, Pair, make_report, open_pair
from lox_hf.parallel.device import resolve_device
from lox_hf.records import REPORT_NAME, HardeningReport, TensorPlan, TensorReport
from lox_hf.subspace_factors import SubspaceFactors
from lox_hf.weights.output_file import output_errors
from lox_hf.weights.spread.matrix import SpreadMatrix
from lox_hf.weights.spread.model import SpreadSource, in_turn
from lox_hf.weights.writer import FolderWriter

SUBSPACE_NAME = "lox_subspace.safetensors"
BASE_PART = "base"
"""What a matrix's base coordinates are called in the file, beside its U, S and Vh."""


@dataclass(frozen=True)
class SafetySubspace:
    """U, S, Vh of dW = W_aligned - W_base for every matrix: the directions along which alignment moved the weights.

    Attributes:
        factors: By matrix name (a tensor's checkpoint name, `name[i]` in a stack of experts): U (m, k), S (k,) and
            Vh (k, n), all float32.
        config: The settings they were made with.
        report: Energy share, residual and gap of each, and which two models they come from.
        base_coordinates: By matrix name U_k^T W_base V_k, (k, k) float64: with it retention needs no base.

    Example:
        >>> from lox_hf import LoxConfig, SafetySubspace
        >>> subspace = SafetySubspace.from_models("org/aligned", "org/base", LoxConfig(r=6))  # doctest: +SKIP
        >>> subspace.save_pretrained("subspace")  # doctest: +SKIP
        >>> model = apply_lox(model, LoxConfig(r=6, alpha=0.5), base_model=subspace)  # doctest: +SKIP

    Source: Perin et al., COLM 2025, section 3.
    """

    factors: Mapping[str, LowRank]
    config: LoxConfig
    report: HardeningReport
    base_coordinates: Mapping[str, Tensor]

    def __repr__(self) -> str:
        base = self.report.base.name_or_path if self.report.base else "a base in memory"
        return (
            f"SafetySubspace({len(self.factors)} matrices, r={self.config.r}, "
            f"'{self.report.aligned.name_or_path}' - '{base}')"
        )

    @classmethod
    def from_models(
        cls,
        aligned: ModelLike,
        base: ModelLike | None = None,
        config: LoxConfig | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        trust_remote_code: bool = False,
        device: str | torch.device | None = None,
        progressbar: bool | None = None,
    ) -> Self:
        """Find the directions between two models: `Proj_k(W_aligned - W_base)` (section 3), tensor by tensor.

        Args:
            aligned: Folder, Hub id, loaded model or state dict.
            base: The model before alignment, in the same forms; None takes it from `config`, or from the aligned
                model's own files.
            config: Settings; `alpha` is not used. `r` must not be None.
            revision: Revision of the aligned model on the Hub.
            token: Hub token; None uses the stored login.
            trust_remote_code: Run modelling code of the aligned model's repository where "all-linear" needs it.
            device: Where they are found: "auto" takes this machine's accelerator; None works on each weight where it
                is, as is always done where a model is spread over processes.
            progressbar: Show a progress bar; None shows one on a terminal only.

        Returns:
            The subspace, factors in float32 on the device of the aligned model.

        Raises:
            ConfigError: If no base is named, or `r` is None, or this machine has no such device.
            PairingError: If the two models do not fit; all mismatches are listed.
            CheckpointError: If files are missing or damaged.
            UnsupportedModelError: If weights are quantised or offloaded, on a device without float64 where `device`
                names no other, or the base is spread over processes.
            NumericsError: If a matrix contains NaN or Inf; it is named.
        """
        place = None if device is None else resolve_device(device)  # before anything is fetched
        pair = open_pair(
            aligned,
            base,
            config,
            revision=revision,
            token=token,
            trust_remote_code=trust_remote_code,
            allow_repeat=True,
        )
        return cls.from_pair(pair, device=place, progressbar=progressbar)

    @classmethod
    def from_pair(
        cls, pair: Pair, *, device: torch.device | None = None, progressbar: bool | None = None
    ) -> Self:
        """Find the directions of an opened pair; see `from_models`."""
        started = time.perf_counter()
        source = pair.aligned.source
        edited = [plan for plan in pair.plans if plan.edit]
        full = [plan.name for plan in edited if plan.r is None]
        if full:
            raise ConfigError(
                f"The full rank (r=None) has no low-rank directions: {listing(full, 5)} Give r a number."
            )

        results: dict[str, list[_Found]] = {}

        def work(plan: TensorPlan, tensor: Tensor | SpreadMatrix, directions: Directions) -> None:
            home = tensor.device if isinstance(tensor, SpreadMatrix) else place_of(source, plan.name)
            results[plan.name] = _find(plan, tensor, directions, home)

        if isinstance(source, SpreadSource):
            in_turn(
                lambda plan, matrix: work(plan, matrix, pair.factors),
                edited,
                source,
                progressbar=progressbar,
                description="Decomposing",
            )
        else:
            each_tensor(
                work,
                edited,
                source,
                pair.factors,
                device=device,
                progressbar=progressbar,
                description="Decomposing",
            )
        found = [item for plan in edited for item in results[plan.name]]
        report = make_report(pair, tuple(item.report for item in found), time.perf_counter() - started)
        factors = {item.report.name: item.factors for item in found}
        return cls(factors, pair.config, report, {item.report.name: item.base_coordinates for item in found})

    def factor_source(self) -> FactorSource:
        """Return the directions by matrix, for an edit."""
        return SubspaceFactors(self.factors, self.config, self.report)

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, revision: str | None = None, token: str | bool | None = None
    ) -> Self:
        """Read a subspace from a folder or a Hub repository.

        Args:
            pretrained_name_or_path: Folder or Hub id.
            revision: Revision on the Hub.
            token: Hub token; None uses the stored login.

        Returns:
            The subspace, in memory.

        Raises:
            CheckpointError: If a file is missing or damaged.
            ConfigError: If the stored config is invalid.
        """
        files = [CONFIG_NAME, SUBSPACE_NAME, REPORT_NAME]  # at once, so that all are of one commit
        folder = resolve(pretrained_name_or_path, revision=revision, token=token, files=files).folder
        if not (folder / SUBSPACE_NAME).is_file() and Path(pretrained_name_or_path).is_dir():
            raise CheckpointError(
                f"'{pretrained_name_or_path}' holds no subspace, no {SUBSPACE_NAME}: `lox-hf subspace` makes one."
            )
        config = LoxConfig.from_pretrained(folder)
        path, report_path = (fetch_file(folder, name) for name in (SUBSPACE_NAME, REPORT_NAME))
        try:
            report = HardeningReport.from_json(report_path.read_text(encoding="utf-8"))
            with safe_open(path, framework="pt") as file:
                names = json.loads((file.metadata() or {})["matrices"])
                factors = {
                    name: LowRank(*(file.get_tensor(f"{name}.{part}") for part in ("U", "S", "Vh"))) for name in names
                }
                base_coordinates = {name: file.get_tensor(f"{name}.{BASE_PART}") for name in names}
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"'{pretrained_name_or_path}' does not hold a readable LoX subspace: {error}."
            ) from error
        return cls(factors, config, report, base_coordinates)

    def save_pretrained(self, save_directory: str | Path) -> Path:
        """Write `lox_subspace.safetensors`, `lox_config.json` and `lox_report.json` into a new folder, by one rename.

        Args:
            save_directory: Folder to create; it must not exist, or be empty.

        Returns:
            The folder.

        Raises:
            OutputError: If the folder exists or cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        for name, item in self.factors.items():
            for part in ("U", "S", "Vh"):
                tensors[f"{name}.{part}"] = getattr(item, part).cpu().contiguous()
            tensors[f"{name}.{BASE_PART}"] = self.base_coordinates[name].contiguous()
        writer = FolderWriter(save_directory)
        writer.check(sum(tensor.nbytes for tensor in tensors.values()), [])
        with writer:
            # One key: of several safetensors writes the order at random, and files of equal content would differ.
            metadata = {"matrices": json.dumps(list(self.factors))}
            with output_errors(writer.output):
                save_file(tensors, writer.partial / SUBSPACE_NAME, metadata=metadata)
            writer.write(CONFIG_NAME, self.config.to_json().encode())
            writer.write(REPORT_NAME, self.report.to_json().encode())
            return writer.publish()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Upload the three files to a Hub model repository, which is made if needed, in one commit, as PEFT does.

        `lox_hf.push_to_hub` takes a saved subspace too: it adds a card, and makes the repository private.

        Args:
            repo_id: Hub id.
            private: Whether a new repository is private; None leaves that to the Hub's settings of its owner.
            token: Hub token; None uses the stored login.
            commit_message: Message of the commit.

        Returns:
            URL of the commit.

        Raises:
            CheckpointError: If the Hub refuses or cannot be reached.
        """
        with tempfile.TemporaryDirectory() as folder:
            folder = self.save_pretrained(Path(folder) / "subspace")
            message = commit_message or "Add LoX subspace"
            return push_folder(folder, repo_id, private=private, token=token, message=message)


@dataclass(frozen=True)
class _Found:
    """What is kept of one matrix."""

    factors: LowRank
    base_coordinates: Tensor
    report: TensorReport


def _find(
    plan: TensorPlan, aligned: Tensor | SpreadMatrix, source: Directions, home: torch.device
) -> list[_Found]:
    """Find the directions of a tensor's matrices where it is now, and keep them where it is at home."""
    results = []
    held = [aligned] if isinstance(aligned, SpreadMatrix) else matrices(aligned)
    for number, (name, matrix) in enumerate(zip(matrix_names(plan.name, plan.shape), held, strict=True)):
        started = time.perf_counter()
        with naming(name):
            found = source.find(plan, number, matrix)
            # Of the base's own coordinates nothing more is read: U^T (W - W_base) V = S by what U, S and V are.
            at_aligned = (
                coordinates(matrix, found.factors)
                if isinstance(matrix, Tensor)
                else matrix.coordinates(found.factors)
            )
            at_base = at_aligned - torch.diag(found.singular_values.double())
        report = tensor_report(name, plan, found, time.perf_counter() - started)
        results.append(_Found(found.factors.to(home), at_base, replace(report, alpha=0.0)))
    return results
