"""Watching safety while a model is trained."""
