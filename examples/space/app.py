"""Harden a model on a page: `python app.py`; README.md beside this file says what it does and what it limits."""

from __future__ import annotations

import atexit
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from lox_space.jobs import Workshop
from lox_space.page import launch_options, make_page
from lox_space.settings import Settings


def main() -> None:
    """Serve the page until it is interrupted."""
    workshop = Workshop(Settings.from_environment())
    atexit.register(workshop.close)
    page = make_page(workshop)
    _, url, _ = page.launch(**launch_options(), prevent_thread_lock=True)
    print(f"Open {url} in a browser; Control-C ends.", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
