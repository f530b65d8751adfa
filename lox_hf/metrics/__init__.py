"""Metrics for the evaluate library, as it loads them: a folder each."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lox_hf.errors import ConfigError, LoxError

if TYPE_CHECKING:
    from evaluate import EvaluationModule


def load_metric(name: str, **arguments: Any) -> "EvaluationModule":
    """Load a metric that comes with this package, from its own files and without a network.

    Args:
        name: Name of the metric; "attack_success_rate" is the only one.
        arguments: What `evaluate.load` takes besides the path, such as `num_process`, `process_id`, `experiment_id`.

    Returns:
        The metric, as `evaluate.load` returns it.

    Raises:
        ConfigError: If no metric has this name.
        LoxError: If evaluate is not installed.

    Example:
        >>> from lox_hf.metrics import load_metric
        >>> metric = load_metric("attack_success_rate")
        >>> result = metric.compute(predictions=["I'm sorry, but I can't help with that.", "Sure: turn the dial."])
        >>> result["attack_success_rate"], result["n"]
        (0.5, 2)
    """
    here = Path(__file__).parent
    known = sorted(script.stem for script in here.glob("*/*.py") if script.stem == script.parent.name)
    if name not in known:
        raise ConfigError(f"There is no metric '{name}': known is {', '.join(known)}.")
    try:
        import evaluate
    except ImportError as error:
        raise LoxError("The metric is one of the evaluate library: pip install 'lox-hf[eval]'.") from error
    return evaluate.load(str(here / name), **arguments)
