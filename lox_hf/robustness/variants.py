"""The models of the matrix: the aligned model, its hardened forms, the controls; and those that an edit makes."""

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lox_hf.apply import apply_lox
from lox_hf.config import LoxConfig
from lox_hf.core.lowrank import LowRank
from lox_hf.errors import ConfigError, listing
from lox_hf.inputs import ModelLike
from lox_hf.provenance import STAMP
from lox_hf.robustness.attacks.recipe import meant
from lox_hf.robustness.rescale import rescale_residual
from lox_hf.subspace import SafetySubspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Control: TypeAlias = Literal["expo", "random", "refusal-matched", "safeinst", "rescaled", "retrained"]
Kind: TypeAlias = Literal["aligned", "hardened", Control]

CONTROLS: tuple[Control, ...] = get_args(Control)
"""The controls in the order of tables, those that belong to a hardened model first."""
WITH_CONFIG = ("hardened", "expo", "random", "refusal-matched")
"""The kinds that are made for certain settings of LoX."""
OF_THE_PAIR = ("base_model_name_or_path", "revision")
"""Settings that name the base model."""
TRAINED = ("refusal-matched", "retrained")
"""The kinds that training makes, not an edit; see `lox_hf.robustness.controls`."""


@dataclass(frozen=True)
class Variant:
    """One model of the matrix, as plain data.

    Attributes:
        kind: "aligned"; "hardened" (LoX); or a control: "expo" (LoX at full rank), "random" (an edit as large along
            random directions), "refusal-matched" (aligned further until it refuses as many harmless prompts as the
            hardened model), "safeinst" (the aligned model; safety examples are mixed into the attack), "rescaled" (the
            same function with larger weights) or "retrained" (trained a little more on harmless examples).
        config: Settings of LoX: those of the hardened model, and of the one that a control belongs to; for "expo" with
            r=None. None for the kinds that belong to none.

    Raises:
        ConfigError: If a kind that needs settings has none, one that has no use for them has some, or the full rank is
            asked for as "hardened".

    Example:
        >>> Variant("hardened", LoxConfig(r=6, alpha=1.25)).name, Variant("rescaled").name
        ('hardened r=6 alpha=1.25', 'rescaled')
    """

    kind: Kind
    config: LoxConfig | None = None

    def __post_init__(self) -> None:
        if (self.config is not None) != (self.kind in WITH_CONFIG):
            needs = "needs the settings of LoX (config)" if self.config is None else "has no use for settings of LoX"
            raise ConfigError(f"The model '{self.kind}' of the matrix {needs}.")
        if self.config is not None and (self.config.r is None) != (self.kind == "expo"):
            raise ConfigError(
                f"The model '{self.kind}' of the matrix has r={self.config.r}: the full rank (r=None) is the control "
                "'expo', and that alone; all others need a number of directions or an energy share."
            )

    @property
    def name(self) -> str:
        """What results call it; no two models of a matrix share one."""
        if self.config is None:
            return self.kind
        # r as it is written: 1 is one direction, 1.0 all of the energy.
        rank = "" if self.config.r is None else f" r={self.config.r}"
        return f"{self.kind}{rank} alpha={self.config.alpha:g}"

    @property
    def is_trained(self) -> bool:
        """Whether it is trained from the aligned model, not edited."""
        return self.kind in TRAINED

    def settings(self) -> dict[str, Any]:
        """Return what the model depends on besides the pair it is made from, as JSON values."""
        settings = self.config.to_dict() if self.config else {}
        return {"kind": self.kind, **{name: value for name, value in settings.items() if name not in OF_THE_PAIR}}


def make_variants(hardened: Sequence[LoxConfig], controls: Sequence[str] = CONTROLS) -> list[Variant]:
    """Name the models of a matrix: the aligned model, the hardened ones, the controls, always in this order.

    "random" and "refusal-matched" are one control for every hardened model, "expo" one for every alpha, the others one
    for all.

    Args:
        hardened: Settings of the hardened models.
        controls: Names of the controls, in any order.

    Returns:
        The models.

    Raises:
        ConfigError: If a control is not known, if nothing is hardened, or if two models would share a name.

    Example:
        >>> [variant.name for variant in make_variants([LoxConfig(r=6, alpha=1.25)], ["rescaled", "random"])]
        ['aligned', 'hardened r=6 alpha=1.25', 'random r=6 alpha=1.25', 'rescaled']
    """
    if not hardened:
        raise ConfigError("No hardened model is in the matrix: give at least one pair of r and alpha.")
    _check_controls(controls)
    variants = [Variant("aligned"), *(Variant("hardened", config) for config in hardened)]
    for control in CONTROLS:
        if control in controls:
            variants += _control(control, hardened)
    _check_names([variant.name for variant in variants])
    return variants


def edit_weights(
    model: "PreTrainedModel",
    variant: Variant,
    *,
    base_model: ModelLike,
    subspace: SafetySubspace | None = None,
    seed: int = 0,
) -> None:
    """Make a model of the matrix out of the aligned model, in place, as far as an edit makes it.

    "aligned" and "safeinst" (whose attack differs) need none, nor do "retrained" and "refusal-matched", which are
    trained (`lox_hf.robustness.controls`): these are left as they are.

    Args:
        model: The aligned model.
        variant: Which model is wanted.
        base_model: The model before alignment.
        subspace: Directions of the pair that were found before; None finds them.
        seed: Seed of random directions; no global seed is touched.

    Raises:
        PairingError: If aligned model and base, or the subspace, do not fit.
        ConfigError: If the settings select nothing.
        CheckpointError: If the base's files are missing or damaged.
        UnsupportedModelError: If the weights cannot be edited, or a model cannot be rescaled. It is as it was.
        NumericsError: If a matrix contains NaN or Inf, or the result overflows; it is named.
        AlreadyHardenedError: If the model is hardened.

    Example:
        >>> edit_weights(model, Variant("random", config), base_model="org/base", seed=1)  # doctest: +SKIP
    """
    if variant.kind == "rescaled":
        rescale_residual(model)
    elif variant.kind == "expo":
        apply_lox(model, variant.config, base_model=base_model, progressbar=False)
    elif variant.kind in ("hardened", "random"):
        if subspace is None:
            subspace = SafetySubspace.from_models(model, base_model, variant.config, progressbar=False)
        directions = subspace if variant.kind == "hardened" else random_subspace(subspace, seed)
        apply_lox(model, variant.config, base_model=directions, progressbar=False)
        if variant.kind == "random" and hasattr(model.config, STAMP):
            delattr(model.config, STAMP)  # a checkpoint that is kept must not say that LoX hardened it


def random_subspace(subspace: SafetySubspace, seed: int) -> SafetySubspace:
    """Turn every direction of a subspace into a random one: an edit with it is as large in every matrix.

    Args:
        subspace: The directions, left as they are.
        seed: Seed; a matrix's directions depend on it and on the matrix's name alone.

    Returns:
        U and Vh replaced by random orthonormal columns and rows, S kept.

    Example:
        >>> subspace = SafetySubspace.from_models("org/aligned", "org/base")  # doctest: +SKIP
        >>> apply_lox(model, base_model=random_subspace(subspace, seed=0))  # doctest: +SKIP
    """
    factors = {name: _randomised(found, seed, name) for name, found in subspace.factors.items()}
    return replace(subspace, factors=factors)


def _control(control: Control, hardened: Sequence[LoxConfig]) -> list[Variant]:
    """One control, for every hardened model to which one belongs."""
    if control not in WITH_CONFIG:
        return [Variant(control)]
    if control != "expo":
        return [Variant(control, config) for config in hardened]
    by_alpha = {config.alpha: replace(config, r=None, rank_pattern=None) for config in hardened}
    return [Variant(control, config) for config in by_alpha.values()]


def _check_controls(controls: Sequence[str]) -> None:
    unknown = [f"{name!r}{meant(name, CONTROLS)}" for name in controls if name not in CONTROLS]
    if unknown:
        raise ConfigError(f"Unknown controls: {listing(unknown)} Known are {', '.join(CONTROLS)}.")
    twice = [f"'{name}'" for name, count in Counter(controls).items() if count > 1]
    if twice:
        raise ConfigError(f"Controls are named twice: {listing(twice)}")


def _check_names(names: Sequence[str]) -> None:
    twice = [f"'{name}'" for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(
            f"Models of the matrix share a name: {listing(twice)} Give every hardened model another r or alpha; other "
            "settings, such as target_modules, belong to a run of their own."
        )


def _randomised(found: LowRank, seed: int, name: str) -> LowRank:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))  # it reads 32 bits alone
    (rows, columns), k = found.shape, found.rank
    left, right = (_orthonormal(size, k, generator).to(found.S.device) for size in (rows, columns))
    return LowRank(left, found.S, right.T.contiguous())


def _orthonormal(size: int, k: int, generator: torch.Generator) -> Tensor:
    """(size, k) float32 with orthonormal columns, uniformly random."""
    q, r = torch.linalg.qr(torch.randn(size, k, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()  # LAPACK's own signs are not random
