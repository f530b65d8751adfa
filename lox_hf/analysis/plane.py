"""The plane, or line, that models span: all of it from the inner products of their differences, read once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from lox_hf.analysis.formed import as_matrices
from lox_hf.core.buffers import scratch
from lox_hf.core.delta import tile_slices
from lox_hf.errors import NumericsError, PairingError, listing
from lox_hf.parallel.threads import map_tensors
from lox_hf.weights.source import WeightSource

TILE_ELEMENTS = 128 * 1024
"""Four tiles of float64 are 4 MiB a thread."""
COLLINEAR = 1e-4
"""A second direction of which less than this share is beside the first one is the first one and rounding."""

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Products:
    """What is known of models from one pass over their weights.

    Attributes:
        gram: <D_i, D_j> over all weights, with D_i = W_i - W_1 for every model but the first.
        parameters: Weights that were read.
        same: Pairs of models, from 0, that hold the same weights.
    """

    gram: tuple[Numbers, ...]
    parameters: int
    same: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Plane:
    """The plane through models: origin W_1, axes e_1 and e_2 of length 1; with two models the line through them.

    Attributes:
        length: ||W_2 - W_1||: the first axis is e_1 = (W_2 - W_1) / length.
        shear: Share of the first direction that is in the second one, and is taken out of it.
        height: Length of what is left of the second direction, ((W_3 - W_1) + (W_4 - W_2)) / 2; 0 on a line.
        coordinates: Where every model lies, the first at (0, 0), the second at (length, 0), both exactly.
        beside: Distance of every model from the plane; the third's and fourth's are equal by construction.

    Example:
        >>> plane = Plane.of(((4.0, 0.0, 4.0), (0.0, 9.0, 9.0), (4.0, 9.0, 13.0)))
        >>> plane.coordinates
        ((0.0, 0.0), (2.0, 0.0), (0.0, 3.0), (2.0, 3.0))
        >>> plane.coefficients(1.0, 0.0)
        (0.5, 0.5, 0.0, 0.0)

    Source: Perin et al., COLM 2025 (safety landscape); Gram-Schmidt over the whole parameter vector.
    """

    length: float
    shear: float
    height: float
    coordinates: tuple[tuple[float, float], ...]
    beside: Numbers

    @classmethod
    def of(cls, gram: Sequence[Sequence[float]]) -> "Plane":
        """Find the axes, and where the models lie.

        Args:
            gram: Inner products of the differences, as `Products` has them: 1 x 1 or 3 x 3.

        Returns:
            The plane.

        Raises:
            PairingError: If a direction has no length, or both are the same one.
        """
        products = torch.tensor(gram, dtype=torch.float64)
        count = len(products)
        first, length = _unit(count, 0), _norm(products, _unit(count, 0))
        if not length:
            raise PairingError("The models span nothing: the first direction, m2 - m1, has zero length.")
        if count == 1:
            return cls(length, 0.0, 0.0, ((0.0, 0.0), (length, 0.0)), (0.0, 0.0))
        second = torch.tensor([-0.5, 0.5, 0.5], dtype=torch.float64)
        shear = float(second @ products @ first) / float(products[0, 0])
        rest = second - shear * first
        height = _second_length(_norm(products, rest), _norm(products, second))
        places, beside = [(0.0, 0.0), (length, 0.0)], [0.0, 0.0]
        for number in range(1, count):
            model = _unit(count, number)
            x, y = float(model @ products @ first) / length, float(model @ products @ rest) / height
            places.append((x, y))
            beside.append(_norm(products, model - x / length * first - y / height * rest))
        return cls(length, shear, height, tuple(places), tuple(beside))

    def coefficients(self, x: float, y: float = 0.0) -> Numbers:
        """Return c_i with W_1 + x e_1 + y e_2 = sum_i c_i W_i: the point in terms of the models themselves.

        Args:
            x: Coordinate along the first axis.
            y: Coordinate along the second.

        Returns:
            One number a model; they add up to 1. At the first two models they are exactly 1 and 0.
        """
        along = x / self.length
        if not self.height:
            return 1 - along, along
        up = y / self.height
        along -= up * (self.shear + 0.5)
        return 1 - along - up, along, up / 2, up / 2


def inner_products(
    sources: Sequence[WeightSource], names: Sequence[str], *, progressbar: bool | None = None
) -> Products:
    """Read models once, side by side, and return the inner products of their differences.

    Weights are subtracted and multiplied in float64, tile by tile: of the second axis only what Gram-Schmidt leaves
    counts, and float32 would leave its own rounding.

    Args:
        sources: The models; their tensors have the same shapes.
        names: Tensors that are read: the floating ones, vectors too.
        progressbar: Show a progress bar; None shows one on a terminal only.

    Returns:
        The products.

    Raises:
        NumericsError: If weights are not finite; all are named.

    Example:
        >>> import torch
        >>> from lox_hf.weights.source import DictSource
        >>> models = [DictSource({"w": torch.full((2, 2), value)}, "a model") for value in (1.0, 1.5)]
        >>> inner_products(models, ["w"])
        Products(gram=((1.0,),), parameters=4, same=())
    """
    infos = sources[0].infos()

    def prefetch(name: str) -> None:
        for source in sources:
            source.prefetch(name)

    def work(name: str) -> tuple[Tensor, set[tuple[int, int]], list[str]]:
        tensors = [source.get(name) for source in sources]
        gram, same = _of_tensor(tensors)
        broken = [] if gram.isfinite().all() else [s.label for s, t in zip(sources, tensors, strict=True) if _bad(t)]
        for source in sources:
            source.release(name)
        return gram, same, [f"{name} of {label}" for label in broken]

    found = map_tensors(
        work,
        names,
        size_of=lambda name: len(sources) * infos[name].size_bytes,
        progressbar=progressbar,
        description="Reading the models",
        prepare=prefetch,
    )
    broken = [where for _, _, places in found for where in places]
    if broken:
        raise NumericsError(f"{len(broken)} tensors contain NaN or Inf: {listing(broken)} Save these models anew.")
    gram = torch.stack([part for part, _, _ in found]).sum(0)
    same = set.intersection(*(pairs for _, pairs, _ in found))
    parameters = sum(math.prod(infos[name].shape) for name in names)
    return Products(tuple(map(tuple, gram.tolist())), parameters, tuple(sorted(same)))


@torch.no_grad()
def _of_tensor(tensors: Sequence[Tensor]) -> tuple[Tensor, set[tuple[int, int]]]:
    """Inner products of one tensor's differences, and which models have the same numbers in it."""
    count = len(tensors) - 1
    gram = torch.zeros(count, count, dtype=torch.float64)
    same = set(combinations(range(len(tensors)), 2))
    for first, *others in zip(*map(as_matrices, tensors), strict=True):
        for part in tile_slices(*first.shape, tile_elements=TILE_ELEMENTS):
            shape = first[part].shape
            tiles = scratch("models", (len(tensors), shape.numel()), torch.float64, torch.device("cpu"))
            for tile, matrix in zip(tiles, (first, *others), strict=True):
                tile.view(shape).copy_(matrix[part])
            same = {(a, b) for a, b in same if torch.equal(tiles[a], tiles[b])}
            changes = tiles[1:].sub_(tiles[0])
            gram += changes @ changes.T
    return gram, same


def _second_length(height: float, whole: float) -> float:
    """The length of what Gram-Schmidt leaves, where that is a direction of its own."""
    if not whole:
        problem = "has zero length: what was done to m1 and to m2 cancels"
    elif height < COLLINEAR * whole:
        problem = f"is collinear with the first, m2 - m1: {height / whole:.0e} of it is beside that, which is rounding"
    else:
        return height
    raise PairingError(
        f"The models span no plane: the second direction, ((m3 - m1) + (m4 - m2)) / 2, {problem}. Name other models "
        "m3 and m4, or only m1 and m2 for the line through them."
    )


def _unit(count: int, number: int) -> Tensor:
    return torch.eye(count, dtype=torch.float64)[number]


def _norm(products: Tensor, vector: Tensor) -> float:
    """Length of a combination of differences; what rounding makes of 0 may be below it."""
    return math.sqrt(max(0.0, float(vector @ products @ vector)))


def _bad(tensor: Tensor) -> bool:
    return not bool(torch.isfinite(tensor).all())
