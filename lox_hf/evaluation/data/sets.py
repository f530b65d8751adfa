"""Prompt sets on the Hub: which there are, and how their files get here."""

from dataclasses import dataclass
from pathlib import Path

from lox_hf.errors import CheckpointError, PromptError
from lox_hf.evaluation.data.tables import fold


@dataclass(frozen=True)
class PromptSet:
    """A prompt set on the Hub.

    Attributes:
        name: What it is called; case, dashes and underscores do not matter.
        repository: Hub id of the data set.
        files: Pattern of the files that hold the prompts.
        gated: Whether access must be asked for on its Hub page.
        licence: Its licence, as the Hub names it.
    """

    name: str
    repository: str
    files: str
    gated: bool
    licence: str


PROMPT_SETS = (
    PromptSet("AdvBench", "walledai/AdvBench", "data/*.parquet", True, "mit"),
    PromptSet("JailbreakBench", "JailbreakBench/JBB-Behaviors", "data/harmful-behaviors*.csv", False, "mit"),
    PromptSet("HarmBench", "walledai/HarmBench", "standard/*.parquet", True, "mit"),
    PromptSet("StrongREJECT", "walledai/StrongREJECT", "data/*.parquet", True, "mit"),
    PromptSet("XSTest", "Paul/XSTest", "xstest*prompts*.csv", False, "cc-by-4.0"),
)


def find_prompt_set(name: str) -> PromptSet | None:
    """Return the prompt set of a name.

    Args:
        name: Its name in any spelling.

    Returns:
        The set; None where none is called so.

    Example:
        >>> find_prompt_set("strong-reject").repository
        'walledai/StrongREJECT'
    """
    return next((known for known in PROMPT_SETS if fold(known.name) == fold(name)), None)


def download_prompts(
    prompt_set: PromptSet, *, revision: str | None = None, token: str | bool | None = None
) -> list[Path]:
    """Return the files of a prompt set, downloaded into the Hub's cache where they are not there.

    Args:
        prompt_set: The set.
        revision: Revision on the Hub.
        token: Hub token; None uses the stored login.

    Returns:
        Paths on this machine, sorted by name.

    Raises:
        PromptError: If the files cannot be had.
    """
    from lox_hf.hub_files import resolve

    try:
        found = resolve(
            prompt_set.repository, revision=revision, token=token, files=[prompt_set.files], repo_type="dataset"
        )
    except CheckpointError as error:
        raise PromptError(
            f"Cannot load the prompt set {prompt_set.name}: {error} A file of your own works as well: pass its path."
        ) from error
    paths = sorted(found.folder.glob(prompt_set.files))
    if not paths:
        raise PromptError(
            f"Cannot load the prompt set {prompt_set.name}: '{prompt_set.repository}' holds no file "
            f"{prompt_set.files}. Pass another revision, or the path of a file of your own."
        )
    return paths
