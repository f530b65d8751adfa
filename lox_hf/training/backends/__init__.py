"""Where the weights of a model in training are: in this process, under adapters, or in pieces over many processes."""

from lox_hf.training.backends.live import LiveWeights, is_plain, open_weights
from lox_hf.training.backends.matrix import LiveMatrix

__all__ = ["LiveMatrix", "LiveWeights", "is_plain", "open_weights"]
