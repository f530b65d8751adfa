"""Which weights these are: hashes that tell them from others of the same names and shapes."""

import hashlib
from collections.abc import Iterable

from torch import Tensor

from lox_hf.weights.shard import Shard
from lox_hf.weights.source import ShardedSource, WeightSource

SAMPLED = 32
"""Tensors whose numbers tell a checkpoint from another of the same shapes; each costs up to 64 reads."""


def weights_sample(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Tell models apart that share a name: SHA-256 of up to 64 numbers of every floating-point weight.

    Args:
        tensors: Weights with their names.

    Returns:
        Hex digits.
    """
    digest = hashlib.sha256()
    for name, weight in tensors:
        if weight.is_floating_point() and not weight.is_meta:
            step = max(1, -(-weight.numel() // 64))
            digest.update(f"{name} {weight.detach().flatten()[::step].tolist()}".encode())
    return digest.hexdigest()


def weights_identity(source: WeightSource) -> str:
    """Tell weights from others of the same shapes and names, at the cost of a few reads.

    Args:
        source: The weights.

    Returns:
        Hex digits: SHA-256 of the headers of the files, if there are any, and of numbers of `SAMPLED` tensors.
    """
    digest = hashlib.sha256()
    for shard in source.shards if isinstance(source, ShardedSource) else ():
        digest.update(f"{shard.name} {shard.size_bytes}".encode())
        digest.update(shard.header)
    floating = [name for name, info in source.infos().items() if info.dtype and info.dtype.is_floating_point]
    sampled = floating[:: max(1, len(floating) // SAMPLED)]
    read = source.stored if isinstance(source, ShardedSource) else source.get
    digest.update(weights_sample((name, read(name)) for name in sampled).encode())
    for name in sampled:
        source.release(name)
    return digest.hexdigest()


def file_times(source: WeightSource) -> dict[str, list[int]]:
    """Size and time of the last change of every file on this machine, which a sample of numbers cannot stand for.

    Args:
        source: The weights.

    Returns:
        Bytes and nanoseconds by file name; nothing for weights that are in no file here.
    """
    shards = source.shards if isinstance(source, ShardedSource) else []
    stats = {shard.name: shard.path.stat() for shard in shards if isinstance(shard, Shard)}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
