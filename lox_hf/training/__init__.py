"""Watching and keeping safety while a model is trained."""
