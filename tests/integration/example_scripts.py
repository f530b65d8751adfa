"""Run an example as its reader does, and import its modules as it does itself."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
COMMON = [file.stem for file in sorted((EXAMPLES / "common").glob("*.py")) if file.stem != "__init__"]
DATA = Path(os.environ.get("LOX_HF_TEST_DATA", ROOT.parent / "shared" / "data"))


def run_example(name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `examples/NAME/run.py` in a process of its own, on one thread and without the Hub."""
    # The example is found by its path; the package, where it is not installed, beside it.
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        **environment,
    }
    command = [sys.executable, str(EXAMPLES / name / "run.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@contextmanager
def example_modules(name: str) -> Iterator[SimpleNamespace]:
    """Import the modules of an example and the common ones, and put back what had their names before."""
    own = [file.stem for file in sorted((EXAMPLES / name).glob("*.py"))]
    others = {module: sys.modules.pop(module) for module in own if module in sys.modules}
    path = list(sys.path)
    # As in `run.py`: the example's folder, and the one of all examples.
    sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / name)]
    try:
        modules = {module: importlib.import_module(f"common.{module}") for module in COMMON}
        modules |= {module: importlib.import_module(module) for module in own}
        yield SimpleNamespace(**modules)
    finally:
        sys.path[:] = path
        for module in own:
            sys.modules.pop(module, None)
        sys.modules.update(others)


def missing_data(*names: str) -> str:
    """Say which of the files are not there; empty where all are."""
    missing = [name for name in names if not (DATA / name).is_file()]
    return f"{DATA} lacks {', '.join(missing)}: name their folder in LOX_HF_TEST_DATA" if missing else ""
