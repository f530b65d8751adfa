"""`open_weights`: the matrices of a model in training by checkpoint name, whatever holds them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lox_hf.edit.tensor import matrices, matrix_names
from lox_hf.lora import is_peft_model
from lox_hf.training.backends.matrix import LiveMatrix, PlainMatrix
from lox_hf.training.backends.zero import SteppedMatrix
from lox_hf.weights.live import live_tensors
from lox_hf.weights.source import TensorInfo
from lox_hf.weights.spread.model import (
    by_checkpoint_name,
    check_not_flat,
    is_spread,
    reshard,
    spread_matrix,
    whole_shape,
)
from lox_hf.weights.spread.zero import is_stepped

_STACKED = re.compile(r"\[\d+\]$")
"""End of the name of a matrix that is one of a stack, as `matrix_names` makes them."""


class LiveWeights:
    """The matrices of one model, and a `WeightSource` over them for readings that need a base.

    Args:
        model: The model.
        matrices: Its matrices.

    Attributes:
        label: How messages call the model.
        matrices: By matrix name: a tensor's checkpoint name, `name[i]` in a stack.
        collective: Whether any of them is spread over processes.
    """

    def __init__(self, model: nn.Module, matrices: Mapping[str, LiveMatrix]) -> None:
        self._model, self.label, self.matrices = model, type(model).__name__, matrices
        self.collective = any(matrix.collective for matrix in matrices.values())
        self._tensors: dict[str, list[str]] = {}
        for name in matrices:
            self._tensors.setdefault(_STACKED.sub("", name), []).append(name)

    def infos(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every tensor; a stack of matrices is one."""
        return {name: self._info(group) for name, group in self._tensors.items()}

    def get(self, name: str) -> Tensor:
        """Return the whole of one tensor: a view where it is a matrix, a copy where it is a stack of them."""
        group = self._tensors[name]
        dense = [self.matrices[matrix].dense() for matrix in group]
        return torch.stack(dense) if _STACKED.search(group[0]) else dense[0]

    def prefetch(self, name: str) -> None:
        """Do nothing: the weights are there."""

    def release(self, name: str) -> None:
        """Do nothing: the weights are the model's."""

    def refresh(self) -> None:
        """Make ready for a reading or a change after forward passes, and keep the matrices with all that they know.

        FSDP 2 leaves weights whole after some passes, and what is written meanwhile is lost: they are cut again. For
        other models there is nothing to do. It holds as long as the model has the same weights in the same modules;
        corrections under LoRA may come and go. Every process calls this.
        """
        reshard(self._model)

    def check_add(self, names: Iterable[str]) -> None:
        """Raise now what would keep `add` from changing these matrices later; here nothing does.

        Args:
            names: Matrix names.
        """

    def add(self, changes: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add left @ right to matrices in place, so that the next optimiser step and every save keep it.

        Args:
            changes: left (m, k) and right (k, n) by matrix name.
        """
        for name, (left, right) in changes.items():
            self.matrices[name].add(left, right)

    def _info(self, group: list[str]) -> TensorInfo:
        first = self.matrices[group[0]]
        shape = (len(group), *first.shape) if _STACKED.search(group[0]) else first.shape
        return TensorInfo(shape, first.dtype, str(first.dtype).removeprefix("torch."))


def open_weights(model: nn.Module) -> LiveWeights:
    """Open the weights of a model that is being trained.

    Args:
        model: The model that callbacks receive: plain, a PeftModel, sharded by FSDP2 or tensor parallelism, or under
            DeepSpeed ZeRO.

    Returns:
        Its matrices, as views: what they read changes with the model.

    Raises:
        UnsupportedModelError: If the weights are held in a way that is not known; nothing is left out in silence.

    Example:
        >>> import torch
        >>> sorted(open_weights(torch.nn.Sequential(torch.nn.Linear(3, 2))).matrices)
        ['0.weight']
    """
    model = getattr(model, "_orig_mod", model)  # compiled or not, the weights are those of the module inside
    reshard(model)
    if is_peft_model(model):
        from lox_hf.training.backends.adapters import open_adapted

        return open_adapted(cast("Any", model))
    spread = spread_matrices(model, dict(model.named_parameters()))
    return LiveWeights(model, spread or plain_matrices(live_tensors(model)))


def is_plain(model: nn.Module) -> bool:
    """Whether a model has no adapters and is in this process as a whole."""
    return not is_peft_model(model) and not any(map(_is_shared, model.parameters()))


def live_matrix(weight: Tensor) -> LiveMatrix:
    """Return the view that fits how one matrix is held.

    Args:
        weight: A parameter of two sides: a tensor of this process, a DTensor, or under DeepSpeed ZeRO.

    Returns:
        The view.
    """
    if is_spread(weight):
        return spread_matrix(weight)
    return SteppedMatrix(weight) if is_stepped(weight) else PlainMatrix(weight)


def plain_matrices(tensors: Mapping[str, Tensor]) -> dict[str, LiveMatrix]:
    """Return the matrices of tensors of this process.

    Args:
        tensors: Views of a model's weights by checkpoint name.

    Returns:
        Matrices by matrix name.
    """
    return {
        matrix_name: PlainMatrix(matrix)
        for name, tensor in tensors.items()
        if tensor.ndim > 1
        for matrix_name, matrix in zip(matrix_names(name, tuple(tensor.shape)), matrices(tensor), strict=True)
    }


def spread_matrices(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, LiveMatrix]:
    """Return the matrices of a model of which every process holds a piece; fused weights cannot be taken apart there.

    Args:
        model: The model, or the base model under adapters: it knows how its weights are called in a checkpoint.
        parameters: Its parameters, by the names it has without adapters.

    Returns:
        Matrices by checkpoint name; none where nothing is spread.

    Raises:
        UnsupportedModelError: If weights are held in a way that is not known.
    """
    check_not_flat(model)
    if not any(map(_is_shared, parameters.values())):
        return {}
    named = by_checkpoint_name(model, parameters)
    return {name: live_matrix(tensor) for name, tensor in named.items() if len(whole_shape(tensor)) > 1}


def _is_shared(tensor: Tensor) -> bool:
    """Whether processes read or change this together."""
    return is_spread(tensor) or is_stepped(tensor)
