"""The grid of hardenings that are tried: rank, alpha, and which weights by a word."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lox_hf.analysis.directions import base_of
from lox_hf.config import ALL_LINEAR, REGEX_SIGNS, LoxConfig
from lox_hf.core.delta import Delta
from lox_hf.edit.tensor import matrices, matrix_names
from lox_hf.errors import ConfigError, NumericsError, PairingError
from lox_hf.inputs import Pair
from lox_hf.parallel.threads import map_tensors
from lox_hf.records import TensorPlan
from lox_hf.subspace import SafetySubspace
from lox_hf.weights.live import checkpoint_names, linear_modules
from lox_hf.weights.selection import TIED_HEAD, module_name, select
from lox_hf.weights.source import TensorInfo

Targets = str | list[str]
ALL, ATTENTION, MLP, NO_EMBEDDINGS = "all", "attention", "mlp", "no-embeddings"
WORDS = (ALL, ATTENTION, MLP, NO_EMBEDDINGS, ALL_LINEAR)
IS_ATTENTION = r"(?i).*(attn|attention).*"
IS_MLP = r"(?i)(?!.*(attn|attention)).*\.\d+\..*"
PAPER_R, PAPER_ALPHA = LoxConfig.r, LoxConfig.alpha
DIGITS = 6
"""Digits of a size that are known: the directions are float32, found to a tolerance among as many as are asked for."""


@dataclass(frozen=True)
class Trial:
    """One hardening to try.

    Attributes:
        name: What tables call it, such as "r=6 alpha=1.25 all".
        targets: Which weights, by the word that was asked for.
        config: Its settings.
        plans: What is done to every tensor.
    """

    name: str
    targets: str
    config: LoxConfig
    plans: tuple[TensorPlan, ...]

    @property
    def file_name(self) -> str:
        """Its own file: a readable name, and a hash, since a target may be any expression."""
        digest = hashlib.sha256(json.dumps(self.about()).encode()).hexdigest()[:8]
        readable = re.sub(r"[^\w.=-]+", "-", self.name)[:60]
        return f"{readable}-{digest}.json"

    def about(self) -> dict[str, Any]:
        """What its hardened weights depend on besides the weights of the two models."""
        given = self.config.to_dict()
        return {name: value for name, value in given.items() if name not in ("base_model_name_or_path", "revision")}


def make_trials(
    model: nn.Module,
    infos: Mapping[str, TensorInfo],
    rs: Sequence[int | float | None],
    alphas: Sequence[float],
    targets: Sequence[Targets],
    config: LoxConfig | None = None,
) -> list[Trial]:
    """Make the grid, every combination once.

    Args:
        model: The loaded model, which knows what its modules are.
        infos: Shape and dtype by checkpoint name.
        rs: Ranks, as `LoxConfig.r` takes them.
        alphas: Strengths, above 0.
        targets: Which weights: "all" (every tensor with two dims or more), "attention" (modules with attn or attention
            in a part of their path), "mlp" (the other matrices of numbered layers), "no-embeddings" (all but
            embeddings and the output head), "all-linear", the name of a module or a list of names, or a regular
            expression, both as `LoxConfig.target_modules` takes them.
        config: What all of them share, such as `exclude_modules`.

    Returns:
        The grid: by targets, then rank, then alpha.

    Raises:
        ConfigError: If one of the three is empty or out of range, or targets match nothing; all of them are listed.
        UnsupportedModelError: If a selected tensor is stored in a dtype that cannot be edited.

    Example:
        >>> import torch
        >>> from lox_hf.weights.source import TensorInfo
        >>> linear = torch.nn.Linear(4, 4, bias=False)
        >>> infos = {"weight": TensorInfo((4, 4), torch.float32, "float32")}
        >>> [trial.name for trial in make_trials(linear, infos, [2, None], [0.5], ["all"])]
        ['r=2 alpha=0.5 all', 'r=full alpha=0.5 all']
    """
    _check_grid(rs, alphas, targets)
    shared = config or LoxConfig()
    linear = linear_modules(model) if ALL_LINEAR in targets else ()
    found: dict[str, Trial] = {}
    for word in targets:
        chosen = _with_targets(shared, word, model, infos)
        for r in rs:
            for alpha in alphas:
                own = replace(chosen, r=r, alpha=float(alpha))
                name = f"r={'full' if r is None else r} alpha={alpha:g} {shown(word)}"
                found.setdefault(name, Trial(name, shown(word), own, tuple(select(infos, own, linear))))
    return list(found.values())


def shown(targets: Targets) -> str:
    """Return what tables call targets."""
    return targets if isinstance(targets, str) else ",".join(targets)


def delta_norms(pair: Pair) -> dict[str, float]:
    """Return ||dW||_F of every matrix that is edited in a pair, by its name.

    Args:
        pair: The two models and the selection.

    Returns:
        The norms.

    Raises:
        NumericsError: If a matrix contains NaN or Inf; it is named.
        PairingError: If no matrix differs.

    Example:
        >>> delta_norms(open_pair("org/aligned", "org/base", LoxConfig()))["lm_head.weight"]  # doctest: +SKIP
        12.9
    """
    source, base = pair.aligned.source, base_of(pair)
    sizes = source.infos()

    def work(plan: TensorPlan) -> list[tuple[str, float]]:
        names = matrix_names(plan.name, plan.shape)
        sides = zip(matrices(source.get(plan.name)), matrices(base.get(plan.name)), strict=True)
        deltas = [Delta(ours, theirs, cast_base=pair.config.cast_base) for ours, theirs in sides]
        found = [(name, _norm(name, delta)) for name, delta in zip(names, deltas, strict=True)]
        source.release(plan.name)
        base.release(plan.name)
        return found

    edited = [plan for plan in pair.plans if plan.edit]
    results = map_tensors(work, edited, size_of=lambda plan: sizes[plan.name].size_bytes, progressbar=False)
    norms = dict(item for items in results for item in items)
    if not any(norms.values()):
        raise PairingError(f"{source.label} and {base.label} are equal in every matrix: nothing to extrapolate.")
    return norms


def strength(plans: Sequence[TensorPlan], subspace: SafetySubspace | None, norms: Mapping[str, float]) -> float:
    """Return the size of an edit: alpha * ||Proj_r(dW)||_F over the edited matrices as a share of ||dW||_F of all.

    Args:
        plans: What is done to every tensor.
        subspace: Directions of every edited matrix; None for the full rank, of which only the norms are needed.
        norms: ||dW||_F of every matrix that no setting excludes.

    Returns:
        The share, 0 or more, to `DIGITS` digits: a candidate reads the same whichever others are beside it.

    Example:
        >>> strength(trial.plans, subspace, norms)  # doctest: +SKIP
        0.83
    """
    energy = 0.0
    for plan in plans:
        for name in matrix_names(plan.name, plan.shape) if plan.edit else ():
            energy += plan.alpha**2 * _energy(plan, subspace, name, norms[name])
    share = math.sqrt(energy / math.fsum(norm**2 for norm in norms.values()))
    return float(f"{share:.{DIGITS}g}")


def _norm(name: str, delta: Delta) -> float:
    energy = math.fsum(torch.linalg.vector_norm(tile).item() ** 2 for _, tile in delta.tiles())
    if not math.isfinite(energy):
        raise NumericsError(f"{name}: dW contains NaN or Inf.")
    return math.sqrt(energy)


def _energy(plan: TensorPlan, subspace: SafetySubspace | None, name: str, norm: float) -> float:
    """||Proj_r(dW)||_F^2 of one matrix."""
    if plan.r is None or subspace is None:
        return norm**2
    stored = subspace.factors[name]
    return stored.S[: stored.rank_for(plan.r, norm**2)].cpu().double().square().sum().item()


def _check_grid(rs: Sequence[Any], alphas: Sequence[Any], targets: Sequence[Any]) -> None:
    problems = [
        f"{name} is empty"
        for name, values in (("rs", rs), ("alphas", alphas), ("targets", targets))
        if not len(values)
    ]
    if any(isinstance(alpha, (int, float)) and alpha == 0 for alpha in alphas):
        problems.append("alpha = 0 is the aligned model itself, which is measured in any case: leave it out")
    for name, values in (("r", rs), ("alpha", alphas)):
        for value in values:
            try:
                LoxConfig(**{name: value})
            except ConfigError as error:
                problems.append(str(error).removeprefix("Invalid LoxConfig: ").removesuffix("."))
    if problems:
        raise ConfigError("Invalid grid: " + "; ".join(problems) + ".")


def _with_targets(config: LoxConfig, targets: Targets, model: nn.Module, infos: Mapping[str, TensorInfo]) -> LoxConfig:
    """The settings with a word turned into what `LoxConfig` takes."""
    if targets == ALL:
        return replace(config, target_modules=None)
    if targets == ATTENTION:
        return replace(config, target_modules=IS_ATTENTION)
    if targets == MLP:
        return replace(config, target_modules=IS_MLP)
    if targets == NO_EMBEDDINGS:
        return replace(config, target_modules=None, exclude_modules=_and_embeddings(config, model, infos))
    is_name = isinstance(targets, str) and targets != ALL_LINEAR and not REGEX_SIGNS.search(targets)
    return replace(config, target_modules=[targets] if is_name else targets)


def _and_embeddings(config: LoxConfig, model: nn.Module, infos: Mapping[str, TensorInfo]) -> list[str] | str:
    """What is left alone: what is excluded already, every embedding and the output head."""
    finders = [getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings")]
    ends = [find() for find in finders if callable(find)]
    live = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Embedding) or any(module is end for end in ends)
    ]
    stored = checkpoint_names(model)
    names = [module_name(name) for own in live for name in stored.get(f"{own}.weight", ()) if name in infos]
    if not names:
        raise ConfigError(f"targets {NO_EMBEDDINGS!r}: {type(model).__name__} has no embeddings; use {ALL!r}.")
    if TIED_HEAD in live and TIED_HEAD not in names:  # some files hold a tied head once more
        names.append(TIED_HEAD)
    given = config.exclude_modules
    if isinstance(given, str):
        return "|".join([f"(?:{given})", *map(re.escape, names)])
    return [*(given or []), *names]
