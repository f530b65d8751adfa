"""Where training rows lie: a file on this machine, or the files of a data set on the Hub."""

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from lox_hf.errors import CheckpointError, PromptError, listing

KINDS = tuple(kind + gz for kind in (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".ndjson") for gz in ("", ".gz"))
TRAINING_FILES = tuple(f"*train*{kind}" for kind in KINDS)
ANY_FILES = tuple(f"*{kind}" for kind in KINDS)
NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
_ON_HUB = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:/(?P<files>.+))?")
_SHARD = re.compile(r"-\d+-of-\d+[^.]*|\d+")


def find_data_files(
    name_or_path: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> list[Path]:
    """Find the files of a data set; those on the Hub are downloaded into its cache where they are not there.

    On the Hub "org/name" takes the files with "train" in their path, or all where none has it, if they are shards of
    one set; "org/name/FILES" takes those that match, such as "openai/gsm8k/main/train*.parquet".

    Args:
        name_or_path: A file, or a data set on the Hub. A `Path` is never on the Hub.
        revision: Revision on the Hub.
        token: Hub token; None uses the stored login.

    Returns:
        Paths on this machine, sorted by name. Whether a local one exists is for its reader to say.

    Raises:
        PromptError: If the Hub does not give the files, there are none, or more than one set could be meant.

    Example:
        >>> [path.name for path in find_data_files(Path("folder/rows.jsonl"))]
        ['rows.jsonl']
    """
    path = Path(name_or_path).expanduser()
    on_hub = _ON_HUB.fullmatch(name_or_path) if isinstance(name_or_path, str) else None
    if on_hub is None or path.exists() or (not on_hub["files"] and path.name.endswith(KINDS)):
        return [path]
    repository, pattern = on_hub["id"], on_hub["files"]
    if pattern:
        found = _download(repository, [pattern], revision, token)
    else:
        found = _download(repository, TRAINING_FILES, revision, token)
        found = found or _download(repository, ANY_FILES, revision, token)
        _must_be_one_set(repository, list(found))
    if not found:
        raise PromptError(
            f"The data set '{repository}' holds no file {pattern or 'that ends in ' + ', '.join(KINDS[::2])}. "
            f"Name its files as '{repository}/FOLDER/FILES*.parquet', or pass the path of a file of your own."
        )
    return [found[name] for name in sorted(found)]


def _download(
    repository: str, patterns: Sequence[str], revision: str | None, token: str | bool | None
) -> dict[str, Path]:
    """Files that match one of the patterns, by their path in the repository."""
    from lox_hf.hub_files import resolve

    try:
        folder = resolve(repository, revision=revision, token=token, files=list(patterns), repo_type="dataset").folder
    except CheckpointError as error:
        raise PromptError(
            f"Cannot load the data set '{repository}': {error} A file of your own works as well: pass its path."
        ) from error
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: path
        for name, path in names.items()
        if path.name not in NO_DATA and any(fnmatch(name, pattern) for pattern in patterns)
    }


def _must_be_one_set(repository: str, names: Sequence[str]) -> None:
    sets = sorted({_SHARD.sub("*", name) for name in names})
    if len(sets) > 1:
        raise PromptError(
            f"The data set '{repository}' holds {len(sets)} sets of rows that could be meant: {listing(sets, 8)} "
            f"Name one, as '{repository}/{sets[0]}'."
        )
