"""Two models that differ by a change of rank 3 with known singular values, exact in bfloat16 already."""

import math
from collections.abc import Callable

import torch
from torch import nn

from lox_hf.records import Score
from lox_hf.statistics import rate

STRENGTHS = (4, 2, 1)
"""Of the three directions, in units of 1/64."""
N = 300


class Known(nn.Module):
    """Two matrices that are decomposed exactly and by iteration, a table that alignment left alone, and vectors."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 16), nn.Linear(144, 96, bias=False)
        self.table, self.norm = nn.Embedding(8, 8), nn.LayerNorm(8)
        self.to(dtype)


def make_pair(dtype: torch.dtype = torch.float32) -> tuple[Known, dict[str, torch.Tensor]]:
    """Return the aligned model and the base's state dict: all their entries are small multiples of 1/64."""
    generator = torch.Generator().manual_seed(0)
    model = Known(dtype)
    base = {
        name: (torch.randint(-8, 9, weight.shape, generator=generator) / 64).to(dtype)
        for name, weight in model.state_dict().items()
    }
    aligned = {name: weight.clone() for name, weight in base.items()}
    for name in ("first.weight", "second.weight"):
        aligned[name] += sum(direction(base[name].shape, number) for number in range(3)).to(dtype)
    for name in ("first.bias", "norm.weight"):
        aligned[name] += 0.25
    model.load_state_dict(aligned)
    return model, base


def direction(shape: torch.Size, number: int) -> torch.Tensor:
    """One of the orthogonal directions of the change, of singular value strength sqrt(m n) / 64."""
    rows, columns = (_walsh(size, number) for size in shape)
    return STRENGTHS[number] / 64 * torch.outer(rows, columns)


def left_over(r: int) -> float:
    """||W_r - W_aligned||_F over all matrices: the root of the remaining squared singular values."""
    sizes = 16 * 24 + 96 * 144
    return math.sqrt(sum((strength / 64) ** 2 * sizes for strength in STRENGTHS[r:]))


def distance_to(aligned: dict[str, torch.Tensor]) -> Callable[[nn.Module], float]:
    """A score function: how far the matrices of a model lie from given ones."""

    def distance(model: nn.Module) -> float:
        state = model.state_dict()
        squares = [
            (state[name].double() - aligned[name].double()).square().sum() for name in state if "weight" in name
        ]
        return math.sqrt(sum(squares).item())

    return distance


def attacked(aligned: dict[str, torch.Tensor]) -> Callable[[nn.Module], Score]:
    """A score function with a rate: of 300 prompts as large a share succeeds as the distance is of the base's."""
    distance = distance_to(aligned)

    def score(model: nn.Module) -> Score:
        count = round(N * min(1.0, distance(model) / left_over(0)))
        return Score({"asr": rate(count, N)}, {"distance": distance(model)}, {"asr": "1" * count + "0" * (N - count)})

    return score


def _walsh(size: int, number: int) -> torch.Tensor:
    """One of three orthogonal rows of signs."""
    return torch.tensor([(-1.0) ** (((number + 1) & index).bit_count()) for index in range(size)])
