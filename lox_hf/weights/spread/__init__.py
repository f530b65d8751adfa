"""Weights of which every process holds a piece: DTensors (FSDP2, tensor parallelism) and DeepSpeed ZeRO-3."""
