"""The points of an analysis: each measured once, each a file as soon as it is there."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lox_hf.errors import ConfigError
from lox_hf.records import Score
from lox_hf.weights.identity import weights_sample
from lox_hf.weights.source import WeightSource

ScoreFn = Callable[[Any], Any]
"""Measures a loaded model: returns a record, a rate or a number, as `Score.of` takes it. It must leave the weights as
they are."""


@dataclass(frozen=True)
class PointJob:
    """One model that is formed and measured.

    Attributes:
        path: File of the result, relative to the run's folder.
        about: What the result depends on, as JSON values.
        measure: Forms the model and measures it.
    """

    path: str
    about: dict[str, Any]
    measure: Callable[[], Score]
    leaves: None = None

    def settings(self) -> dict[str, Any]:
        """What the result depends on."""
        return self.about

    def run(self) -> Score:
        """Form and measure."""
        return self.measure()

    def read(self, data: dict[str, Any]) -> Score:
        """Build the result."""
        return Score.from_dict(data)


def measured(score_fn: ScoreFn, model: nn.Module) -> Score:
    """Measure a model.

    Args:
        score_fn: The measure.
        model: The model.

    Returns:
        What was found, as it is read back from a file.

    Raises:
        ConfigError: If the function returns neither a record with rates or numbers nor one of them.
    """
    found = score_fn(model)
    try:
        score = Score.of(found)
    except TypeError as error:
        raise ConfigError(str(error)) from error
    return Score.from_json(score.to_json())


def with_dtype(about: Mapping[str, Any] | None, model: nn.Module) -> dict[str, Any]:
    """Add to the settings of a measure the dtypes of the loaded model: points in another one are other points.

    Args:
        about: The settings; None for none.
        model: The model in which points are formed.

    Returns:
        The settings with the dtypes, such as "bfloat16".
    """
    found = {str(tensor.dtype).removeprefix("torch.") for tensor in model.parameters()}
    return {**(about or {}), "dtype": ", ".join(sorted(found))}


def identity(source: WeightSource) -> str:
    """Tell whose weights these are, wherever they lie: a hash of a sample of every tensor."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in sorted(source.infos()):  # files hold them in another order than a loaded model
            yield name, source.get(name)
            source.release(name)

    return weights_sample(tensors())[:16]
