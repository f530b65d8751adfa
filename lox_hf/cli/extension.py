"""`hf-lox`: the same commands below the Hub's own command line, as `hf lox harden ...`.

`hf` finds an extension by a small file in the user's folder and not by its name on the PATH; `hf-lox --register`
writes that file, and `hf extensions remove lox` removes it.
"""

import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from lox_hf.cli.main import main as lox_hf
from lox_hf.errors import LoxError, OutputError

NAME = "lox"
# Where `hf extensions update` would look for a newer one. No account on GitHub can have this name, so that nobody can
# have code of theirs installed in its place; pip updates this package.
NO_OWNER = "-"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command of `lox-hf`, or register with `hf`.

    Args:
        arguments: Words of the command line; None takes those of the process.

    Returns:
        Exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words != ["--register"]:
        return lox_hf(words, prog="hf lox")
    try:
        print(f"Registered in {register()}: `hf lox --help` shows the commands, `hf extensions remove lox` undoes it.")
    except LoxError as error:
        print(f"hf-lox: error: {error}", file=sys.stderr)
        return 2
    return 0


def register() -> Path:
    """Tell `hf` where this executable is.

    Returns:
        Folder with the file that says so.

    Raises:
        OutputError: If this version of `hf` has no extensions, the executable is not found, or another extension has
            the name.
    """
    try:
        from huggingface_hub.cli.extensions import EXTENSIONS_ROOT, ExtensionManifest
    except ImportError as error:
        raise OutputError("This version of huggingface_hub has no extensions: update it, or use lox-hf.") from error
    name = f"hf-{NAME}"
    here = Path(sys.argv[0]).absolute()
    found = here if here.name == name else shutil.which(name)
    if found is None:
        raise OutputError(
            f"{name} is not on the PATH: call it by its whole path, such as .venv/bin/{name} --register."
        )
    folder = EXTENSIONS_ROOT.expanduser() / name
    if (folder / "manifest.json").exists() and ExtensionManifest.load(folder).owner != NO_OWNER:
        raise OutputError(f"Another extension has this name: `hf extensions remove {NAME}` removes it.")
    manifest = ExtensionManifest(
        owner=NO_OWNER,
        repo=name,
        repo_id="lox-hf (installed by pip)",
        short_name=NAME,
        executable_path=str(found),
        type="binary",
        installed_at=datetime.now(UTC),
        description="Harden safety-aligned models against losing their safety in fine-tuning.",
    )
    try:
        manifest.save(folder)
    except OSError as error:
        raise OutputError(f"Cannot write {folder}: {error.strerror}.") from error
    return folder
