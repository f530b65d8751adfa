"""The pairs of several seeds, trained side by side in processes of one thread each."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import wait
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

from lox_hf.demo.pair import is_trained, trained_pair
from lox_hf.demo.training import Recipe
from lox_hf.progress import progress_bar
from lox_hf.workers import Workers, result_of

POLL_S = 0.5
_done: "Synchronized[int] | None" = None  # steps that all processes have taken; set in each of them


def train_pairs(
    seeds: Sequence[int],
    directory: str | Path,
    recipe: Recipe | None = None,
    *,
    workers: int = 1,
    progressbar: bool | None = None,
) -> None:
    """Train the pairs of several seeds; those that are there are left.

    Args:
        seeds: The seeds.
        directory: Where the pairs are kept; each is in its folder `seed-N`.
        recipe: Steps and learning rates; None takes the defaults.
        workers: Processes side by side.
        progressbar: Show a progress bar; None shows it on a terminal only.

    Raises:
        OutputError: If the folder of a seed holds something else, or cannot be written.
        LoxError: If a process ends by itself.
    """
    recipe = recipe or Recipe()
    missing = [seed for seed in seeds if not is_trained(seed, directory, recipe)]
    if not missing:
        return
    done = multiprocessing.get_context("spawn").Value("l", 0)
    steps = len(missing) * (recipe.base_steps + recipe.alignment_steps)
    with (
        Workers(workers, _begin, done) as pool,
        progress_bar(steps, progressbar, f"Training {len(missing)} pairs", unit="step") as advance,
    ):
        futures = [pool.submit(_train, seed, directory, recipe) for seed in missing]
        shown, running = 0, set(futures)
        while running:
            _, running = wait(running, POLL_S)
            now = done.value
            advance(now - shown)
            shown = now
        for future in futures:
            result_of(future)


def _begin(done: "Synchronized[int]") -> None:
    global _done
    _done = done


def _train(seed: int, directory: str | Path, recipe: Recipe) -> None:
    trained_pair(seed, directory, recipe, _advance)


def _advance(label: str, done: int, total: int) -> None:
    if _done is not None:
        with _done.get_lock():
            _done.value += 1
