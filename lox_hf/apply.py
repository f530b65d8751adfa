"""`apply_lox` and `revert_lox`: harden a loaded model in place, and take it back."""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from lox_hf.config import LoxConfig
from lox_hf.core.delta import Delta
from lox_hf.core.extrapolate import FullPart, LowRankPart
from lox_hf.core.lowrank import Decomposition
from lox_hf.core.precision import working_on
from lox_hf.edit.model import each_tensor
from lox_hf.edit.spread import edit_spread, pieces
from lox_hf.edit.tensor import Directions, edit_tensor, matrices
from lox_hf.edit.undo import Undo
from lox_hf.errors import ConfigError, LoxError, NumericsError, PairingError
from lox_hf.inputs import HasFactors, ModelLike, Pair, make_report, open_pair
from lox_hf.lora import adapter_report, harden_lora, is_peft_model, revert_lora
from lox_hf.provenance import STAMP, stamp
from lox_hf.records import HardeningReport, TensorPlan, TensorReport
from lox_hf.weights.live import live_tensors
from lox_hf.weights.spread.matrix import SpreadMatrix
from lox_hf.weights.spread.model import SpreadSource, commit, in_turn, is_spread_model, together, warn_of_steps

Model = TypeVar("Model", bound=nn.Module)
RECORD = "_lox_record"
SAID_TO_ALL = (NumericsError, PairingError)
"""Errors that every process of a spread model meets together, so that another word can be had with all of them."""


@dataclass
class _Record:
    """What a hardened model remembers: the way back, what stood there before, and the report."""

    undos: list[Undo]
    stamp: Any
    report: HardeningReport
    previous: "_Record | None"


def apply_lox(
    model: Model,
    config: LoxConfig | None = None,
    *,
    base_model: ModelLike | HasFactors | None = None,
    allow_repeat: bool = False,
    token: str | bool | None = None,
    progressbar: bool | None = None,
) -> Model:
    """Harden a loaded model in place: W <- W + alpha * Proj_k(W - W_base) for every selected weight (section 3).

    The base is read tensor by tensor and never instantiated. Sums are formed in float32 and rounded once to each
    weight's own dtype. The settings are stamped into `model.config.lox_config`, so that `save_pretrained` and
    `push_to_hub` keep them. If anything fails, the model is left as it was.

    A model that FSDP2, tensor parallelism or DeepSpeed ZeRO-3 has spread over processes is hardened where it lies:
    every process calls this with the same arguments, works on its share, and never holds the whole.

    Args:
        model: The aligned model, a PreTrainedModel in float32, float16 or bfloat16; changed in place. A PeftModel with
            LoRA adapters needs no base: the active adapter is the alignment; it is hardened and keeps its rank. Saving
            an adapter keeps no settings: write them beside it with `config.save_pretrained`.
        config: Settings; None takes a subspace's own, or the defaults (r=6, alpha=1.25).
        base_model: The model before alignment: Hub id, folder, module or state dict (of a spread model not one that is
            spread itself); or a `SafetySubspace`, which costs no decomposition. None takes
            `config.base_model_name_or_path`, or the base the model's card names.
        allow_repeat: Harden a model that is hardened already once more.
        token: Hub token; None uses the stored login.
        progressbar: Show a progress bar; None shows one on a terminal only.

    Returns:
        The same model.

    Raises:
        ConfigError: If no base is named, or the settings select nothing.
        PairingError: If the two models do not fit, or are equal; all mismatches are listed.
        CheckpointError: If the base's files are missing or damaged.
        UnsupportedModelError: If weights are quantised, on the meta device or offloaded; or spread over processes and
            fused, or under FSDP 1.
        NumericsError: If a matrix contains NaN or Inf, or the result overflows; it is named.
        AlreadyHardenedError: If the model is hardened and `allow_repeat` is not set.
        DistributedError: If the model is spread over processes, and one was given other arguments or was lost. With
            NCCL torch's watchdog ends a process whose peer is lost, and the launcher says so.
        LoxError: If after an error the weights could not be put back bit for bit.

    Example:
        >>> import torch
        >>> from lox_hf import LoxConfig, apply_lox
        >>> base, aligned = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
        >>> expected = aligned.weight + 0.5 * (aligned.weight - base.weight)
        >>> hardened = apply_lox(aligned, LoxConfig(r=None, alpha=0.5), base_model=base)
        >>> torch.allclose(hardened.weight, expected)
        True

    Source: Perin et al., COLM 2025, section 3; the reference's safety/LoX.py.
    """
    if is_peft_model(model):
        if base_model is not None:
            raise ConfigError("A LoRA adapter is the alignment itself and needs no base: leave base_model out.")
        harden_lora(model, config or LoxConfig(), allow_repeat=allow_repeat)
        warn_of_steps(model)
        return model
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"apply_lox takes a loaded model, got {type(model).__name__}; for files there is harden_checkpoint."
        )
    started = time.perf_counter()
    pair = open_pair(model, base_model, config, token=token, allow_repeat=allow_repeat)
    undos: list[Undo] = []
    try:
        reports = _edit(pair, undos, progressbar)
        _remember(model, pair, undos, make_report(pair, reports, time.perf_counter() - started))
    except BaseException as error:
        is_back = _take_back(undos)
        if isinstance(error, SAID_TO_ALL):
            commit(model, {plan.name for plan in pair.plans if plan.edit})
        if not is_back and isinstance(error, Exception):
            raise LoxError(f"{error} The weights could not be put back bit for bit: load the model again.") from error
        raise
    warn_of_steps(model)
    return model


def revert_lox(model: Model) -> Model:
    """Take the last `apply_lox` back: the weights before it, bit for bit.

    Args:
        model: A model that `apply_lox` hardened in this process; changed in place.

    Returns:
        The same model, without the stamp.

    Raises:
        LoxError: If the model was not hardened in this process, or its weights were changed since.

    Example:
        >>> model = revert_lox(apply_lox(model, config))  # doctest: +SKIP
    """
    if is_peft_model(model):
        revert_lora(model)
        return model
    with together(model):
        record = _record_of(model)
        _check_as_written(model, record.undos)
    is_back = _take_back(record.undos)
    commit(model, {item.name for item in record.report.tensors})
    _set_stamp(model, record.stamp)
    setattr(model, RECORD, record.previous)
    with together(model):
        if not is_back:
            raise LoxError(
                "The aligned weights could not be restored bit for bit on this device: load the aligned model again."
            )
    return model


def hardening_report(model: nn.Module) -> HardeningReport:
    """Return what `apply_lox` did to a model in this process.

    Args:
        model: A model that `apply_lox` hardened.

    Returns:
        The report.

    Raises:
        LoxError: If the model was not hardened in this process.

    Example:
        >>> hardening_report(apply_lox(model, config)).energy_share  # doctest: +SKIP
    """
    if is_peft_model(model):
        return adapter_report(model)
    record = getattr(model, RECORD, None)
    if record is None:
        raise LoxError(f"{type(model).__name__} was not hardened by apply_lox in this process.")
    return record.report


class _Recorder:
    """Directions on their way to the edit of one tensor, and rows on their way into the model."""

    def __init__(self, factors: Directions, undos: list[Undo]) -> None:
        self.factors, self.undos = factors, undos
        self.current: Undo | None = None

    def delta(self, plan: TensorPlan, number: int, aligned: Any) -> Delta:
        delta = self.factors.delta(plan, number, aligned)
        self._begin(Undo(aligned, FullPart(delta, plan.alpha), plan.name, number))
        return delta

    def find(self, plan: TensorPlan, number: int, aligned: Any) -> Decomposition:
        self.current = None
        found = self.factors.find(plan, number, aligned)
        if found.factors.rank:
            self._begin(Undo(aligned, LowRankPart(found.factors, plan.alpha), plan.name, number))
        return found

    def write(self, number: int, part: slice, rows: Tensor) -> None:
        if self.current is not None:  # without directions the rows are the model's own
            self.current.write(part, rows)

    def _begin(self, undo: Undo) -> None:
        self.current = undo
        self.undos.append(undo)


def _edit(pair: Pair, undos: list[Undo], progressbar: bool | None) -> tuple[TensorReport, ...]:
    source, edited = pair.aligned.source, [plan for plan in pair.plans if plan.edit]
    if isinstance(source, SpreadSource):

        def work_together(plan: TensorPlan, matrix: SpreadMatrix) -> TensorReport:
            return edit_spread(plan, matrix, pair.factors, undos)

        return tuple(in_turn(work_together, edited, source, progressbar=progressbar, description="Hardening"))
    reports: dict[str, list[TensorReport]] = {}

    def work(plan: TensorPlan, tensor: Tensor, directions: Directions) -> None:
        recorder = _Recorder(directions, undos)
        reports[plan.name] = edit_tensor(plan, tensor, recorder, recorder.write)

    each_tensor(work, edited, source, pair.factors, progressbar=progressbar, description="Hardening")
    return tuple(report for plan in edited for report in reports[plan.name])


def _record_of(model: nn.Module) -> _Record:
    record = getattr(model, RECORD, None)
    if record is None:
        raise LoxError(
            f"{type(model).__name__} was not hardened by apply_lox in this process, so there is nothing to take back: "
            "load the aligned model again."
        )
    return record


def _take_back(undos: list[Undo]) -> bool:
    """Put the weights back by the very products that were added; False where the bits are not the old ones."""
    with ExitStack() as stack:
        for device in {undo.matrix.device for undo in undos}:
            stack.enter_context(working_on(device))
        return all([undo.revert() for undo in undos])


def _check_as_written(model: nn.Module, undos: list[Undo]) -> None:
    """Point every way back at the weight where it is now, which has to be what was written."""
    now = _written(model, {undo.name for undo in undos})
    followed = [(undo.name, undo.number) in now and undo.follow(now[undo.name, undo.number]) for undo in undos]
    if not all(followed) or not all(undo.unchanged() for undo in undos):
        raise LoxError("The weights were changed, cast or moved after apply_lox: load the aligned model again.")


def _written(model: nn.Module, names: set[str]) -> dict[tuple[str, int], Tensor]:
    """Views of what edits of these tensors write in this process, by tensor and number, as an `Undo` has them."""
    if is_spread_model(model):
        source = SpreadSource(model, type(model).__name__)
        return {
            key: view
            for name in source.tensors
            if name in names
            for key, view in pieces(name, source.get(name)).items()
        }
    return {
        (name, number): matrix
        for name, tensor in live_tensors(model).items()
        if name in names
        for number, matrix in enumerate(matrices(tensor))
    }


def _remember(model: nn.Module, pair: Pair, undos: list[Undo], report: HardeningReport) -> None:
    before = getattr(getattr(model, "config", None), STAMP, None)
    _set_stamp(model, stamp(pair.config, pair.aligned.reference, pair.factors.reference))
    setattr(model, RECORD, _Record(undos, before, report, getattr(model, RECORD, None)))


def _set_stamp(model: nn.Module, content: object) -> None:
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):  # not a transformers model: nothing that is saved with it
        return
    if content is not None:
        setattr(config, STAMP, content)
    elif hasattr(config, STAMP):
        delattr(config, STAMP)
