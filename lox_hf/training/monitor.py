"""How far fine-tuning has moved a model along and away from its safety directions: once, or again and again."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lox_hf.core.delta import Delta
from lox_hf.core.geometry import Projection, coordinates, project
from lox_hf.core.precision import exact_products
from lox_hf.edit.tensor import matrices, matrix_names, naming
from lox_hf.hub_files import BASE_FILES, CHECKPOINT_FILES
from lox_hf.inputs import ModelLike, open_side
from lox_hf.parallel.threads import map_tensors
from lox_hf.records import DriftReading, TensorDrift
from lox_hf.subspace import SafetySubspace
from lox_hf.training.backends import LiveWeights, is_plain, open_weights
from lox_hf.training.scope import check_fit, held_tensors, selected_tensors, warn_of_absent
from lox_hf.weights.source import WeightSource


def read_drift(
    model: ModelLike,
    subspace: SafetySubspace,
    base_model: ModelLike | None = None,
    *,
    target_modules: list[str] | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    progressbar: bool | None = None,
) -> DriftReading:
    """Measure how much of the alignment's change W_aligned - W_base is still in a model: retention, R_ft and R_align.

    Nothing is changed. The base is read tensor by tensor and never instantiated; the aligned model is not needed, as
    R_align = ||P_k dW_align||_F / ||dW_align||_F = ||S_k||_F / ||dW_align||_F and the subspace knows both norms.

    R_ft and R_align are means over matrices, each counted alike, as in the reference. A matrix that alignment did not
    change has no directions, and one that equals the base again has no change to take a share of: 0 / 0, which makes
    the reference's mean nan. Here their own records say NaN, and both means leave them out; retention leaves out the
    first kind only, as the second has lost everything and counts as 0. Where no matrix remains, a mean is NaN.

    Args:
        model: The model that is read: loaded, in any floating dtype and on any device, with LoRA adapters or not, or
            spread over processes (all of them call this then); or a folder or Hub id.
        subspace: Directions of the aligned model.
        base_model: The model before alignment that the subspace was made with: folder, Hub id, module or state dict.
            None reads retention only, for which the subspace knows enough.
        target_modules: Which matrices, in the forms of `LoxConfig`: "all-linear" is every linear layer but the output
            head, a list or a regular expression names modules. None takes what the reference takes, every nn.Linear
            with the output head (so also an embedding that is the head), and linear layers that are no nn.Linear:
            GPT-2's Conv1D and stacks of experts. A matrix that the subspace does not hold is left out with a warning.
        revision: Revision of `model` on the Hub; the base's own is that of the subspace's config.
        token: Hub token; None uses the stored login.
        trust_remote_code: Run modelling code of the model's repository, which tells linear layers apart in files.
        progressbar: Show a progress bar; None shows one on a terminal only.

    Returns:
        The reading, with one record per matrix.

    Raises:
        ConfigError: If `target_modules` fits no module, or is missing for a state dict.
        PairingError: If the model does not fit the subspace or the base; all mismatches are listed.
        CheckpointError: If files are missing or damaged.
        UnsupportedModelError: If weights are quantised or offloaded, or adapters are not plain LoRA.
        NumericsError: If a matrix contains NaN or Inf; it is named.

    Example:
        >>> import torch
        >>> from lox_hf import LoxConfig, SafetySubspace, apply_lox
        >>> base, aligned = (torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(2))
        >>> subspace = SafetySubspace.from_models(aligned, base, LoxConfig(r=2))
        >>> round(read_drift(aligned, subspace, base).retention, 4)
        1.0
        >>> hardened = apply_lox(aligned, LoxConfig(r=2, alpha=0.5), base_model=subspace)
        >>> round(read_drift(hardened, subspace, base).retention, 4)
        1.5

    Source: Perin et al., COLM 2025, section 3; the reference's safety/R_metrics.py.
    """
    model = getattr(model, "_orig_mod", model)  # compiled or not
    if isinstance(model, nn.Module) and not is_plain(model):
        return DriftMonitor(model, subspace, base_model, target_modules=target_modules, token=token).read()
    ours = open_side(model, "model", revision=revision, token=token, files=CHECKPOINT_FILES)
    base = _open_base(base_model, subspace, token, like=model)
    folder = ours.files.folder if ours.files else None
    modules = model if isinstance(model, nn.Module) else folder
    selected = selected_tensors(ours.source, modules, target_modules, trust_remote_code)
    check_fit(ours.source, base, subspace, selected)
    held = held_tensors(ours.source, subspace, selected)
    warn_of_absent(ours.source, subspace, selected)
    reader = _Reader(ours.source, base, subspace)
    infos = ours.source.infos()
    results = map_tensors(
        reader.read,
        held,
        size_of=lambda name: infos[name].size_bytes,
        progressbar=progressbar,
        description="Reading drift",
        prepare=reader.prefetch,
    )
    return _summarise([item for items in results for item in items])


class DriftMonitor:
    """Reads the drift of a model in training whenever it is asked; what can be found out once is found out here.

    The figures are those of `read_drift`, for the matrices that the subspace holds. Beyond the directions no memory is
    needed: without a base a reading computes U_k^T W V_k of each matrix where it lies, with one it goes through the
    base tensor by tensor.

    Attributes:
        weights: The model's matrices.
        subspace: The directions.

    Args:
        model: The model that callbacks receive; where it is spread over processes, all of them call the same.
        subspace: Directions of the aligned model.
        base_model: The model before alignment, for R_ft and R_align too: folder, Hub id, module or state dict.
        target_modules: As of `read_drift`.
        token: Hub token; None uses the stored login.

    Raises:
        ConfigError: If `target_modules` fits no module.
        PairingError: If the model does not fit the subspace or the base; all mismatches are listed.
        CheckpointError: If the base's files are missing or damaged.
        UnsupportedModelError: If the weights are held in a way that is not known.

    Example:
        >>> import torch
        >>> from lox_hf import LoxConfig
        >>> base, aligned = (torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(2))
        >>> monitor = DriftMonitor(aligned, SafetySubspace.from_models(aligned, base, LoxConfig(r=2)))
        >>> round(monitor.read().retention, 4)
        1.0
    """

    def __init__(
        self,
        model: nn.Module,
        subspace: SafetySubspace,
        base_model: ModelLike | None = None,
        *,
        target_modules: list[str] | str | None = None,
        token: str | bool | None = None,
    ) -> None:
        self.subspace = subspace
        model = getattr(model, "_orig_mod", model)  # compiled or not
        self.weights: LiveWeights = open_weights(model)
        base = _open_base(base_model, subspace, token, like=model)
        selected = selected_tensors(self.weights, model, target_modules, trust_remote_code=False)
        check_fit(self.weights, base, subspace, selected)
        self._reader = _Reader(self.weights, base, subspace) if base is not None else None
        self._tensors = held_tensors(self.weights, subspace, selected)
        infos = self.weights.infos()
        self._matrices = [
            matrix
            for name in self._tensors
            for matrix in matrix_names(name, infos[name].shape)
            if matrix in subspace.factors
        ]

    def read(self) -> DriftReading:
        """Read the drift of the model as it is now.

        Returns:
            The reading, with one record per matrix.

        Raises:
            NumericsError: If a matrix contains NaN or Inf; it is named.
        """
        self.weights.refresh()
        if self._reader is None:
            return self._read_without_base()
        with exact_products():
            return _summarise([item for name in self._tensors for item in self._reader.read(name)])

    def retention(self) -> float:
        """Read retention alone, for which no base is read.

        Returns:
            Retention of all matrices together.

        Raises:
            NumericsError: If a matrix contains NaN or Inf; it is named.
        """
        self.weights.refresh()
        return self._read_without_base().retention

    def _read_without_base(self) -> DriftReading:
        with exact_products():
            return _summarise([self._read_matrix(name) for name in self._matrices])

    def _read_matrix(self, name: str) -> "_Matrix":
        with naming(name):
            now = self.weights.matrices[name].coordinates(self.subspace.factors[name])
        return _retained(name, now, self.subspace)


def _open_base(
    base_model: ModelLike | None, subspace: SafetySubspace, token: str | bool | None, like: ModelLike
) -> WeightSource | None:
    if base_model is None:
        return None
    revision = subspace.config.revision
    return open_side(base_model, "base", revision=revision, token=token, files=BASE_FILES, like=like).source


@dataclass(frozen=True)
class _Matrix:
    """What was measured on one matrix."""

    name: str
    projection: Projection
    r_align: float

    def record(self) -> TensorDrift:
        return TensorDrift(self.name, self.projection.retention, self.projection.share, self.r_align)


class _Reader:
    """Reads one tensor of the model against the base's and the directions of its matrices."""

    def __init__(self, model: WeightSource, base: WeightSource | None, subspace: SafetySubspace) -> None:
        self.model, self.base, self.subspace = model, base, subspace
        self.reports = {report.name: report for report in subspace.report.tensors}

    def prefetch(self, name: str) -> None:
        for source in filter(None, (self.model, self.base)):
            source.prefetch(name)

    def read(self, name: str) -> list[_Matrix]:
        tensor = self.model.get(name)
        names = matrix_names(name, tuple(tensor.shape))
        theirs = matrices(self.base.get(name)) if self.base is not None else [None] * len(names)
        triples = zip(names, matrices(tensor), theirs, strict=True)
        found = [self._read_matrix(*triple) for triple in triples if triple[0] in self.subspace.factors]
        for source in filter(None, (self.model, self.base)):
            source.release(name)
        return found

    def _read_matrix(self, name: str, ours: Tensor, theirs: Tensor | None) -> _Matrix:
        report = self.reports[name]
        if theirs is None:
            with naming(name):
                return _retained(name, coordinates(ours, self.subspace.factors[name]), self.subspace)
        if self.subspace.config.cast_base:  # to the aligned model's dtype, which this model may have left
            theirs = theirs.to(getattr(torch, report.dtype))
        with naming(name):
            found = project(Delta(ours, theirs), self.subspace.factors[name])
        # What `project` would give for the aligned model itself: P_k dW_align = U_k S_k V_k^T.
        aligned = Projection(found.reference, found.reference, math.sqrt(found.reference), report.delta_norm)
        return _Matrix(name, found, aligned.share)


def _retained(name: str, now: Tensor, subspace: SafetySubspace) -> _Matrix:
    """What U_k^T W V_k alone tells of a matrix: its component, no norms."""
    s = subspace.factors[name].S.double().cpu()
    component = ((now - subspace.base_coordinates[name]).diagonal() @ s).item()
    return _Matrix(name, Projection(component, s.square().sum().item(), math.nan, math.nan), math.nan)


def _summarise(found: Sequence[_Matrix]) -> DriftReading:
    component = math.fsum(item.projection.component for item in found)
    reference = math.fsum(item.projection.reference for item in found)
    records = tuple(item.record() for item in found)
    moved = [record for record in records if not math.isnan(record.r_ft)]
    r_ft, r_align = (_mean([getattr(record, name) for record in moved]) for name in ("r_ft", "r_align"))
    retention = component / reference if reference > 0 else math.nan
    return DriftReading(retention, r_ft, r_align, r_ft / r_align, records)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
