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
from lox_hf.core.delta import Delta
from lox_hf.core.geometry import coordinates
from lox_hf.core.lowrank import Decomposition, LowRank
from lox_hf.edit import (
    FactorSource,
    matrices,
    matrix_names,
    naming,
    tensor_report,
)
from lox_hf.errors import CheckpointError, ConfigError, PairingError, listing
from lox_hf.hub_files import fetch_file, push_folder, resolve
from lox_hf.inputs import ModelLike, Pair, make_report, open_pair
from lox_hf.parallel import map_tensors
from lox_hf.records import REPORT_NAME, HardeningReport, TensorPlan, TensorReport
from lox_hf.weights.selection import get_pattern_value, matrix_shape, module_name
from lox_hf.weights.source import WeightSource
from lox_hf.weights.writer import FolderWriter, output_errors

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
            progressbar: Show a progress bar; None shows one on a terminal only.

        Returns:
            The subspace, factors in float32 on the device of the aligned model.

        Raises:
            ConfigError: If no base is named, or `r` is None.
            PairingError: If the two models do not fit; all mismatches are listed.
            CheckpointError: If files are missing or damaged.
            UnsupportedModelError: If weights are quantised, offloaded or sharded.
            NumericsError: If a matrix contains NaN or Inf; it is named.
        """
        pair = open_pair(
            aligned,
            base,
            config,
            revision=revision,
            token=token,
            trust_remote_code=trust_remote_code,
            allow_repeat=True,
        )
        return cls.from_pair(pair, progressbar=progressbar)

    @classmethod
    def from_pair(cls, pair: Pair, *, progressbar: bool | None = None) -> Self:
        """Find the directions of an opened pair; see `from_models`."""
        started = time.perf_counter()
        source = pair.aligned.source
        edited = [plan for plan in pair.plans if plan.edit]
        full = [plan.name for plan in edited if plan.r is None]
        if full:
            raise ConfigError(
                f"The full rank (r=None) has no low-rank directions: {listing(full, 5)} Give r a number."
            )

        def work(plan: TensorPlan) -> list[_Found]:
            found = _find(plan, source.get(plan.name), pair.factors)
            source.release(plan.name)
            pair.factors.release(plan.name)
            return found

        size = source.infos()
        results = map_tensors(
            work,
            edited,
            size_of=lambda plan: size[plan.name].size_bytes,
            progressbar=progressbar,
            description="Decomposing",
        )
        found = [item for items in results for item in items]
        report = make_report(pair, tuple(item.report for item in found), time.perf_counter() - started)
        factors = {item.report.name: item.factors for item in found}
        return cls(factors, pair.config, report, {item.report.name: item.base_coordinates for item in found})

    def factor_source(self) -> FactorSource:
        """Return the directions by matrix, for an edit."""
        return SubspaceFactors(self)

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


class SubspaceFactors:
    """Directions read from a saved subspace: nothing is decomposed.

    Args:
        subspace: The artefact.
    """

    def __init__(self, subspace: SafetySubspace) -> None:
        self.subspace, self.reference = subspace, subspace.report.base
        self._reports = {report.name: report for report in subspace.report.tensors}

    def check(self, aligned: WeightSource, plans: list[TensorPlan], config: LoxConfig) -> None:
        """Raise with all tensors that the subspace does not hold, or holds in another shape or a lower rank."""
        problems = [problem for plan in plans if plan.edit for problem in self._problems(plan)]
        if problems:
            raise PairingError(
                f"The subspace does not fit {aligned.label}: {len(problems)} matrices differ. {listing(problems)} "
                f"It was made with r = {self.subspace.config.r}: ask for no more, or make it again."
            )

    def prefetch(self, name: str) -> None:
        """Do nothing: the factors are in memory."""

    def release(self, name: str) -> None:
        """Do nothing: the factors stay."""

    def delta(self, plan: TensorPlan, number: int, aligned: Tensor) -> Delta:
        """Refuse: a subspace does not hold the whole of dW."""
        raise ConfigError(f"{plan.name}: the full rank (r=None) needs the base model, a subspace does not hold it.")

    def find(self, plan: TensorPlan, number: int, aligned: Tensor) -> Decomposition:
        """Return the top r of the stored directions."""
        name = matrix_names(plan.name, plan.shape)[number]
        stored, report = self.subspace.factors[name], self._reports[name]
        k = stored.rank_for(plan.r, report.delta_norm**2)
        cut = stored.truncate(k)
        next_s = stored.S[k].item() if k < stored.rank else _next_s(report)
        factors = LowRank(*(part.to(aligned.device) for part in (cut.U, cut.S, cut.Vh)))
        method = "subspace" if stored.rank else "zero"
        return Decomposition(factors, report.delta_norm**2, next_s, report.residual, 0, method)

    def _problems(self, plan: TensorPlan) -> list[str]:
        if plan.r is None:
            return [f"{plan.name}: the full rank (r=None) needs the base model"]
        problems = []
        for name, shape in zip(matrix_names(plan.name, plan.shape), _matrix_shapes(plan), strict=True):
            stored = self.subspace.factors.get(name)
            if stored is None:
                problems.append(f"{name}: not in the subspace")
            elif stored.shape != shape:
                problems.append(f"{name}: {shape} against {stored.shape}")
            elif not self._deep_enough(plan.name, stored, self._reports[name], plan.r):
                problems.append(f"{name}: r = {plan.r} against {stored.rank} stored directions")
        return problems

    def _deep_enough(self, name: str, stored: LowRank, report: TensorReport, r: int | float) -> bool:
        made = self.subspace.config
        asked = get_pattern_value(made.rank_pattern, module_name(name), made.r)
        complete = isinstance(asked, int) and stored.rank < asked  # dW has no more directions than these
        if isinstance(r, int):
            return r <= stored.rank or complete or stored.rank in (0, min(stored.shape))
        return complete or stored.rank == 0 or report.energy_share >= r * (1 - 1e-6)


@dataclass(frozen=True)
class _Found:
    """What is kept of one matrix."""

    factors: LowRank
    base_coordinates: Tensor
    report: TensorReport


def _find(plan: TensorPlan, aligned: Tensor, source: FactorSource) -> list[_Found]:
    results = []
    for number, (name, matrix) in enumerate(zip(matrix_names(plan.name, plan.shape), matrices(aligned), strict=True)):
        started = time.perf_counter()
        with naming(name):
            found = source.find(plan, number, matrix)
            # Of the base's own coordinates nothing more is read: U^T (W - W_base) V = S by what U, S and V are.
            at_base = coordinates(matrix, found.factors) - torch.diag(found.factors.S.double().cpu())
        report = tensor_report(name, plan, found, time.perf_counter() - started)
        results.append(_Found(found.factors, at_base, replace(report, alpha=0.0)))
    return results


def _matrix_shapes(plan: TensorPlan) -> list[tuple[int, int]]:
    _, rows, columns = matrix_shape(plan.shape)
    return [(rows, columns)] * len(matrix_names(plan.name, plan.shape))


def _next_s(report: TensorReport) -> float:
    """s_(k+1) back from the gap (s_k - s_(k+1)) / s_1."""
    if not report.singular_values or report.gap != report.gap:
        return 0.0
    return max(0.0, report.singular_values[-1] - report.gap * report.singular_values[0])
