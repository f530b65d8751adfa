"""Progress bars on terminals, and nothing elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    total: int, shown: bool | None, description: str, *, unit: str, done: int = 0
) -> Iterator[Callable[[int], object]]:
    """Show a bar on standard error while the block runs.

    Args:
        total: Where it ends.
        shown: Whether it is shown; None shows it on a terminal only.
        description: Text beside the bar.
        unit: What is counted; "B" for bytes.
        done: Where it begins.

    Yields:
        Function that advances the bar.
    """
    if shown is False or (shown is None and not sys.stderr.isatty()):
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, initial=done, desc=description, unit=unit, unit_scale=unit == "B", file=sys.stderr) as bar:
        yield bar.update
