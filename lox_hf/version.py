"""The version, in one place, and those a result depends on."""

import platform
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"


def versions(*packages: str) -> dict[str, str]:
    """Versions that a result depends on, for its record.

    Args:
        packages: Further packages; those that are not installed are left out.

    Returns:
        Versions of lox_hf, torch, Python and the packages, by name.
    """
    found = {"lox_hf": __version__, "torch": version("torch"), "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
