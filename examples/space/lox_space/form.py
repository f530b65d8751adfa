"""What is typed into the page, checked before anything is looked up."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from lox_hf.errors import ConfigError

MOST_LETTERS = 300
NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)
REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w./-]*", re.ASCII)


@dataclass(frozen=True)
class Model:
    """A model as it is named.

    Attributes:
        name: Hub id, or the absolute path of a folder.
        revision: Branch, tag or commit; None for the newest, and for folders.
    """

    name: str
    revision: str | None = None

    @property
    def is_folder(self) -> bool:
        """Whether it lies on this machine."""
        return self.name.startswith("/")


@dataclass(frozen=True)
class Order:
    """What is to be hardened, and how.

    Attributes:
        aligned: The aligned model.
        base: The model before alignment.
        r: Directions a matrix.
        alpha: Strength.
    """

    aligned: Model
    base: Model
    r: int
    alpha: float


def read_order(
    aligned: str,
    aligned_revision: str,
    base: str,
    base_revision: str,
    r: float | None,
    alpha: float | None,
    *,
    allow_folders: bool,
) -> Order:
    """Check the fields of the page.

    Args:
        aligned: Name of the aligned model.
        aligned_revision: Its revision, or nothing.
        base: Name of the base.
        base_revision: Its revision, or nothing.
        r: Directions a matrix.
        alpha: Strength.
        allow_folders: Whether folders of this machine are read.

    Returns:
        The order.

    Raises:
        ConfigError: If a field does not hold what it should.
    """
    if r is None or not math.isfinite(r) or r != int(r) or r < 1:
        raise ConfigError("The number of directions is a whole number from 1, such as 6.")
    if alpha is None or not math.isfinite(alpha) or alpha <= 0:
        raise ConfigError("The strength is a number above 0, such as 1.25.")
    return Order(
        _read_model("aligned model", aligned, aligned_revision, allow_folders),
        _read_model("base model", base, base_revision, allow_folders),
        int(r),
        float(alpha),
    )


def read_repo_id(text: str) -> str:
    """Check the name of a repository that is to be made.

    Raises:
        ConfigError: If it is no name with its owner.
    """
    name = (text or "").strip()
    if name.count("/") != 1 or not _is_hub_id(name):
        raise ConfigError("Name the repository to push to with its owner, such as your-name/model-lox.")
    return name


def _read_model(role: str, name: str, revision: str, allow_folders: bool) -> Model:
    name, revision = (name or "").strip(), (revision or "").strip()
    if not name:
        raise ConfigError(f"Name the {role}, such as org/model.")
    if len(name) > MOST_LETTERS or len(revision) > MOST_LETTERS:
        raise ConfigError(f"The name or the revision of the {role} is too long.")
    if allow_folders:
        folder = Path(name).expanduser().absolute()
        if folder.is_dir():
            return Model(str(folder))
    if not _is_hub_id(name):
        raise ConfigError(
            f"'{name}' is not the id of a model on the Hub, such as org/model"
            + (", and not a folder on this machine." if allow_folders else ".")
        )
    if revision and not REVISION.fullmatch(revision):
        raise ConfigError(f"'{revision}' is not a branch, a tag or a commit of the {role}.")
    return Model(name, revision or None)


def _is_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) <= 2 and all(NAME.fullmatch(part) for part in parts) and not name.endswith(".git")
