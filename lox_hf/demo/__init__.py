"""The embedded demonstration: a small invented world, a pair of models trained on it, and LoX applied to them."""

from lox_hf.demo.pair import trained_pair
from lox_hf.demo.story import DemoReport, tell_story
from lox_hf.demo.training import Recipe

__all__ = ["DemoReport", "Recipe", "tell_story", "trained_pair"]
