"""Figures. The only package that imports matplotlib, and it does so when a figure is drawn."""
