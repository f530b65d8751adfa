"""Reading, pairing, selecting and writing tensors; no mathematics."""
