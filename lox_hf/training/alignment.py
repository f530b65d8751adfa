"""`HardenAfter`: the training that makes the aligned model ends with a hardened one."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lox_hf.apply import apply_lox, hardening_report
from lox_hf.config import LoxConfig
from lox_hf.edit.tensor import BaseFactors
from lox_hf.errors import ConfigError, UnsupportedModelError, listing
from lox_hf.inputs import ModelLike, Pair, open_pair
from lox_hf.lora import RECORDS, LoraPair, active_lora, is_peft_model, lora_parameters, plan_pairs
from lox_hf.provenance import check_not_hardened
from lox_hf.records import HardeningReport
from lox_hf.training.checkpoints import STATE_NAME
from lox_hf.weights.source import DictSource
from lox_hf.weights.spread.model import SpreadSource, is_spread


class HardenAfter:
    """Hardens a model at the end of its alignment: W <- W + alpha * Proj_k(W - W_base) (paper, section 3).

    Full fine-tuning: W_base is what `base_model` or the config names. Where neither names one, it is the files that
    the model was loaded from (`model.config._name_or_path`, at the same commit), as that is where this training
    starts: not the base that their model card names. They are cast to the model's dtype, as loading has cast them.

    LoRA: the active adapter is the alignment, also what was in it before this training. It is hardened, needs no base
    and keeps its rank; the weights under it may be quantised.

    Args:
        config: Settings.
        token: Hub token; None uses the stored login.
        base_model: The model before alignment: folder, Hub id, module or state dict.

    Example:
        >>> import copy, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> ending = HardenAfter(LoxConfig(r=2, alpha=0.5), base_model=copy.deepcopy(model))
        >>> ending.check(model)
        >>> with torch.no_grad():
        ...     _ = model[0].weight.add_(0.1 * torch.eye(8))  # the training
        >>> len(ending.harden(model).tensors)
        1

    Source: Perin et al., COLM 2025, section 3.
    """

    def __init__(
        self, config: LoxConfig, token: str | bool | None = None, *, base_model: ModelLike | None = None
    ) -> None:
        self.config, self.token, self.base_model = config, token, base_model

    def check(self, model: nn.Module) -> None:
        """Find out before the first step whether `harden` will be possible, as far as no trained numbers are needed.

        Args:
            model: The model that is about to be trained; it is not changed.

        Raises:
            ConfigError: If no base can be told, the base is this model itself, or the settings select nothing.
            PairingError: If the base does not fit; all mismatches are listed.
            CheckpointError: If the base's files are missing or damaged.
            UnsupportedModelError: If, where not only LoRA is trained, weights are quantised, or offloaded with what
                the optimiser keeps; or an adapter is not plain LoRA.
            AlreadyHardenedError: If the model is hardened already.
        """
        if is_peft_model(model):
            _check_adapter(model, self.config)
            return
        base, config = self._base_of(model)
        pair = open_pair(model, base, config, token=self.token)
        _check_apart(pair)
        source = pair.aligned.source
        if isinstance(source, SpreadSource):
            with source.peers.together():
                for plan in pair.plans:
                    if plan.edit:
                        source.get(plan.name).check_in_place()

    def harden(self, model: nn.Module) -> HardeningReport:
        """Harden the trained model in place; if anything fails, it is left as it was.

        Checkpoints that were saved before stay as training left them, to resume from. What is saved from now on is
        hardened, and outside LoRA its config says so (`lox_config`).

        Args:
            model: The trained model.

        Returns:
            What was found for each matrix.

        Raises:
            NumericsError: If a matrix contains NaN or Inf, or the result overflows; it is named.
            PairingError: If training has changed nothing, or the base does not fit.
            ConfigError: As `check`.
            CheckpointError: As `check`.
            UnsupportedModelError: As `check`.
            AlreadyHardenedError: As `check`.
        """
        base, config = (None, self.config) if is_peft_model(model) else self._base_of(model)
        apply_lox(model, config, base_model=base, token=self.token, progressbar=False)
        return hardening_report(model)

    def _base_of(self, model: nn.Module) -> tuple[ModelLike | None, LoxConfig]:
        """The base, None where the config names it, and the settings to use it with."""
        if self.base_model is not None or self.config.base_model_name_or_path is not None:
            return self.base_model, self.config
        start = getattr(model, "config", None)
        name = getattr(start, "_name_or_path", "")
        if not name:
            raise ConfigError(
                f"{type(model).__name__} was not loaded from files, so the model before alignment is not known. Name "
                "it: LoxConfig(base_model_name_or_path=...)."
            )
        if (Path(name) / STATE_NAME).is_file():
            raise ConfigError(
                f"{type(model).__name__} was loaded from '{name}', a trainer's checkpoint, which may be half-way from "
                "the base to the aligned model. Name the model before alignment: LoxConfig(base_model_name_or_path="
                "...); the same folder, if this training does start there."
            )
        revision = self.config.revision or getattr(start, "_commit_hash", None)
        return name, replace(self.config, base_model_name_or_path=name, revision=revision, cast_base=True)


def _check_apart(pair: Pair) -> None:
    """Refuse a base that training will move along, such as a `model.state_dict()` that was not copied."""
    ours = pair.aligned.source
    if pair.base is not None or not isinstance(pair.factors, BaseFactors) or not isinstance(ours, DictSource):
        return
    theirs = pair.factors.base
    edited = [plan.name for plan in pair.plans if plan.edit]
    shared = [name for name in edited if ours.get(name).data_ptr() == theirs.get(name).data_ptr()]
    if shared:
        raise ConfigError(
            f"The base is the model in training itself: {len(shared)} weights are in the same memory: "
            f"{listing(shared, 3)} Pass a copy: copy.deepcopy(model), or the files it was loaded from."
        )


def _check_adapter(model: Any, config: LoxConfig) -> None:
    adapter = active_lora(model)
    records: Mapping[str, Any] = model.__dict__.get(RECORDS, {})
    if adapter in records:
        check_not_hardened(records[adapter].report.config, f"adapter '{adapter}'")
    factors: dict[str, tuple[Tensor, Tensor, float]] = dict(lora_parameters(model, adapter))
    spread = [name for name, (b, a, _) in factors.items() if any(map(is_spread, (b, a)))]
    if spread:
        raise UnsupportedModelError(
            f"Adapter '{adapter}' is spread over processes: {listing(spread, 3)} Harden its files when the training "
            "has ended, with harden_adapter."
        )
    plan_pairs([LoraPair(name, b, a, scaling) for name, (b, a, scaling) in factors.items()], config)
