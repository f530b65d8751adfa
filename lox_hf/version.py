"""The version, in one place, and those a result depends on."""

import platform

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Versions that a result depends on, for its record."""
    import torch

    return {"lox_hf": __version__, "torch": torch.__version__, "python": platform.python_version()}
