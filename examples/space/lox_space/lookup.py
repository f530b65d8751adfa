"""What a repository on the Hub holds, before any weight of it is downloaded: its commit, its size, its headers."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from lox_hf.errors import CheckpointError
from lox_hf.hub_files import BASE_FILES, CHECKPOINT_FILES, OTHER_WEIGHTS, hub_errors
from lox_hf.weights.source import ADAPTER_CONFIG, INDEX_NAME, WEIGHTS_NAME
from lox_space.form import Model

SIDE_FILES = ("config.json", "README.md", INDEX_NAME, ADAPTER_CONFIG)
FILES = {"aligned": CHECKPOINT_FILES, "base": BASE_FILES}


@dataclass(frozen=True)
class Found:
    """A model that was looked up.

    Attributes:
        name: Hub id or folder.
        revision: Its commit; None for a folder.
        sizes: Bytes of every file that hardening reads.
    """

    name: str
    revision: str | None
    sizes: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(self.sizes.values())

    @property
    def download_bytes(self) -> int:
        """Bytes that are not on this machine yet."""
        return 0 if self.revision is None else self.total_bytes


def look_up(model: Model, role: str, max_bytes: int) -> Found:
    """Find a model's commit and the sizes of its files, and refuse what is too large; nothing is downloaded.

    The Hub is asked without any login, not even this machine's: the page is for models that everybody may read.

    Args:
        model: The model.
        role: "aligned" or "base".
        max_bytes: The largest that is taken.

    Returns:
        What was found.

    Raises:
        CheckpointError: If there is no such public model, it is too large, or it is no whole checkpoint.
    """
    found = _folder(model) if model.is_folder else _repository(model, FILES[role])
    if found.total_bytes > max_bytes:
        raise CheckpointError(
            f"'{model.name}' has {found.total_bytes / 1e9:.3g} GB to read, and this page takes models up to "
            f"{max_bytes / 1e9:.3g} GB. On your own machine there is no such limit: pip install lox-hf, then "
            "lox-hf harden."
        )
    if ADAPTER_CONFIG in found.sizes and not {WEIGHTS_NAME, INDEX_NAME} & found.sizes.keys():
        raise CheckpointError(
            f"'{model.name}' is a LoRA adapter, and this page hardens whole checkpoints. On your own machine: "
            "lox-hf harden takes adapters."
        )
    return found


def sketch(found: Found, folder: Path) -> None:
    """Lay a model out as its plan needs it: small files, and files that are nothing but the headers of its weights.

    The rest of each file is a hole that takes no disk.

    Args:
        found: The model on the Hub.
        folder: Folder to make.

    Raises:
        CheckpointError: If it has no safetensors files, or a header says what cannot be.
    """
    folder.mkdir(parents=True)
    api = huggingface_hub.HfApi(token=False)
    with hub_errors(found.name, found.revision):
        try:
            for name in SIDE_FILES:
                if name in found.sizes:
                    path = api.hf_hub_download(found.name, name, revision=found.revision)
                    shutil.copyfile(path, folder / name)
            files = api.get_safetensors_metadata(found.name, revision=found.revision).files_metadata
        except errors.GatedRepoError as error:
            raise _not_public(found.name) from error
        except errors.NotASafetensorsRepoError as error:
            raise CheckpointError(
                f"'{found.name}' has no safetensors weights, and no others are read: they can run code."
            ) from error
        except errors.SafetensorsParsingError as error:
            raise CheckpointError(f"'{found.name}' has a safetensors file that cannot be read.") from error
    for name, metadata in files.items():
        if name not in found.sizes or Path(name).name != name:
            raise CheckpointError(f"The index of '{found.name}' names '{name}', which is none of its files.")
        tensors = {
            key: {"dtype": str(info.dtype), "shape": info.shape, "data_offsets": info.data_offsets}
            for key, info in metadata.tensors.items()
        }
        length = max((info.data_offsets[1] for info in metadata.tensors.values()), default=0)
        if length > found.sizes[name]:
            raise CheckpointError(f"'{name}' of '{found.name}' is shorter than its header says.")
        header = json.dumps(tensors).encode()
        with (folder / name).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + length)


def _folder(model: Model) -> Found:
    paths = [path for path in Path(model.name).iterdir() if path.is_file()]
    return Found(model.name, None, {path.name: path.stat().st_size for path in paths})


def _repository(model: Model, patterns: list[str]) -> Found:
    api = huggingface_hub.HfApi(token=False)
    with hub_errors(model.name, model.revision):
        try:
            about = api.model_info(model.name, revision=model.revision)
        except errors.RevisionNotFoundError:
            raise
        except (errors.RepositoryNotFoundError, errors.GatedRepoError) as error:
            raise _not_public(model.name) from error
        if about.gated or about.sha is None:
            raise _not_public(model.name)
        tree = api.list_repo_tree(model.name, revision=about.sha, recursive=True)
        files = [entry for entry in tree if isinstance(entry, huggingface_hub.RepoFile)]
    wanted = filter_repo_objects(
        files, allow_patterns=patterns, ignore_patterns=OTHER_WEIGHTS, key=lambda entry: entry.path
    )
    return Found(model.name, about.sha, {entry.path: entry.size for entry in wanted})


def _not_public(name: str) -> CheckpointError:
    return CheckpointError(f"'{name}' is no public model on the Hub: this page reads neither private nor gated ones.")
