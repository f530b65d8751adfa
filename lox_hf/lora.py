"""LoX on an alignment that is a LoRA adapter: dW = scaling * B A is known, so no base model is needed.

U (S + alpha S_k) V^T has the rank of B A: the hardened adapter keeps its shapes.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lox_hf.config import LoxConfig
from lox_hf.core.lowrank import Decomposition, LowRank, from_lora
from lox_hf.edit.tensor import naming, tensor_report
from lox_hf.errors import ConfigError, LoxError, NumericsError, PairingError, UnsupportedModelError
from lox_hf.provenance import check_not_hardened
from lox_hf.records import HardeningReport, ModelReference, TensorPlan, TensorReport
from lox_hf.version import versions
from lox_hf.weights.selection import select
from lox_hf.weights.source import TensorInfo

if TYPE_CHECKING:
    from peft import PeftModel

RECORDS = "_lox_adapters"
VARIANTS = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "target_parameters",
)
"""Settings of PEFT under which the change is not scaling * B A of one matrix a module."""

LoraWeights = dict[str, tuple[Tensor, Tensor, float]]
"""B (m, r), A (r, n) and the scaling by module name."""


@dataclass(frozen=True)
class LoraRecord:
    """What a hardened adapter remembers: its factors before and after, and the report."""

    before: LoraWeights
    after: LoraWeights
    report: HardeningReport
    previous: "LoraRecord | None" = None


@dataclass(frozen=True)
class LoraPair:
    """The two factors of one module's dW = scaling * B A.

    Attributes:
        module: Name of the module in the base model.
        b: (m, r).
        a: (r, n).
        scaling: PEFT's scaling.
    """

    module: str
    b: Tensor
    a: Tensor
    scaling: float


def harden_pair(pair: LoraPair, plan: TensorPlan) -> tuple[Tensor, Tensor, TensorReport]:
    """Harden one module's factors: B' A' scaling = U (S + alpha S_k) V^T, balanced between the two.

    Args:
        pair: The factors.
        plan: Rank and alpha; an `r` above the adapter's rank takes all of it.

    Returns:
        B' and A' in the shapes and dtypes of B and A, and the report.

    Raises:
        NumericsError: If the factors contain NaN or Inf, or the result overflows their dtype.
    """
    if plan.alpha == 0:
        nothing = LowRank(pair.b[:, :0].float(), torch.empty(0), pair.a[:0].float())
        return pair.b, pair.a, tensor_report(pair.module, plan, Decomposition(nothing, 0.0, 0.0, 0.0, 0, "none"), 0.0)
    with naming(pair.module):
        whole = from_lora(pair.b, pair.a, pair.scaling)
    s, rank = whole.factors.S, whole.factors.rank
    k = whole.factors.rank_for(plan.r, whole.energy)
    stretched = s.clone()
    stretched[:k] *= 1 + plan.alpha
    root = (stretched.abs() / abs(pair.scaling)).sqrt()
    signs = stretched.sign() * (1 if pair.scaling >= 0 else -1)  # alpha < -1 turns directions round
    b, a = torch.zeros_like(pair.b), torch.zeros_like(pair.a)
    b[:, :rank] = whole.factors.U * root
    a[:rank] = (root * signs)[:, None] * whole.factors.Vh
    if not (b.isfinite().all() and a.isfinite().all()):
        dtype = str(pair.b.dtype).removeprefix("torch.")
        raise NumericsError(f"{pair.module}: the factors overflow {dtype}: alpha is too large.")
    next_s = s[k].item() if k < rank else 0.0
    cut = Decomposition(whole.factors.truncate(k), whole.energy, next_s, 0.0, 0, whole.method)
    return b, a, tensor_report(pair.module, plan, cut, 0.0)


def plan_pairs(pairs: list[LoraPair], config: LoxConfig) -> list[TensorPlan]:
    """Plan every module of an adapter by the same rules as a checkpoint's tensors.

    Args:
        pairs: The factors by module.
        config: Settings.

    Returns:
        Plans in the order of `pairs`.

    Raises:
        ConfigError: If a pattern matches nothing.
    """
    infos = {
        f"{pair.module}.weight": TensorInfo((len(pair.b), pair.a.shape[1]), torch.float32, "lora") for pair in pairs
    }
    return select(infos, config, [pair.module for pair in pairs])


def is_peft_model(model: object) -> bool:
    """Whether this is a PeftModel, without importing PEFT."""
    return any(cls.__name__ == "PeftModel" and cls.__module__.startswith("peft") for cls in type(model).__mro__)


def harden_lora(model: Any, config: LoxConfig, *, allow_repeat: bool = False) -> None:
    """Harden the active LoRA adapter of a PeftModel in place; see `apply_lox`.

    Args:
        model: The PeftModel.
        config: Settings; the base in it is not used.
        allow_repeat: Harden an adapter that is hardened already once more.

    Raises:
        UnsupportedModelError: If the adapter is not plain LoRA.
        AlreadyHardenedError: If it is hardened already.
        PairingError: If every B A is zero.
        ConfigError: If the settings select nothing.
        NumericsError: If factors contain NaN or Inf.
    """
    started = time.perf_counter()
    adapter = active_lora(model)
    records: dict[str, LoraRecord] = model.__dict__.setdefault(RECORDS, {})
    if adapter in records and not allow_repeat:
        check_not_hardened(records[adapter].report.config, f"adapter '{adapter}'")
    live = dict(lora_parameters(model, adapter))
    pairs = [LoraPair(name, b, a, scaling) for name, (b, a, scaling) in live.items()]
    before = _copy(live)
    reports = harden_pairs(pairs, config, f"adapter '{adapter}'")
    report = lora_report(ModelReference(f"adapter '{adapter}'"), config, reports, pairs, started)
    records[adapter] = LoraRecord(before, _copy(live), report, records.get(adapter))


def revert_lora(model: Any) -> None:
    """Take `harden_lora` back, bit for bit.

    Args:
        model: The PeftModel.

    Raises:
        LoxError: If the active adapter was not hardened in this process, or was changed since.
    """
    adapter, record = _record(model)
    if not record.before:
        raise LoxError(f"Adapter '{adapter}' is LoX itself: model.unload() or model.disable_adapter() takes it off.")
    live = dict(lora_parameters(model, adapter))
    for name, (b, a, _) in live.items():
        if not (torch.equal(b, record.after[name][0]) and torch.equal(a, record.after[name][1])):
            raise LoxError(f"{name} was changed after apply_lox: load the adapter again.")
    for name, (b, a, _) in live.items():
        b.copy_(record.before[name][0])
        a.copy_(record.before[name][1])
    records = model.__dict__[RECORDS]
    del records[adapter]
    if record.previous is not None:
        records[adapter] = record.previous


def remember_adapter(model: Any, adapter: str, report: HardeningReport) -> None:
    """Note that an adapter is LoX itself, so that it is not taken for an alignment.

    Args:
        model: The PeftModel.
        adapter: Name of the adapter.
        report: How it was made.
    """
    model.__dict__.setdefault(RECORDS, {})[adapter] = LoraRecord({}, {}, report)


def adapter_report(model: Any) -> HardeningReport:
    """Return what `apply_lox` did to the active adapter of a PeftModel.

    Args:
        model: The PeftModel.

    Returns:
        The report.

    Raises:
        LoxError: If the adapter was not hardened in this process.
    """
    return _record(model)[1].report


def harden_pairs(pairs: list[LoraPair], config: LoxConfig, name: str) -> list[TensorReport]:
    """Harden all factors in place, once every one of them is known to be good.

    Args:
        pairs: The factors by module; changed in place.
        config: Settings.
        name: How messages call the adapter.

    Returns:
        One report per module that was edited.

    Raises:
        PairingError: If every B A is zero.
        ConfigError: If the settings select nothing.
        NumericsError: If factors contain NaN or Inf.
    """
    plans = plan_pairs(pairs, config)
    edits = [(pair, *harden_pair(pair, plan)) for pair, plan in zip(pairs, plans, strict=True) if plan.edit]
    if all(report.method == "zero" for *_, report in edits):
        raise PairingError(f"'{name}' is zero in every selected module: nothing to extrapolate.")
    for pair, b, a, _ in edits:
        pair.b.copy_(b)
        pair.a.copy_(a)
    return [report for *_, report in edits]


def lora_report(
    aligned: ModelReference,
    config: LoxConfig,
    reports: list[TensorReport],
    pairs: list[LoraPair],
    started: float,
    *,
    output: str = "",
    others: int = 0,
) -> HardeningReport:
    """Report of a hardened adapter.

    Args:
        aligned: The adapter.
        config: The settings.
        reports: What was done to each module.
        pairs: All modules of the adapter.
        started: `time.perf_counter` at the beginning.
        output: Folder that was written.
        others: Tensors of the adapter that are no LoRA factors.

    Returns:
        The report.
    """
    warning = f"{others} tensors of the adapter are not LoRA factors (modules_to_save): they are copied unhardened."
    return HardeningReport(
        aligned=aligned,
        base=None,
        config=config.to_dict(),
        tensors=tuple(reports),
        copied=len(pairs) - len(reports),
        output=output,
        seconds=time.perf_counter() - started,
        versions=versions(),
        warnings=(warning,) if others else (),
    )


def check_plain_lora(peft_config: Any, name: str) -> None:
    """Refuse adapters whose dW is not scaling * B A.

    Args:
        peft_config: A PEFT config, or its dict.
        name: How messages call the adapter.

    Raises:
        UnsupportedModelError: If it is not LoRA, or a variant with more than two factors.
    """
    get = (
        peft_config.get
        if isinstance(peft_config, dict)
        else lambda key, default=None: getattr(peft_config, key, default)
    )
    kind = getattr(get("peft_type"), "value", get("peft_type"))
    variants = [key for key in VARIANTS if get(key)]
    if kind != "LORA" or variants or get("bias", "none") not in ("none", None):
        what = f"LoRA with {', '.join(variants) or 'bias'}" if kind == "LORA" else kind
        raise UnsupportedModelError(
            f"{name} is {what}; only plain LoRA can be hardened as an adapter, as its dW is B A. "
            "Merge it into the base and harden the merged checkpoint."
        )


def active_lora(model: Any) -> str:
    """Return the name of the one active adapter of a PeftModel, which has to be plain LoRA."""
    active = model.active_adapters if isinstance(model.active_adapters, list) else [model.active_adapter]
    if len(active) != 1:
        raise ConfigError(
            f"{len(active)} adapters are active, {active}: activate the one that aligned the model with set_adapter."
        )
    check_plain_lora(model.peft_config[active[0]], f"Adapter '{active[0]}'")
    return active[0]


def lora_parameters(model: "PeftModel", adapter: str) -> Iterator[tuple[str, tuple[Tensor, Tensor, float]]]:
    """Yield live B (m, r), A (r, n) and scaling of every module of an adapter, whatever way round it stores them."""
    modules: Iterator[tuple[str, Any]] = model.get_submodule("base_model.model").named_modules()
    for name, module in modules:
        if adapter in getattr(module, "lora_A", {}):
            b, a = module.lora_B[adapter].weight, module.lora_A[adapter].weight
            if b.dim() != 2:
                raise UnsupportedModelError(f"{name} is a convolution under LoRA; exclude it with exclude_modules.")
            yield name, (b.detach(), a.detach(), float(module.scaling[adapter]))
        elif adapter in getattr(module, "lora_embedding_A", {}):
            b, a = module.lora_embedding_B[adapter], module.lora_embedding_A[adapter]
            yield name, (b.detach(), a.detach(), float(module.scaling[adapter]))


def _record(model: Any) -> tuple[str, LoraRecord]:
    adapter = active_lora(model)
    record = model.__dict__.get(RECORDS, {}).get(adapter)
    if record is None:
        raise LoxError(f"Adapter '{adapter}' was not hardened by apply_lox in this process.")
    return adapter, record


def _copy(weights: LoraWeights) -> LoraWeights:
    return {name: (b.clone(), a.clone(), scaling) for name, (b, a, scaling) in weights.items()}
