"""Whether runs can be compared at all: the aligned model beside every other, on the same prompts, each run once."""

from collections import Counter
from collections.abc import Iterator, Sequence

from lox_hf.errors import ConfigError, listing
from lox_hf.records import CellResult
from lox_hf.robustness.findings.learning_rates import ALIGNED


def check_comparable(cells: Sequence[CellResult]) -> None:
    """Refuse runs that cannot be compared; everything that is wrong is said at once.

    Args:
        cells: All runs of a stress test.

    Raises:
        ConfigError: If there are none, one comes twice, the aligned model lacks a seed that another model has, or
            prompts differ within a seed.
    """
    if not cells:
        raise ConfigError("There are no runs to sum up: run one cell of the stress test at least.")
    groups: dict[tuple[str, int], list[CellResult]] = {}
    for cell in cells:
        groups.setdefault((cell.attack, cell.seed), []).append(cell)
    problems = [
        f"under '{attack}' with seed {seed} {problem}"
        for (attack, seed), group in sorted(groups.items())
        for problem in _problems(group)
    ]
    if problems:
        raise ConfigError(f"The runs cannot be compared: {listing(problems)} Run what is missing, or start afresh.")


def _problems(cells: Sequence[CellResult]) -> Iterator[str]:
    """What is wrong with the runs under one attack with one seed."""
    counts = Counter((cell.model, cell.learning_rate) for cell in cells)
    yield from (f"'{model}' at {rate} comes {count} times" for (model, rate), count in counts.items() if count > 1)
    if all(cell.model != ALIGNED for cell in cells):
        yield f"the model '{ALIGNED}' has no run"
    readings = [reading for cell in cells for reading in cell.readings]
    prompts = {reading.asr.n + reading.asr.unscored for reading in readings}
    if len(prompts) > 1:
        yield f"models have {sorted(prompts)} harmful prompts"
    # Letters of harmless prompts among them would make answers to those count as successes.
    letters = {len(reading.labels) for reading in readings} - {0}
    if not letters <= prompts:
        yield f"there are {sorted(letters)} letters for {sorted(prompts)} harmful prompts"
