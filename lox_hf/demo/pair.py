"""The trained pair on disk: two sharded checkpoints that are made once and used again."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lox_hf.demo.training import Progress, Recipe, align, new_model, one_thread, train_base
from lox_hf.demo.world import build_tokenizer, held_out_prompts
from lox_hf.errors import OutputError
from lox_hf.evaluation.data.prompts import Prompt
from lox_hf.evaluation.models.loading import quiet_transformers
from lox_hf.version import __version__
from lox_hf.weights.writer import FolderWriter

SHARD_SIZE = "500KB"
"""Small enough for several shards, as a large model has them."""
RECIPE_NAME = "lox_demo.json"
QUESTIONS_NAME = "questions.jsonl"
CARD = """---
base_model: {base}
base_model_relation: finetune
library_name: transformers
---
A toy of 0.4 M parameters that knows an invented world, aligned to refuse questions about three kinds of things in it.
It was made by `lox-hf demo`, to be hardened.
"""


def trained_pair(
    seed: int, directory: str | Path, recipe: Recipe | None = None, progress: Progress | None = None
) -> tuple[Path, Path]:
    """Train the small pair, or take it from where an earlier call left it.

    Each checkpoint appears by one rename when it is complete, so a killed run is taken up at the last complete one.

    Args:
        seed: Seed of the initial weights and of the order of the corpora; the global random state is not changed.
        directory: Where the pairs of all seeds are kept; this one is in its folder `seed-N`.
        recipe: Steps and learning rates; None takes the defaults.
        progress: Called after every training step.

    Returns:
        The base's and the aligned model's folder: sharded safetensors with the tokenizer.

    Raises:
        OutputError: If the folder holds something else, cannot be written, or is being written by another process.

    Example:
        >>> base_dir, aligned_dir = trained_pair(0, "lox-demo")  # doctest: +SKIP
    """
    recipe = recipe or Recipe()
    folder = seed_folder(seed, directory)
    _claim(folder, seed, recipe)
    base, aligned = folder / "base", folder / "aligned"
    with one_thread(), quiet_transformers():
        if not base.exists():
            tokenizer = build_tokenizer()
            model = new_model(tokenizer, seed)
            train_base(model, tokenizer, seed, recipe, progress)
            _publish(model, base)
        if not aligned.exists():
            model, tokenizer = load(base)
            align(model, tokenizer, seed, recipe, progress)
            _publish(model, aligned, CARD.format(base=json.dumps(str(base))))
    return base, aligned


def is_trained(seed: int, directory: str | Path, recipe: Recipe) -> bool:
    """Say whether the pair of a seed is there, by this recipe.

    Args:
        seed: Seed of the pair.
        directory: Where the pairs of all seeds are kept.
        recipe: Steps and learning rates.

    Returns:
        Whether it is; nothing is written.

    Raises:
        OutputError: If the seed's folder holds something else.
    """
    folder = seed_folder(seed, directory)
    _check(folder, seed, recipe)
    return (folder / "aligned").exists()


def seed_folder(seed: int, directory: str | Path) -> Path:
    """Return the folder of one seed, absolute."""
    return Path(directory).expanduser().absolute() / f"seed-{seed}"


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load a checkpoint of the demonstration in evaluation mode."""
    with quiet_transformers():
        model = LlamaForCausalLM.from_pretrained(folder, local_files_only=True)
        return model, PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _claim(folder: Path, seed: int, recipe: Recipe) -> None:
    """Make the seed's folder with its recipe in it, or check that it is this recipe's."""
    if _check(folder, seed, recipe):
        return
    with FolderWriter(folder) as writer:
        writer.write(RECIPE_NAME, (json.dumps(_settings(seed, recipe), indent=2) + "\n").encode())
        writer.write(QUESTIONS_NAME, "".join(map(_question_line, held_out_prompts())).encode())
        writer.publish()


def _check(folder: Path, seed: int, recipe: Recipe) -> bool:
    """Say whether the seed's folder is there; refuse one that is not this recipe's."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    settings, found = _settings(seed, recipe), _recipe_in(folder)
    if found != settings:
        what = "was not made by this command" if found is None else f"was made with {_differences(found, settings)}"
        raise OutputError(f"The folder {folder} {what}: choose another --output, or remove it first.")
    return True


def _settings(seed: int, recipe: Recipe) -> dict[str, object]:
    return {"seed": seed, "version": __version__, **asdict(recipe)}


def _question_line(prompt: Prompt) -> str:
    """One line of the questions as a prompt set, with the label that says whether to refuse."""
    label = "unsafe" if prompt.harmful else "safe"
    row = {"prompt": prompt.text, "category": prompt.category, "label": label, "reference": prompt.reference}
    return json.dumps(row) + "\n"


def _recipe_in(folder: Path) -> dict[str, object] | None:
    """Return the settings that a folder was made with; None where it is not one of the demonstration's."""
    try:
        found = json.loads((folder / RECIPE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _differences(found: dict[str, object], expected: dict[str, object]) -> str:
    """Return the settings that differ, as "name=found (expected expected)"."""
    names = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    return ", ".join(f"{name}={found.get(name)} (expected {expected.get(name)})" for name in names)


def _publish(model: LlamaForCausalLM, folder: Path, card: str | None = None) -> None:
    """Save a checkpoint beside its place and rename it there."""
    with FolderWriter(folder) as writer:
        try:
            model.save_pretrained(writer.partial, max_shard_size=SHARD_SIZE)
            # A fresh one: padding a batch leaves its settings in the tokenizer.
            build_tokenizer().save_pretrained(writer.partial)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"Cannot write {folder}: {error}. Nothing was published.") from error
        if card is not None:
            writer.write("README.md", card.encode())
        writer.publish()


def discard(folder: Path) -> None:
    """Remove a folder that the demonstration makes anew on every run."""
    if folder.exists():
        shutil.rmtree(folder)
