"""LoX as an exact LoRA adapter: alpha * U S Vh = B A, with B = U sqrt(alpha S) and A = sqrt(alpha S) Vh."""

import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lox_hf.config import CONFIG_NAME, LoxConfig
from lox_hf.core.extrapolate import lora_factors
from lox_hf.errors import ConfigError, LoxError, UnsupportedModelError, listing
from lox_hf.hub_files import CHECKPOINT_FILES, resolve
from lox_hf.inputs import HasFactors, ModelLike, open_pair
from lox_hf.lora import remember_adapter
from lox_hf.provenance import STAMP, check_not_hardened
from lox_hf.records import REPORT_NAME, HardeningReport, TensorPlan
from lox_hf.subspace import SafetySubspace
from lox_hf.weights.live import checkpoint_names, meta_model
from lox_hf.weights.output_file import output_errors
from lox_hf.weights.selection import module_name
from lox_hf.weights.writer import FolderWriter

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

Factors = dict[str, tuple[Tensor, Tensor]]
"""B (m, k) and A (k, n) by module name, in the orientation of the stored weight."""


def get_lox_model(
    model: nn.Module,
    config: LoxConfig | None = None,
    *,
    base_model: ModelLike | HasFactors | None = None,
    aligned_model: ModelLike | None = None,
    adapter_name: str = "lox",
    allow_repeat: bool = False,
    token: str | bool | None = None,
    progressbar: bool | None = None,
) -> "PeftModel":
    """Put LoX on a model as a LoRA adapter: W x + B A x with B A = alpha * Proj_k(W - W_base), exactly (section 3).

    The aligned weights stay as they are: `disable_adapter()` gives the aligned model back, and stock PEFT saves, loads
    and merges the adapter. Factors are float32 with scaling 1; merging rounds once to the model's dtype.

    This is also the way for quantised models: the factors then come from full-precision files of the same model.

    Args:
        model: The aligned model; it gets the adapter's layers.
        config: Settings; None takes a subspace's own, or the defaults. `r` must not be None, `alpha` must be positive.
        base_model: The model before alignment, or a `SafetySubspace`; see `apply_lox`.
        aligned_model: Where the aligned weights are read from, if not from `model`: folder or Hub id, full precision.
        adapter_name: PEFT's name of the adapter.
        allow_repeat: Put LoX on a model that is hardened already.
        token: Hub token; None uses the stored login.
        progressbar: Show a progress bar; None shows one on a terminal only.

    Returns:
        The PeftModel around `model`, with the adapter active and frozen.

    Raises:
        ConfigError: If no base is named, the settings select nothing, or `r` or `alpha` has no adapter form.
        PairingError: If the two models do not fit; all mismatches are listed.
        UnsupportedModelError: If a selected weight cannot carry LoRA (fused experts, convolutions), or the model is
            quantised and `aligned_model` is not given.
        CheckpointError: If files are missing or damaged.
        NumericsError: If a matrix contains NaN or Inf; it is named.
        AlreadyHardenedError: If the model is hardened and `allow_repeat` is not set.

    Example:
        >>> peft_model = get_lox_model(model, LoxConfig("org/base", r=6))  # doctest: +SKIP
        >>> peft_model.save_pretrained("lox-adapter")  # doctest: +SKIP

    Source: Perin et al., COLM 2025, section 3; Hu et al., "LoRA", 2021.
    """
    if not allow_repeat:
        check_not_hardened(getattr(getattr(model, "config", None), STAMP, None), type(model).__name__)
    source = model if aligned_model is None else aligned_model
    pair = open_pair(source, base_model, config, token=token, allow_repeat=allow_repeat)
    check_has_adapter_form(pair.plans)
    subspace = SafetySubspace.from_pair(pair, progressbar=progressbar)
    wrapped = _wrap(model, subspace, pair.plans, adapter_name)
    remember_adapter(wrapped, adapter_name, subspace.report)
    return wrapped


def extract_lox_adapter(
    model_name_or_path: str | Path,
    output_dir: str | Path,
    config: LoxConfig | None = None,
    *,
    base_model: ModelLike | HasFactors | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    allow_repeat: bool = False,
    progressbar: bool | None = None,
) -> HardeningReport:
    """Write LoX as a PEFT adapter folder from files alone; no model is loaded into memory.

    Args:
        model_name_or_path: The aligned model: folder or Hub id.
        output_dir: Folder to create; it must not exist, or be empty.
        config: Settings; `r` must not be None, `alpha` must be positive.
        base_model: The model before alignment, or a `SafetySubspace`; see `harden_checkpoint`.
        revision: Revision of the aligned model on the Hub.
        token: Hub token; None uses the stored login.
        trust_remote_code: Run modelling code of the aligned model's repository, which says what its modules are.
        allow_repeat: Accept an aligned model that is hardened already.
        progressbar: Show a progress bar; None shows one on a terminal only.

    Returns:
        What was found for each matrix.

    Raises:
        LoxError: As `get_lox_model`.
        OutputError: If the output exists, is an input, or cannot be written.

    Example:
        >>> report = extract_lox_adapter("org/aligned", "adapter", LoxConfig("org/base"))  # doctest: +SKIP
        >>> peft_model = PeftModel.from_pretrained(model, "adapter")  # doctest: +SKIP
    """
    aligned = resolve(model_name_or_path, revision=revision, token=token, files=CHECKPOINT_FILES)
    writer = FolderWriter(output_dir)
    writer.check(0, [aligned.folder])
    pair = open_pair(
        model_name_or_path,
        base_model,
        config,
        revision=revision,
        token=token,
        trust_remote_code=trust_remote_code,
        allow_repeat=allow_repeat,
    )
    if pair.base is not None:
        writer.check(0, [pair.base.folder])
    check_has_adapter_form(pair.plans)
    skeleton = meta_model(aligned.folder, trust_remote_code=trust_remote_code)
    check_carries_lora(skeleton, pair.plans)
    subspace = SafetySubspace.from_pair(pair, progressbar=progressbar)
    peft_model = _wrap(skeleton, subspace, pair.plans, "default")
    peft_config = peft_model.peft_config["default"]
    peft_config.base_model_name_or_path, peft_config.revision = str(model_name_or_path), aligned.reference.revision
    with writer:
        with output_errors(writer.output):
            peft_model.save_pretrained(str(writer.partial), save_embedding_layers=False)
        (writer.partial / "README.md").unlink(missing_ok=True)  # PEFT's empty card
        writer.write(CONFIG_NAME, pair.config.to_json().encode())
        writer.write(REPORT_NAME, subspace.report.to_json().encode())
        writer.publish()
    return subspace.report


def check_has_adapter_form(plans: list[TensorPlan]) -> None:
    """Refuse strengths that two factors cannot share.

    Args:
        plans: What is done to each tensor.

    Raises:
        ConfigError: If a selected tensor has alpha <= 0.
    """
    wrong = [f"{plan.name}: alpha = {plan.alpha}" for plan in plans if plan.edit and plan.alpha <= 0]
    if wrong:
        raise ConfigError(f"An adapter needs alpha > 0: {listing(wrong, 5)} Use apply_lox for other values.")


def check_carries_lora(model: nn.Module, plans: list[TensorPlan]) -> dict[str, str]:
    """Check that every selected tensor belongs to a module that PEFT can put LoRA on.

    Args:
        model: The model, loaded or on the meta device.
        plans: What is done to each tensor.

    Returns:
        The live module's name by checkpoint name.

    Raises:
        UnsupportedModelError: If some are fused, convolutions, or not the weight of a linear or embedding layer.
    """
    live = {stored[0]: name for name, stored in checkpoint_names(model).items() if len(stored) == 1}
    by_name, modules, wrong = dict(model.named_modules()), {}, []
    for plan in plans:
        if not plan.edit:
            continue
        name = module_name(live.get(plan.name, ""))
        if len(plan.shape) == 2 and _takes_lora(by_name.get(name)) and live.get(plan.name, "").endswith(".weight"):
            modules[plan.name] = name
        else:
            wrong.append(f"{plan.name}: {plan.shape}")
    if wrong:
        raise UnsupportedModelError(
            f"{len(wrong)} selected weights cannot carry LoRA (fused experts, convolutions, not a linear layer): "
            f"{listing(wrong, 8)} Leave them out with exclude_modules, or edit the weights with apply_lox."
        )
    return modules


def scaling_one(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return settings of a LoraConfig under which B A is added as it is: lora_alpha equals the rank everywhere.

    Args:
        ranks: Rank by module name.

    Returns:
        Ranks, alphas and modules, and that the adapter is not trained.
    """
    r = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != r}
    return {
        "r": r,
        "lora_alpha": r,
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "inference_mode": True,
    }


def _wrap(model: nn.Module, subspace: SafetySubspace, plans: list[TensorPlan], adapter_name: str) -> "PeftModel":
    modules = check_carries_lora(model, plans)
    alphas = {plan.name: plan.alpha for plan in plans}
    factors = {
        modules[name]: lora_factors(directions, alphas[name])
        for name, directions in subspace.factors.items()
        if directions.rank
    }
    factors |= _tied_copies(model, factors)
    peft = _import_peft()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(tie_word_embeddings|fan_in_fan_out).*")  # both are handled here
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # between PEFT and transformers
        wrapped = peft.get_peft_model(
            model, _lora_config(model, factors), adapter_name=adapter_name, autocast_adapter_dtype=False
        )
    for name, (b, a) in factors.items():
        _fill(wrapped.get_submodule(f"base_model.model.{name}"), adapter_name, b, a)
    for parameter in wrapped.parameters():
        parameter.requires_grad_(False)
    return wrapped


def _lora_config(model: nn.Module, factors: Factors) -> "LoraConfig":
    from transformers.pytorch_utils import Conv1D

    ranks = {name: a.shape[0] for name, (_, a) in factors.items()}
    return _import_peft().LoraConfig(
        **scaling_one(ranks),
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in ranks),
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
    )


def _fill(layer: Any, adapter_name: str, b: Tensor, a: Tensor) -> None:
    """Put the factors into one PEFT layer; embeddings and Conv1D hold the transposed weight, so B and A swap."""
    if adapter_name in layer.lora_embedding_A:
        layer.lora_embedding_A[adapter_name] = _placed(b.T, layer.lora_embedding_A[adapter_name])
        layer.lora_embedding_B[adapter_name] = _placed(a.T, layer.lora_embedding_B[adapter_name])
        return
    if layer.fan_in_fan_out:
        b, a = a.T, b.T
    for factor, value in ((layer.lora_A[adapter_name], a), (layer.lora_B[adapter_name], b)):
        factor.weight = _placed(value, factor.weight)


def _placed(value: Tensor, before: Tensor) -> nn.Parameter:
    """The factor on the device PEFT had chosen; a skeleton on the meta device takes it as it is."""
    return nn.Parameter(value.contiguous() if before.is_meta else value.to(before.device).contiguous())


def _tied_copies(model: nn.Module, factors: Factors) -> Factors:
    """Factors for the second names of tied weights, which the stored checkpoint does not hold."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    copies = {
        module_name(second): factors[module_name(first)]
        for second, first in tied.items()
        if module_name(first) in factors
    }
    if copies:
        warnings.warn(
            f"{', '.join(copies)} shares its weight with the embedding. The adapter is exact while attached, but "
            "PEFT's merge adds both halves to the one weight, twice in all: for merged weights use apply_lox.",
            stacklevel=4,
        )
    return copies


def _takes_lora(module: nn.Module | None) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, nn.Embedding, Conv1D))


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise LoxError('LoX as an adapter needs PEFT: pip install "lox-hf[peft]".') from error
    return peft
