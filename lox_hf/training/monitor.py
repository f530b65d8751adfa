"""`read_drift`: how far fine-tuning has moved a model along and away from its safety directions."""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lox_hf.config import ALL_LINEAR, LoxConfig
from lox_hf.core.delta import Delta
from lox_hf.core.geometry import Projection, project
from lox_hf.edit import is_stack, matrices, matrix_names, naming
from lox_hf.errors import ConfigError, PairingError, UnsupportedModelError, listing
from lox_hf.hub_files import BASE_FILES, CHECKPOINT_FILES
from lox_hf.inputs import ModelLike, Side, open_side
from lox_hf.lora import is_peft_model
from lox_hf.parallel import map_tensors
from lox_hf.records import DriftReading, TensorDrift
from lox_hf.subspace import SafetySubspace
from lox_hf.weights.live import checkpoint_names, linear_modules, meta_model
from lox_hf.weights.selection import EDITABLE, TIED_HEAD, matrix_shape, module_name, select
from lox_hf.weights.source import TensorInfo, WeightSource


def read_drift(
    model: ModelLike,
    subspace: SafetySubspace,
    base_model: ModelLike,
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
        model: The model that is read: loaded, in any floating dtype and on any device, or a folder or Hub id.
        subspace: Directions of the aligned model.
        base_model: The model before alignment that the subspace was made with: folder, Hub id, module or state dict.
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
        UnsupportedModelError: If this is a PeftModel, or weights are quantised, offloaded or sharded.
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
    if is_peft_model(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps its change in adapters, so its weights are not those it computes with: "
            "read what model.merge_and_unload() returns."
        )
    ours = open_side(model, "model", revision=revision, token=token, files=CHECKPOINT_FILES)
    base_revision = subspace.config.revision
    theirs = open_side(base_model, "base", revision=base_revision, token=token, files=BASE_FILES, like=model)
    selected = _select(model, ours, target_modules, trust_remote_code)
    _check_fit(ours.source, theirs.source, subspace, selected)
    held = _held(ours.source, subspace, selected)
    reader = _Reader(ours.source, theirs.source, subspace)
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


def _check_fit(model: WeightSource, base: WeightSource, subspace: SafetySubspace, selected: Sequence[str]) -> None:
    """Raise `PairingError` with all mismatches of the selected tensors."""
    # Another dtype is none: a bfloat16 model is often trained in float32. Nor is a matrix that the subspace does not
    # hold: it may have been made of fewer.
    infos, theirs = model.infos(), base.infos()
    problems = [p for name in selected for p in _problems(name, infos[name], theirs.get(name), subspace)]
    there = {matrix for name, info in infos.items() if len(info.shape) > 1 for matrix in _names(name, info)}
    # A head that is tied in memory may still have its own tensor in the files the subspace was made from.
    problems += [
        f"{matrix}: only in the subspace"
        for matrix in subspace.factors
        if matrix not in there and module_name(matrix) != TIED_HEAD
    ]
    if problems:
        report = subspace.report
        against = report.base.name_or_path if report.base else "a base in memory"
        raise PairingError(
            f"Cannot read the drift of {model.label} from {base.label}: {len(problems)} matrices differ. "
            f"{listing(problems)} The subspace is of '{report.aligned.name_or_path}' - '{against}': read a model that "
            "was trained from this one, with this base; target_modules leaves matrices out."
        )


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

    def __init__(self, model: WeightSource, base: WeightSource, subspace: SafetySubspace) -> None:
        self.model, self.base, self.subspace = model, base, subspace
        self.reports = {report.name: report for report in subspace.report.tensors}

    def prefetch(self, name: str) -> None:
        self.model.prefetch(name)
        self.base.prefetch(name)

    def read(self, name: str) -> list[_Matrix]:
        tensor, base = self.model.get(name), self.base.get(name)
        names = matrix_names(name, tuple(tensor.shape))
        triples = zip(names, matrices(tensor), matrices(base), strict=True)
        found = [self._read_matrix(*triple) for triple in triples if triple[0] in self.subspace.factors]
        self.model.release(name)
        self.base.release(name)
        return found

    def _read_matrix(self, name: str, ours: Tensor, theirs: Tensor) -> _Matrix:
        report = self.reports[name]
        if self.subspace.config.cast_base:  # to the aligned model's dtype, which this model may have left
            theirs = theirs.to(getattr(torch, report.dtype))
        with naming(name):
            found = project(Delta(ours, theirs), self.subspace.factors[name])
        # What `project` would give for the aligned model itself: P_k dW_align = U_k S_k V_k^T.
        aligned = Projection(found.reference, found.reference, math.sqrt(found.reference), report.delta_norm)
        return _Matrix(name, found, aligned.share)


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


def _select(
    model: ModelLike, side: Side, target_modules: list[str] | str | None, trust_remote_code: bool
) -> list[str]:
    """Names of the tensors that are asked for."""
    linear: set[str] = set()
    if target_modules in (None, ALL_LINEAR):
        modules = _modules(model, side, trust_remote_code)
        linear = linear_modules(modules) if target_modules else _linear_maps(modules)
    config = LoxConfig(r=1, target_modules=target_modules or ALL_LINEAR)
    return [plan.name for plan in select(side.source.infos(), config, linear) if plan.edit]


def _modules(model: ModelLike, side: Side, trust_remote_code: bool) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    if side.files is None:
        raise ConfigError("A state dict does not know its linear layers: name the matrices with target_modules.")
    return meta_model(side.files.folder, trust_remote_code=trust_remote_code)


def _linear_maps(model: nn.Module) -> set[str]:
    """Names, as in the checkpoint, of all linear layers: the head, Conv1D and stacks of experts included."""
    from transformers.pytorch_utils import Conv1D

    weights = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))}
    # Told by the parameter and not by the module's name: a tied head is stored under the embedding's.
    linear = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in weights or is_stack(tuple(parameter.shape))
    }
    names = checkpoint_names(model)
    return {module_name(stored) for live in linear & set(names) for stored in names[live]}


def _held(model: WeightSource, subspace: SafetySubspace, selected: Sequence[str]) -> list[str]:
    """The selected tensors that the subspace has directions of; says which it has not."""
    infos = model.infos()
    absent = [matrix for name in selected for matrix in _names(name, infos[name]) if matrix not in subspace.factors]
    held = [name for name in selected if any(matrix in subspace.factors for matrix in _names(name, infos[name]))]
    if not held:
        raise PairingError(
            f"The subspace holds none of the matrices that are asked for: {listing(absent, 5)} It holds "
            f"{listing(subspace.factors, 5)} Name some of them with target_modules, or make it again of more."
        )
    if absent:
        warnings.warn(
            f"The subspace does not hold {len(absent)} of the matrices that are asked for, so the drift is read "
            f"without them: {listing(absent, 5)}",
            stacklevel=3,
        )
    return held


def _problems(name: str, ours: TensorInfo, theirs: TensorInfo | None, subspace: SafetySubspace) -> Iterator[str]:
    if theirs is None:
        yield f"{name}: missing in base"
    elif ours.shape != theirs.shape:
        yield f"{name}: {ours.shape} against {theirs.shape} in base"
    elif theirs.dtype not in EDITABLE:
        yield f"{name}: stored as {theirs.stored} in base, not as float32, float16 or bfloat16"
    shape = matrix_shape(ours.shape)[1:]
    for matrix in _names(name, ours):
        directions = subspace.factors.get(matrix)
        if directions is not None and directions.shape != shape:
            yield f"{matrix}: {shape} against {directions.shape} in the subspace"


def _names(name: str, info: TensorInfo) -> list[str]:
    return matrix_names(name, info.shape)
