"""LoX on an alignment that is a LoRA adapter: dW = scaling * B A is known, so no base model is needed.

U (S + alpha S_k) V^T has the rank of B A: the hardened adapter keeps its shapes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lox_hf.config import LoxConfig
from lox_hf.core.lowrank import Decomposition, from_lora
from lox_hf.edit import naming, tensor_report
from lox_hf.errors import ConfigError, LoxError, NumericsError, PairingError, UnsupportedModelError
from lox_hf.provenance import check_not_hardened, stamp
from lox_hf.records import ModelReference, TensorPlan, TensorReport
from lox_hf.weights.selection import select
from lox_hf.weights.source import TensorInfo

if TYPE_CHECKING:
    from peft import PeftModel

RECORD = "_lox_record"


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
    with naming(pair.module):
        whole = from_lora(pair.b, pair.a, pair.scaling)
    s, rank = whole.factors.S, whole.factors.rank
    k = _wanted(whole, plan.r)
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


def harden_lora(model: Any, config: LoxConfig, *, allow_repeat: bool = False) -> list[TensorReport]:
    """Harden the active LoRA adapter of a PeftModel in place; see `apply_lox`.

    Args:
        model: The PeftModel.
        config: Settings; the base in it is not used.
        allow_repeat: Harden an adapter that is hardened already once more.

    Returns:
        One report per module.

    Raises:
        UnsupportedModelError: If the adapter is not plain LoRA.
        AlreadyHardenedError: If it is hardened already.
        PairingError: If every B A is zero.
        ConfigError: If the settings select nothing.
        NumericsError: If factors contain NaN or Inf.
    """
    adapter = _active_adapter(model)
    records = model.__dict__.setdefault(RECORD, {})
    if not allow_repeat:
        check_not_hardened(records.get(adapter, {}).get("stamp"), f"adapter '{adapter}'")
    parameters = dict(_lora_parameters(model, adapter))
    pairs = [LoraPair(name, b.detach(), a.detach(), scaling) for name, (b, a, scaling) in parameters.items()]
    plans = plan_pairs(pairs, config)
    results = [harden_pair(pair, plan) if plan.edit else None for pair, plan in zip(pairs, plans, strict=True)]
    reports = [result[2] for result in results if result is not None]
    if all(report.method == "zero" for report in reports):
        raise PairingError(f"Adapter '{adapter}' is zero in every selected module: nothing to extrapolate.")
    before = {name: (b.detach().clone(), a.detach().clone()) for name, (b, a, _) in parameters.items()}
    for pair, result in zip(pairs, results, strict=True):
        if result is not None:
            pair.b.copy_(result[0])
            pair.a.copy_(result[1])
    after = {name: (b.detach().clone(), a.detach().clone()) for name, (b, a, _) in parameters.items()}
    made = stamp(config, ModelReference(f"adapter '{adapter}'"), None)
    records[adapter] = {"stamp": made, "before": before, "after": after}
    return reports


def revert_lora(model: Any) -> None:
    """Take `harden_lora` back, bit for bit.

    Args:
        model: The PeftModel.

    Raises:
        LoxError: If the active adapter was not hardened in this process, or was changed since.
    """
    adapter = _active_adapter(model)
    record = model.__dict__.get(RECORD, {}).get(adapter)
    if record is None:
        raise LoxError(f"Adapter '{adapter}' was not hardened by apply_lox in this process: nothing to take back.")
    parameters = dict(_lora_parameters(model, adapter))
    for name, (b, a, _) in parameters.items():
        if not all(torch.equal(now, then) for now, then in zip((b, a), record["after"][name], strict=True)):
            raise LoxError(f"{name} was changed after apply_lox: load the adapter again.")
    for name, (b, a, _) in parameters.items():
        b.data.copy_(record["before"][name][0])
        a.data.copy_(record["before"][name][1])
    del model.__dict__[RECORD][adapter]


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
    variants = [
        key
        for key in ("use_dora", "use_qalora", "lora_bias", "alora_invocation_tokens", "trainable_token_indices")
        if get(key)
    ]
    if kind != "LORA" or variants or get("bias", "none") not in ("none", None):
        what = f"LoRA with {', '.join(variants) or 'bias'}" if kind == "LORA" else kind
        raise UnsupportedModelError(
            f"{name} is {what}; only plain LoRA can be hardened as an adapter, as its dW is B A. "
            "Merge it into the base and harden the merged checkpoint."
        )


def _active_adapter(model: Any) -> str:
    active = model.active_adapters if isinstance(model.active_adapters, list) else [model.active_adapter]
    if len(active) != 1:
        raise ConfigError(
            f"{len(active)} adapters are active, {active}: activate the one that aligned the model with set_adapter."
        )
    check_plain_lora(model.peft_config[active[0]], f"Adapter '{active[0]}'")
    return active[0]


def _lora_parameters(model: "PeftModel", adapter: str) -> Iterator[tuple[str, tuple[Tensor, Tensor, float]]]:
    """Live B (m, r), A (r, n) and the scaling of every module of an adapter, whatever way round it stores them."""
    modules: Iterator[tuple[str, Any]] = model.get_submodule("base_model.model").named_modules()
    for name, module in modules:
        if adapter in getattr(module, "lora_A", {}):
            b, a = module.lora_B[adapter].weight, module.lora_A[adapter].weight
            if b.dim() != 2:
                raise UnsupportedModelError(f"{name} is a convolution under LoRA; exclude it with exclude_modules.")
            yield name, (b, a, float(module.scaling[adapter]))
        elif adapter in getattr(module, "lora_embedding_A", {}):
            b, a = module.lora_embedding_B[adapter], module.lora_embedding_A[adapter]
            yield name, (b, a, float(module.scaling[adapter]))


def _wanted(whole: Decomposition, r: int | float | None) -> int:
    rank = whole.factors.rank
    if r is None:
        return rank
    if isinstance(r, int):
        return min(r, rank)
    reached = whole.factors.S.double().square().cumsum(0) >= r * whole.energy * (1 - 1e-6)
    return int(reached.int().argmax()) + 1 if reached.any() else rank
