"""The models that span a landscape: opened, checked to fit together, and placed on their plane."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch import nn

from lox_hf.analysis.formed import FormedModel, shared_names
from lox_hf.analysis.plane import Plane, inner_products
from lox_hf.errors import PairingError, listing
from lox_hf.hub_files import CHECKPOINT_FILES
from lox_hf.inputs import ModelLike, open_side
from lox_hf.weights.live import live_tensors
from lox_hf.weights.source import DictSource, TensorInfo, WeightSource


@dataclass(frozen=True)
class Corners:
    """Models of one shape, and the plane through them.

    Attributes:
        place: The loaded model in which points of the plane are formed.
        sources: The models' weights.
        names: What the models are called; every name once.
        plane: The plane.
        parameters: Weights that take part.
    """

    place: FormedModel
    sources: list[WeightSource]
    names: list[str]
    plane: Plane
    parameters: int


def open_corners(
    model: nn.Module,
    models: Sequence[ModelLike],
    *,
    revisions: Sequence[str | None] | None = None,
    token: str | bool | None = None,
    progressbar: bool | None = None,
) -> Corners:
    """Open models, check that they fit, and find their plane in one pass over their weights.

    Args:
        model: A loaded model of the same architecture.
        models: Two or four models.
        revisions: Their revisions on the Hub, one each.
        token: Hub token; None uses the stored login.
        progressbar: Show a progress bar; None shows one on a terminal only.

    Returns:
        The models and the plane. A copy of the loaded model's weights is kept, unless the first model's files hold
        them and no model lies in the loaded one's memory.

    Raises:
        PairingError: If the models are not of one shape, are the same, or span no plane.
        NumericsError: If weights are not finite.
        CheckpointError: If files are missing or damaged.
        UnsupportedModelError: If weights are quantised, offloaded or sharded.

    Example:
        >>> import torch
        >>> corners = open_corners(torch.nn.Linear(1, 1, bias=False), [{"weight": torch.eye(1) * n} for n in (1, 3)])
        >>> corners.plane.length
        2.0
    """
    named = revisions or [None] * len(models)
    sides = [
        open_side(one, f"m{number}", revision=revision, token=token, files=CHECKPOINT_FILES, like=model)
        for number, (one, revision) in enumerate(zip(models, named, strict=True), start=1)
    ]
    sources, live = [side.source for side in sides], live_tensors(model)
    _check_fit(DictSource(live, "the loaded model").infos(), sources)
    floating = [name for name, tensor in live.items() if tensor.is_floating_point()]
    products = inner_products(sources, floating, progressbar=progressbar)
    if products.same:
        pairs = [f"{sources[a].label} and {sources[b].label} hold the same weights" for a, b in products.same]
        raise PairingError(f"The models span no landscape: {listing(pairs)} Name models that differ.")
    plane = Plane.of(products.gram)
    shared = any(shared_names(source, live) for source in sources)
    place = FormedModel(model) if shared else _place(model, models[0], named[0], token)
    kept = [place.apart(source) for source in sources]
    names = _told_apart([side.reference.name_or_path for side in sides])
    return Corners(place, kept, names, plane, products.parameters)


def _check_fit(place: Mapping[str, TensorInfo], sources: Sequence[WeightSource]) -> None:
    """Refuse models of different names, shapes or dtypes; everything that differs is told at once."""
    first, *others = sources
    like = first.infos()
    problems = list(_missing(place, like, first.label))
    problems += [
        f"{name}: {info.shape} in the loaded model against {like[name].shape} in {first.label}"
        for name, info in place.items()
        if name in like and info.shape != like[name].shape
    ]
    wanted = {name: info for name, info in like.items() if _is_floating(info) or name in place}
    for source in others:
        infos = source.infos()
        problems += _missing(wanted, infos, source.label)
        problems += _missing({n: i for n, i in infos.items() if _is_floating(i)}, like, first.label)
        for name in wanted:
            if name in infos:
                problems += _differing(name, like[name], infos[name], first.label, source.label)
    if problems:
        shared = any(name in source.infos() for name in place for source in sources)
        remedy = "" if shared else " No tensor name is shared: these are different architectures."
        raise PairingError(f"The models do not fit together: {len(problems)} differences. {listing(problems)}{remedy}")


def _missing(wanted: Mapping[str, TensorInfo], infos: Mapping[str, TensorInfo], label: str) -> list[str]:
    return [f"{name}: missing in {label}" for name in wanted if name not in infos]


def _differing(name: str, ours: TensorInfo, theirs: TensorInfo, first: str, other: str) -> list[str]:
    if ours.shape != theirs.shape:
        return [f"{name}: {ours.shape} in {first} against {theirs.shape} in {other}"]
    if ours.stored != theirs.stored:
        remedy = "[another dtype: save both in the same precision]"
        return [f"{name}: {ours.stored} in {first} against {theirs.stored} in {other} {remedy}"]
    return []


def _is_floating(info: TensorInfo) -> bool:
    return info.dtype is not None and info.dtype.is_floating_point


def _place(model: nn.Module, first: ModelLike, revision: str | None, token: str | bool | None) -> FormedModel:
    """The loaded model; its own weights are read again from the first model where they are the same."""
    with suppress(PairingError):
        return FormedModel(model, first, revision=revision, token=token)
    return FormedModel(model)


def _told_apart(names: Sequence[str]) -> list[str]:
    """Names, numbered where several models in memory have the same one."""
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, start=1)]
