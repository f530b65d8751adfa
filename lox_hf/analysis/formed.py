"""One loaded model that becomes many, one after the other: its weights are formed anew in place, from files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lox_hf.core.combine import combine
from lox_hf.core.lowrank import LowRank
from lox_hf.edit.tensor import BaseFactors, Directions, edit_tensor, matrices, matrix_names, naming
from lox_hf.errors import PairingError, listing
from lox_hf.hub_files import CHECKPOINT_FILES
from lox_hf.inputs import ModelLike, Pair, open_side
from lox_hf.parallel.threads import map_tensors
from lox_hf.records import TensorPlan
from lox_hf.weights.live import live_tensors
from lox_hf.weights.source import DictSource, WeightSource

Result = TypeVar("Result")


class FormedModel:
    """A loaded model as a place for others of its shape: no second one is in memory, only tiles.

    Args:
        model: A loaded model, in plain weights.
        source: Where its own weights are read from again: its folder or Hub id, or anything that holds them; None,
            and what lies in the model's own memory, keeps a copy of them on the model's device.
        revision: Revision of `source` on the Hub.
        token: Hub token; None uses the stored login.

    Attributes:
        model: The model.
        source: Its own weights, under checkpoint names.
        names: Names of its weights: each once, also where files hold a tied one twice.

    Raises:
        PairingError: If `source` holds other weights than the model has.
        CheckpointError: If files are missing or damaged.
        UnsupportedModelError: If weights are quantised, offloaded or sharded.

    Example:
        >>> import torch
        >>> linear = torch.nn.Linear(2, 2, bias=False)
        >>> formed = FormedModel(linear)
        >>> formed.mix([(formed.source, 2.0)])
        >>> bool((linear.weight == 2 * formed.source.get("weight")).all())
        True
        >>> formed.restore()
    """

    def __init__(
        self,
        model: nn.Module,
        source: ModelLike | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> None:
        self.model = model
        self._live = live_tensors(model)
        self.names = tuple(self._live)
        self.source: WeightSource = DictSource(self._live, "the model")
        if source is not None:
            side = open_side(source, "aligned", revision=revision, token=token, files=CHECKPOINT_FILES, like=model)
            self.source = side.source
            self._check_same()
        if shared_names(self.source, self._live):
            self.source = DictSource({name: t.clone() for name, t in self._live.items()}, "the model")

    def restore(self) -> None:
        """Put the model's own weights back, bit for bit."""
        self._put_back(list(self._live))

    def apart(self, source: WeightSource) -> WeightSource:
        """Return a source that stays as it is when the model is formed.

        Args:
            source: Weights; those of a state dict may lie in the model's own memory.

        Returns:
            The source, with copies of what it shares with the model.
        """
        shared = shared_names(source, self._live)
        if not shared or not isinstance(source, DictSource):
            return source
        kept = self.source.tensors if isinstance(self.source, DictSource) else {}

        def copy(name: str) -> Tensor:
            tensor, own = source.get(name), self._live.get(name)
            is_own = own is not None and own.data_ptr() == tensor.data_ptr() and own.shape == tensor.shape
            return kept[name] if is_own and name in kept else tensor.clone()

        return DictSource({**source.tensors, **{name: copy(name) for name in shared}}, source.label)

    @contextmanager
    def restored_afterwards(self) -> Iterator["FormedModel"]:
        """Put the model's own weights back at the end of a block, however it ends."""
        try:
            yield self
        finally:
            self.restore()

    def mix(
        self,
        parts: Sequence[tuple[WeightSource, float]],
        directions: Mapping[str, LowRank] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        """Form W = sum_i c_i W_i, and U S Vh on top where there are directions; each rounded once.

        Args:
            parts: Models with their coefficients. Buffers and weights that are not floating stay as they are.
            directions: Directions by matrix name.
            names: Tensors that are formed; None forms all.

        Raises:
            NumericsError: If a weight is not finite; it is named.
        """

        def work(name: str) -> None:
            tensors = [(source.get(name), coefficient) for source, coefficient in parts if coefficient]
            live, shape = self._live[name], tuple(self._live[name].shape)
            for number, matrix_name in enumerate(_matrix_names(name, shape)):
                found = None if directions is None else directions.get(matrix_name)
                with naming(matrix_name):
                    combine([(as_matrices(t)[number], c) for t, c in tensors], as_matrices(live)[number], found)
            # Mapped pages are kept, not released: the next model reads them again, and the kernel may drop them.

        chosen = self._live if names is None else names
        self._each(work, [name for name in chosen if self._live[name].is_floating_point()])

    def harden(self, plans: Sequence[TensorPlan], factors: Directions) -> None:
        """Form W + alpha * Proj_k(dW) from the model's own weights; tensors that are not edited are put back.

        Args:
            plans: What is done to every tensor.
            factors: Where the directions come from.

        Raises:
            NumericsError: If a matrix is not finite, does not converge or overflows; it is named.
        """
        edited = {plan.name: plan for plan in plans if plan.edit}
        self._put_back([name for name in self._live if name not in edited])

        def work(name: str) -> None:
            live = as_matrices(self._live[name])

            def write(number: int, part: slice, rows: Tensor) -> None:
                live[number][part] = rows.to(live[number].device)

            edit_tensor(edited[name], self.source.get(name), factors, write)
            self.source.release(name)

        with torch.no_grad():
            self._each(work, list(edited))

    def _put_back(self, names: Sequence[str]) -> None:
        """Copy the model's own weights, whatever they hold: what it came with cannot be refused on the way back."""

        def work(name: str) -> None:
            self._live[name].copy_(self.source.get(name))
            self.source.release(name)

        self._each(work, names)

    def _each(self, work: Callable[[str], Any], names: Sequence[str]) -> None:
        map_tensors(work, names, size_of=lambda name: self._live[name].nbytes, progressbar=False)

    def _check_same(self) -> None:
        """Refuse a source whose weights are not the model's: it would become another one in silence."""
        theirs = self.source.infos()
        missing = [name for name in self._live if name not in theirs]
        wrong = [name for name in self._live if name in theirs and not self._is_same(name)]
        if missing or wrong:
            problems = [f"{name}: missing there" for name in missing] + [f"{name}: other numbers" for name in wrong]
            raise PairingError(
                f"{self.source.label} does not hold the loaded model's weights: {len(problems)} tensors differ. "
                f"{listing(problems, 5)} Load the model from there, or pass it without files."
            )

    def _is_same(self, name: str) -> bool:
        stored, live = self.source.get(name), self._live[name]
        same = stored.shape == live.shape and _are_equal(stored.to(live.dtype), live.cpu())
        self.source.release(name)
        return same


def of_live_weights(pair: Pair, formed: FormedModel) -> Pair:
    """Return a pair over the weights that the loaded model has.

    Args:
        pair: The two models and every matrix; its files may hold a tied weight twice.
        formed: The loaded model, whose own weights are read from where they do not change.

    Returns:
        The pair.
    """
    plans = [plan for plan in pair.plans if plan.name in formed.names]
    factors = pair.factors
    if isinstance(factors, BaseFactors):
        factors = BaseFactors(formed.apart(factors.base), factors.config, factors.reference)
    return replace(pair, aligned=replace(pair.aligned, source=formed.source), factors=factors, plans=plans)


def shared_names(source: WeightSource, live: Mapping[str, Tensor]) -> list[str]:
    """Return the tensors of a source that lie in a loaded model's own memory: they change when the model is formed.

    Args:
        source: Weights.
        live: The model's own, as `live_tensors` gives them.

    Returns:
        Their names in the source.
    """
    owned = {tensor.untyped_storage().data_ptr() for tensor in live.values()}
    tensors = source.tensors if isinstance(source, DictSource) else {}
    return [name for name, tensor in tensors.items() if tensor.untyped_storage().data_ptr() in owned]


def as_matrices(tensor: Tensor) -> list[Tensor]:
    """Return the matrices of a tensor, as views; a vector is one row."""
    return matrices(tensor) if tensor.dim() > 1 else [tensor.reshape(1, -1)]


def _matrix_names(name: str, shape: tuple[int, ...]) -> list[str]:
    return matrix_names(name, shape) if len(shape) > 1 else [name]


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether all bits are equal; compared eight bytes at a time where that is possible, which is 18x faster."""
    bits = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)]
    if all(part.numel() % 8 == 0 and part.data_ptr() % 8 == 0 for part in bits):
        bits = [part.view(torch.int64) for part in bits]
    return torch.equal(*bits)
