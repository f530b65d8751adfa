"""The mathematics of LoX on one matrix: decomposition and extrapolation. Imports torch only."""
