"""`LoxConfig`: which weights LoX edits, how far, and against which base; in PEFT's words."""

import json
import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, Self

from lox_hf.errors import CheckpointError, ConfigError

CONFIG_NAME = "lox_config.json"
ALL_LINEAR = "all-linear"
REGEX_SIGNS = re.compile(r"[\\^$*+?{}\[\]|()]")
"""A word with one of these is a regular expression; without them, the name of a module."""


@dataclass
class LoxConfig:
    """Settings of Low-Rank Extrapolation, W_hardened = W_aligned + alpha * Proj_k(W_aligned - W_base) (section 3).

    The defaults of `r` and `alpha` are the paper's main setting for LLaMA-2-7B (section 4). No setting is safe to ship
    unmeasured: the paper's own ablation is not monotone in either.

    Args:
        base_model_name_or_path: The model before alignment: Hub id or folder.
        revision: Revision of the base on the Hub: branch, tag or commit.
        r: The paper's k. An int is a number of directions, a float in (0, 1] the share of ||dW||_F^2 they must hold
            per tensor, None (on the command line: full, or the reference's 0) the full rank (ExPO).
        alpha: The paper's alpha, the reference's `coef`: how often the directions are added once more.
        target_modules: Which modules, as in PEFT: a list matches whole names or their ends, a string is a regular
            expression for the whole name, "all-linear" every linear layer but the output head. None takes every
            floating tensor with two or more dims, embeddings and head included, as the reference does.
        exclude_modules: Modules to leave alone, in the same forms (not "all-linear").
        layers_to_transform: Layer number or numbers; others, and modules outside the layers, are left alone.
        layers_pattern: Name of the list of layers where it cannot be told from the module's name.
        rank_pattern: Other values of `r` by module name or regular expression.
        alpha_pattern: Other values of `alpha` by module name or regular expression.
        svd: "auto" (certified block Lanczos; exact where that is cheaper) or "exact" (LAPACK).
        svd_tol: Residual at which block Lanczos stops, relative to the directions found.
        seed: Seed of the decomposition's start; no global seed is touched.
        cast_base: Round a base of another floating dtype to the aligned model's before subtracting, as the reference
            does, instead of refusing it.
        allow_negative_alpha: Accept alpha < 0, which takes alignment away.

    Raises:
        ConfigError: If settings are out of range or contradict each other; all of them are listed.

    Example:
        >>> from lox_hf import LoxConfig
        >>> LoxConfig(r=6, alpha=1.25, exclude_modules=["embed_tokens", "lm_head"]).alpha
        1.25

    Source: Perin et al., "LoX: Low-Rank Extrapolation Robustifies LLM Safety Against Fine-tuning", COLM 2025.
    """

    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: int | float | None = 6
    alpha: float = 1.25
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int | float | None] | None = None
    alpha_pattern: dict[str, float] | None = None
    svd: str = "auto"
    svd_tol: float = 1e-4
    seed: int = 0
    cast_base: bool = False
    allow_negative_alpha: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.base_model_name_or_path, Path):
            self.base_model_name_or_path = str(self.base_model_name_or_path)
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, (set, tuple, range)):
                setattr(self, name, sorted(value))
        problems = self._type_problems()
        if not problems:
            problems = [
                *self._rank_problems(),
                *self._alpha_problems(),
                *self._pattern_problems(),
                *self._svd_problems(),
            ]
        if problems:
            raise ConfigError("Invalid LoxConfig: " + "; ".join(problems) + ".")

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as a plain dict."""
        return asdict(self)

    def to_json(self) -> str:
        """Return all settings as JSON, as `lox_config.json` holds them."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build a config from a dict.

        Args:
            data: Settings by name.

        Returns:
            The validated config.

        Raises:
            ConfigError: If a name is unknown or a value is invalid.
        """
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ConfigError(f"Unknown LoxConfig settings {unknown}; known are {sorted(known)}.")
        return cls(**data)

    def save_pretrained(self, save_directory: str | Path) -> Path:
        """Write `lox_config.json` into a folder, which is made if needed, and return the file's path."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / CONFIG_NAME
        path.write_text(self.to_json(), encoding="utf-8")
        return path

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, revision: str | None = None, token: str | bool | None = None
    ) -> Self:
        """Read `lox_config.json` from a folder or a Hub repository.

        Args:
            pretrained_name_or_path: Folder or Hub id.
            revision: Revision on the Hub.
            token: Hub token; None uses the stored login.

        Returns:
            The config.

        Raises:
            CheckpointError: If there is no such file, or it is not a JSON object.
            ConfigError: If its content is not a valid config.
        """
        from lox_hf.hub_files import fetch_file

        path = fetch_file(pretrained_name_or_path, CONFIG_NAME, revision=revision, token=token)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"Cannot read {path}: not JSON ({error}).") from error
        if not isinstance(data, dict):
            raise CheckpointError(f"Cannot read {path}: expected a JSON object, got {type(data).__name__}.")
        return cls.from_dict(data)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Upload `lox_config.json` to a Hub model repository, which is made if needed, as PEFT does with a config.

        A hardened model is published with its card by `lox_hf.push_to_hub`, which makes the repository private.

        Args:
            repo_id: Hub id.
            private: Whether a new repository is private; None leaves that to the Hub's settings of its owner.
            token: Hub token; None uses the stored login.
            commit_message: Message of the commit.

        Returns:
            URL of the commit.
        """
        import tempfile

        from lox_hf.hub_files import push_folder

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(
                folder, repo_id, private=private, token=token, message=commit_message or "Add LoX config"
            )

    def _type_problems(self) -> list[str]:
        """Settings of another kind than the other checks can read, as a file may hold them."""
        problems = []
        if not isinstance(self.base_model_name_or_path, (str, Path, NoneType)):
            kind = type(self.base_model_name_or_path).__name__
            problems.append(
                f"base_model_name_or_path must be a folder or a Hub id, got {kind}; pass a loaded one as base_model"
            )
        for name in ("cast_base", "allow_negative_alpha"):
            if not isinstance(getattr(self, name), bool):
                problems.append(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            if not isinstance(value, (str, NoneType)) and not _is_list_of(value, str):
                problems.append(f"{name} must be a string or a list of strings, got {value!r}")
        layers = self.layers_to_transform
        if not isinstance(layers, (int, NoneType)) and not _is_list_of(layers, int):
            problems.append(f"layers_to_transform must be an int or a list of ints, got {layers!r}")
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, dict) and _is_list_of(list(value), str)):
                problems.append(f"{name} must be a dict by module name, got {value!r}")
        return problems

    def _rank_problems(self) -> list[str]:
        ranks = {"r": self.r, **{f"rank_pattern[{key!r}]": value for key, value in (self.rank_pattern or {}).items()}}
        return [
            f"{name} must be a positive int, a float in (0, 1] (energy share) or None (--r full), got {r!r}"
            for name, r in ranks.items()
            if not _is_rank(r)
        ]

    def _alpha_problems(self) -> list[str]:
        patterns = {f"alpha_pattern[{key!r}]": value for key, value in (self.alpha_pattern or {}).items()}
        problems = []
        for name, value in {"alpha": self.alpha, **patterns}.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                problems.append(f"{name} must be a finite number, got {value!r}")
            elif value < 0 and not self.allow_negative_alpha:
                problems.append(
                    f"{name} = {value} takes alignment away and makes the model less safe; "
                    "pass allow_negative_alpha=True (--allow-negative-alpha) if that is what you study"
                )
        return problems

    def _pattern_problems(self) -> list[str]:
        problems = []
        if self.exclude_modules == ALL_LINEAR:
            problems.append(f"exclude_modules takes names or a regular expression, not {ALL_LINEAR!r}")
        is_regex = isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR
        if is_regex and (self.layers_to_transform is not None or self.layers_pattern is not None):
            problems.append(
                "layers_to_transform and layers_pattern need a list in target_modules, not a regular expression"
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            problems.append("layers_pattern needs layers_to_transform")
        layers = self.layers_pattern if isinstance(self.layers_pattern, list) else [self.layers_pattern]
        patterns = [
            self.target_modules,
            self.exclude_modules,
            *layers,
            *(self.rank_pattern or {}),
            *(self.alpha_pattern or {}),
        ]
        for pattern in patterns:
            if isinstance(pattern, str):
                try:
                    re.compile(pattern)
                except re.error as error:
                    problems.append(f"{pattern!r} is not a regular expression ({error})")
        return problems

    def _svd_problems(self) -> list[str]:
        problems = []
        if self.svd not in ("auto", "exact"):
            problems.append(f"svd must be 'auto' or 'exact', got {self.svd!r}")
        if not isinstance(self.svd_tol, (int, float)) or not 0 < self.svd_tol < 1:
            problems.append(f"svd_tol must lie in (0, 1), got {self.svd_tol!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            problems.append(f"seed must be an int from 0 to 2^63 - 1, got {self.seed!r}")
        return problems


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _is_rank(r: object) -> bool:
    if r is None:
        return True
    if isinstance(r, bool) or not isinstance(r, (int, float)):
        return False
    return r >= 1 if isinstance(r, int) else 0 < r <= 1
