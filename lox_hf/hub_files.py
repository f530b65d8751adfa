"""Files of a folder or a Hub repository, and uploads; the Hub's errors in our words."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lox_hf.errors import CheckpointError, ConfigError
from lox_hf.records import ModelReference

RepoType = Literal["model", "dataset"]

CHECKPOINT_FILES = [
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "*.py",
    "*.md",
    "LICENSE*",
    "NOTICE*",
]
BASE_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "README.md", "*.bin.index.json"]
OTHER_WEIGHTS = ["original/*", "onnx/*", "openvino/*", "*/consolidated*", "consolidated*", "metal/*", "gguf/*"]


@dataclass(frozen=True)
class Resolved:
    """A model's folder on this machine and what it was called.

    Attributes:
        folder: Folder with the files.
        reference: Name and commit.
    """

    folder: Path
    reference: ModelReference


def resolve(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    files: list[str] = CHECKPOINT_FILES,
    repo_type: RepoType = "model",
) -> Resolved:
    """Find a model's files: a local folder as it is, a Hub repository by download into the Hub's cache.

    Args:
        name_or_path: Folder or Hub id.
        revision: Revision on the Hub.
        token: Hub token; None uses the stored login.
        files: Patterns of the files to download.
        repo_type: What the Hub id is the id of.

    Returns:
        The folder and the reference.

    Raises:
        CheckpointError: If there is no such folder and no such repository, or it cannot be reached.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return Resolved(folder, ModelReference(str(name_or_path)))
    if folder.is_file():
        raise CheckpointError(f"'{name_or_path}' is a file; pass the folder that holds the checkpoint.")
    _must_be_hub_id(name_or_path)
    check_token(token)
    with hub_errors(str(name_or_path), revision, repo_type=repo_type):
        return _download(str(name_or_path), revision, token, files, repo_type)


def _download(
    repo_id: str, revision: str | None, token: str | bool | None, files: list[str], repo_type: RepoType = "model"
) -> Resolved:
    import huggingface_hub

    path = huggingface_hub.snapshot_download(
        repo_id,
        repo_type=repo_type,
        revision=revision,
        token=token,
        allow_patterns=files,
        ignore_patterns=OTHER_WEIGHTS,
    )
    return Resolved(Path(path), ModelReference(repo_id, Path(path).name))


def is_offline() -> bool:
    """Whether the Hub's client has been told to stay offline (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def find_repository(
    repo_id: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    files: list[str] = CHECKPOINT_FILES,
) -> tuple[Resolved, frozenset[str]]:
    """Pin a model on the Hub to its commit, and download what is not weights.

    Args:
        repo_id: Hub id.
        revision: Revision on the Hub.
        token: Hub token; None uses the stored login.
        files: Patterns of the files that are wanted; safetensors files among them are not downloaded.

    Returns:
        The folder of small files with the reference, and the names of all files of that commit.

    Raises:
        CheckpointError: If there is no such repository or revision, or the Hub cannot be reached.
    """
    _must_be_hub_id(repo_id)
    check_token(token)
    import huggingface_hub

    with hub_errors(str(repo_id), revision):
        found = huggingface_hub.HfApi(token=token).model_info(str(repo_id), revision=revision)
        names = frozenset(sibling.rfilename for sibling in found.siblings or [])
        small = [pattern for pattern in files if pattern != "*.safetensors"]
        return _download(str(repo_id), found.sha, token, small), names


def fetch_file(
    name_or_path: str | Path, file_name: str, *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """Return the path of one file of a folder or a Hub repository.

    Args:
        name_or_path: Folder or Hub id.
        file_name: Name of the file.
        revision: Revision on the Hub.
        token: Hub token; None uses the stored login.

    Returns:
        Path on this machine.

    Raises:
        CheckpointError: If there is no such folder, repository or file.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        path = folder / file_name
        if not path.is_file():
            raise CheckpointError(
                f"'{name_or_path}' has no {file_name}; it holds {sorted(p.name for p in folder.iterdir())}."
            )
        return path
    _must_be_hub_id(name_or_path)
    check_token(token)
    import huggingface_hub

    with hub_errors(str(name_or_path), revision, file_name):
        return Path(huggingface_hub.hf_hub_download(str(name_or_path), file_name, revision=revision, token=token))


def push_folder(
    folder: str | Path, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, message: str
) -> str:
    """Upload a folder to a Hub model repository, which is made if needed, in one commit.

    Args:
        folder: Folder to upload.
        repo_id: Hub id.
        private: Whether a new repository is private.
        token: Hub token; None uses the stored login.
        message: Message of the commit.

    Returns:
        URL of the commit.

    Raises:
        CheckpointError: If the Hub refuses or cannot be reached.
    """
    import huggingface_hub

    check_token(token)
    with upload_errors(repo_id):
        api = huggingface_hub.HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=str(folder), repo_id=repo_id, commit_message=message).commit_url)


@contextmanager
def upload_errors(repo_id: str) -> Iterator[None]:
    """Turn the Hub client's errors in an upload into `CheckpointError` with a remedy."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise CheckpointError(f"'{repo_id}' is not a Hub id such as 'org/model'.") from error
    # RuntimeError is the client's own for a file that fails, ValueError for a card that the Hub does not take.
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"Cannot upload to '{repo_id}': {_reason(error)} {_remedy(error)}") from error


@contextmanager
def hub_errors(
    name: str, revision: str | None, file_name: str | None = None, repo_type: RepoType = "model"
) -> Iterator[None]:
    """Turn the Hub client's errors in a download into `CheckpointError` with a remedy."""
    from huggingface_hub import errors

    at = f"'{name}'" + (f" at revision '{revision}'" if revision else "")
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{at} is gated: ask for access on its Hub page, then log in with `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"'{name}' has no revision '{revision or 'main'}': pass a branch, a tag or a whole commit hash of it."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{at} is neither a folder on this machine nor a {repo_type} on the Hub; for a private one run "
            "`hf auth login`."
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise CheckpointError(
            f"{at} has no {file_name or 'such file'} on the Hub: is it the repository meant?"
        ) from error
    # The client's own HTTPError is the base of its transport errors too, which are no OSError.
    except (errors.EntryNotFoundError, errors.HTTPError, OSError) as error:
        raise CheckpointError(
            f"{at} is not a folder on this machine, it is not complete in the Hub's cache, and the Hub cannot be "
            f"reached: {_reason(error)} Check the connection, HF_ENDPOINT and HF_HUB_OFFLINE, or pass a folder."
        ) from error


def _reason(error: BaseException) -> str:
    """What went wrong at the root, as one sentence in one line: the Hub's own words, or else the client's."""
    from huggingface_hub.errors import HfHubHTTPError

    error = _root(error)
    text = str(error)
    if isinstance(error, HfHubHTTPError) and error.server_message:
        text = f"HTTP {error.response.status_code}, {error.server_message}"
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1", text)  # what follows may be a signature
    return " ".join(text.split()).rstrip(".") + "."


def _remedy(error: BaseException) -> str:
    """What to do after an upload that failed."""
    from huggingface_hub.errors import HfHubHTTPError

    root = _root(error)
    status = root.response.status_code if isinstance(root, HfHubHTTPError) else 0
    if status in (409, 412):
        return "The repository was changed meanwhile, and nothing of this was published: push again."
    if status == 429 or status >= 500:
        return "Nothing was published. Wait a while and push again: large files that arrived are not sent again."
    if status == 0 and not isinstance(root, ValueError):
        return (
            "Check that the Hub is in reach and that the token may write there (`hf auth login`, `hf auth whoami`), "
            "and push again: large files that arrived are not sent again."
        )
    if status in (0, 400):
        return "Nothing was published."
    return (
        "Check that the repository's name is right and that the token may write there (`hf auth login`, `hf auth "
        "whoami`)."
    )


def _root(error: BaseException) -> BaseException:
    """What a chain of errors began with: the Hub's answer, or what the machine said."""
    from huggingface_hub.errors import HfHubHTTPError

    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return error


def check_token(token: str | bool | None) -> None:
    """Refuse what no header can carry, of the stored login too: the client's own error would quote it."""
    import huggingface_hub

    if token is None or token is True:
        token = huggingface_hub.get_token()
    if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):
        raise ConfigError("The Hub token holds a space, a line break or a letter that no token has: pass it without.")


def _must_be_hub_id(name_or_path: str | Path) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    text = str(name_or_path)
    if text.startswith((".", "/", "~")) or isinstance(name_or_path, Path):
        raise CheckpointError(f"There is no folder '{text}'.")
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise CheckpointError(
            f"'{text}' is neither a folder on this machine nor a Hub id such as 'org/model'."
        ) from error
