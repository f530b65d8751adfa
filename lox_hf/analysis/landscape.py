"""A measure over the plane that models span, in the memory of one of them (paper, section 5)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lox_hf.analysis.basin import default_radius, find_basin
from lox_hf.analysis.corners import Corners, open_corners
from lox_hf.analysis.plane import Plane
from lox_hf.analysis.points import PointJob, ScoreFn, identity, measured, with_dtype
from lox_hf.errors import ConfigError, listing
from lox_hf.inputs import ModelLike
from lox_hf.jobs import Runner
from lox_hf.records import Basin, GridPoint, Landscape, PlacedModel, Score
from lox_hf.run_folder import RunFolder
from lox_hf.version import versions

RECORD_NAME = "landscape.json"
RUN = {"run": "landscape"}


def landscape(
    model: nn.Module,
    models: Sequence[ModelLike],
    score_fn: ScoreFn,
    *,
    grid: tuple[int, int] = (7, 7),
    margin: float = 0.25,
    radius: float | None = None,
    measure: str = "asr",
    about: Mapping[str, Any] | None = None,
    output_dir: str | Path | None = None,
    revisions: Sequence[str | None] | None = None,
    token: str | bool | None = None,
    progressbar: bool | None = None,
) -> Landscape:
    """Measure models and a grid of points on the plane that they span, one after the other in one loaded model.

    The origin is m1, the first axis m2 - m1, the second ((m3 - m1) + (m4 - m2)) / 2 made orthogonal to it, both over
    the whole parameter vector and of length 1; two models span a line. In the paper m1 is the aligned model, m2 the
    hardened one, m3 and m4 what fine-tuning makes of them. W(x, y) = W_1 + x e_1 + y e_2 is a sum of the models'
    own weights, formed tile by tile from their files: only `model` is in memory.

    The models themselves are measured too, as they are and not as their projections. The grid is evenly spaced; with
    the default margin and 7, 13 or 19 lines it passes exactly through the outermost models.

    Args:
        model: A loaded model of the same architecture, as the place where points are formed; left as found. Where its
            weights are not those of the first model's files, a copy of them is kept in memory.
        models: Two or four models: folders, Hub ids, loaded models or state dicts.
        score_fn: Measures `model` as it stands; see `Score.of` for what it may return.
        grid: Lines along the first and the second axis, from 2; on a line the first number counts.
        margin: How far the grid reaches beyond the models, as a share of their extent on each axis.
        radius: Half the side of the neighbourhoods of `Basin`, in units of the axes; None takes half the distance
            between m1 and m2, or one step of the grid where that is more.
        measure: Name of what is drawn and summed up, among what `score_fn` gives.
        about: What a score depends on besides the weights, as JSON values; a folder with other ones is refused. The
            dtype of the loaded model is one of them in any case.
        output_dir: Folder that every point is written to as it comes, and `landscape.json` at the end: a killed run
            goes on where it was. None keeps all in memory.
        revisions: Revisions of the models on the Hub, one each.
        token: Hub token; None uses the stored login.
        progressbar: Show progress bars; None shows them on a terminal only.

    Returns:
        The landscape; `lox_hf.plots.landscape` draws it.

    Raises:
        ConfigError: If a setting is out of range, or `score_fn` does not give `measure`.
        PairingError: If the models are not of one shape, are the same, or span no plane.
        NumericsError: If weights are not finite.
        CheckpointError: If files are missing or damaged.
        UnsupportedModelError: If weights are quantised, offloaded or sharded.
        OutputError: If the folder holds something else, or cannot be written.

    Example:
        >>> import torch
        >>> place = torch.nn.Linear(1, 1, bias=False)
        >>> ends = [{"weight": torch.tensor([[value]])} for value in (1.0, 3.0)]
        >>> found = landscape(place, ends, lambda m: m.weight.item(), grid=(3, 1), margin=0, measure="value")
        >>> [(point.x, point.score.value("value")) for point in found.points]
        [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]

    Source: Perin et al., COLM 2025 (safety landscape); the reference's safety/safety_landscape.py.
    """
    check_settings(models, grid, margin, radius, revisions)
    folder = RunFolder(output_dir, RUN)
    folder.check()
    corners = open_corners(model, models, revisions=revisions, token=token, progressbar=progressbar)
    xs, ys = _grid_lines(corners.plane, grid, margin)
    settings = with_dtype(about, model)
    jobs = _Points(corners, score_fn, settings)
    with folder, corners.place.restored_afterwards():
        runner: Runner[Score] = Runner(folder, progressbar=progressbar)
        placed = _measured_models(jobs, runner, measure)
        places = [(x, y) for x in xs for y in ys]
        scores = runner.results([jobs.of_place(x, y) for x, y in places], "Measuring points", "point")
        points = tuple(GridPoint(x, y, score) for (x, y), score in zip(places, scores, strict=True))
        basins = _basins(placed, points, measure, radius or default_radius(placed, xs, ys))
        found = Landscape(
            models=placed,
            xs=xs,
            ys=ys,
            points=points,
            parameters=corners.parameters,
            measure=measure,
            about=settings,
            basins=basins,
            versions=versions(),
            warnings=(*_far_models(placed), *_basin_warnings(measure, basins)),
        )
        folder.write(RECORD_NAME, found.to_json())
    return found


class _Points:
    """How every model and every point is formed and measured, and what its result depends on.

    Args:
        corners: The models and their plane.
        score_fn: The measure.
        about: Settings of the measure.
    """

    def __init__(self, corners: Corners, score_fn: ScoreFn, about: dict[str, Any]) -> None:
        self.corners, self.score_fn, self.about = corners, score_fn, about
        self.weights = {f"m{number}": identity(source) for number, source in enumerate(corners.sources, start=1)}

    def of_model(self, number: int) -> PointJob:
        """One of the models, as it is."""
        name = f"m{number + 1}"
        coefficients = [float(name == other) for other in self.weights]
        return self._job(f"models/{name}.json", {"weights": {name: self.weights[name]}}, coefficients)

    def of_place(self, x: float, y: float) -> PointJob:
        """One point of the plane; one that falls on m1 or m2 is that model, and is not measured again."""
        coefficients = self.corners.plane.coefficients(x, y)
        if (x, y) in self.corners.plane.coordinates[:2]:
            return self.of_model(coefficients.index(1.0))
        # As text: the last digits of a sum differ from machine to machine, and the point is the same.
        place = {"x": f"{x:.9g}", "y": f"{y:.9g}"}
        path = f"points/{place['x']}_{place['y']}.json"
        return self._job(path, {"weights": self.weights, **place}, coefficients)

    def _job(self, path: str, settings: dict[str, Any], coefficients: Sequence[float]) -> PointJob:
        def measure() -> Score:
            self.corners.place.mix(list(zip(self.corners.sources, coefficients, strict=True)))
            return measured(self.score_fn, self.corners.place.model)

        return PointJob(path, {**settings, "measure": self.about}, measure)


def _measured_models(jobs: _Points, runner: Runner[Score], measure: str) -> tuple[PlacedModel, ...]:
    """Measure the models; what is to be drawn must be among what comes out."""
    corners = jobs.corners
    scores = runner.results(
        [jobs.of_model(number) for number in range(len(corners.names))], "Measuring models", "model"
    )
    if measure not in scores[0].names():
        raise ConfigError(f"{measure!r} was not measured; there are {', '.join(scores[0].names()) or 'no figures'}.")
    rows = zip(corners.names, corners.plane.coordinates, corners.plane.beside, scores, strict=True)
    return tuple(PlacedModel(name, x, y, beside, score) for name, (x, y), beside, score in rows)


def _grid_lines(plane: Plane, grid: Sequence[int], margin: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Coordinates of the grid's lines along both axes."""
    xs, ys = zip(*plane.coordinates, strict=True)
    along = _lines(min(xs), max(xs), grid[0], margin)
    return along, _lines(min(ys), max(ys), grid[1], margin) if plane.height else (0.0,)


def _lines(low: float, high: float, count: int, margin: float) -> tuple[float, ...]:
    """Evenly spaced numbers; those that fall on `low` or `high` are exactly that."""
    shares = [-margin + (1 + 2 * margin) * number / (count - 1) for number in range(count)]
    return tuple((1 - share) * low + share * high for share in shares)


def _basins(
    models: Sequence[PlacedModel], points: Sequence[GridPoint], measure: str, radius: float
) -> tuple[Basin, ...]:
    """A neighbourhood for every model; only a rate has one."""
    if measure not in models[0].score.rates:
        return ()
    return tuple(find_basin(model, points, measure, radius) for model in models)


def _far_models(models: Sequence[PlacedModel]) -> list[str]:
    return [
        f"{model.name} lies {model.beside:.3g} beside the plane, {model.distance:.3g} from "
        f"{models[0].name}: it is marked at its projection, whose figures are not the model's own."
        for model in models
        if model.is_beside
    ]


def _basin_warnings(measure: str, basins: Sequence[Basin]) -> list[str]:
    if not basins:
        return [f"{measure} is no rate, so there is no basin of it."]
    return [
        f"No point of the grid lies within {basin.radius:.3g} of {basin.center}: take a larger radius or a finer grid."
        for basin in basins
        if not basin.n_points
    ]


def check_settings(
    models: Sequence[ModelLike],
    grid: Sequence[int],
    margin: float,
    radius: float | None,
    revisions: Sequence[str | None] | None,
) -> None:
    """Refuse what cannot be meant, all of it at once.

    Args:
        models: The models.
        grid: Lines along both axes.
        margin: Reach beyond the models.
        radius: Half the side of a neighbourhood, or None.
        revisions: Revisions of the models, or None.

    Raises:
        ConfigError: If a setting is out of range.
    """
    problems = []
    if len(models) not in (2, 4):
        problems.append(f"{len(models)} models are named, expected 2 (a line) or 4 (m1, m2, m3, m4: a plane)")
    used = grid[:1] if len(models) == 2 else grid
    if len(grid) != 2 or not all(isinstance(count, int) for count in grid) or min(used) < 2:
        problems.append(f"grid is {tuple(grid)}, expected two whole numbers from 2")
    if not (math.isfinite(margin) and margin >= 0):
        problems.append(f"margin is {margin}, expected a number from 0")
    if radius is not None and not (math.isfinite(radius) and radius > 0):
        problems.append(f"radius is {radius}, expected a number above 0")
    if revisions is not None and len(revisions) != len(models):
        problems.append(f"{len(revisions)} revisions are named for {len(models)} models, expected one each")
    if problems:
        raise ConfigError(f"The landscape cannot be drawn: {listing(problems)}")
