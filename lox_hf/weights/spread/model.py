"""A model that is spread over processes: its weights by checkpoint name, each with the pieces that are here."""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn

from lox_hf.core.precision import working_on
from lox_hf.core.spread import Peers
from lox_hf.errors import DistributedError, UnsupportedModelError, listing
from lox_hf.parallel.threads import return_free_memory
from lox_hf.progress import progress_bar
from lox_hf.records import TensorPlan
from lox_hf.weights.live import as_checkpoint, check_readable, live_tensors
from lox_hf.weights.source import DictSource, TensorInfo, WeightSource
from lox_hf.weights.spread.dtensor import DTensorMatrix, is_dtensor, mesh_peers
from lox_hf.weights.spread.matrix import SpreadMatrix
from lox_hf.weights.spread.zero import ZeroMatrix, is_partitioned, is_stepped

Result = TypeVar("Result")


class SpreadSource:
    """The weights of a spread model, to plan with and to work on.

    Args:
        model: The model.
        label: How messages call it.

    Raises:
        UnsupportedModelError: If weights are held in a way that is not known, or are no single matrix.
    """

    def __init__(self, model: nn.Module, label: str) -> None:
        reshard(model)
        parameters = dict(model.named_parameters())
        check_readable(model, parameters)
        self.label, self.tensors = label, by_checkpoint_name(model, parameters)
        self.peers, self._mesh = model_peers(model), _largest_mesh(model)

    def infos(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every tensor."""
        return {
            name: TensorInfo(whole_shape(t), t.dtype, str(t.dtype).removeprefix("torch."))
            for name, t in self.tensors.items()
        }

    def get(self, name: str) -> Any:
        """Return one matrix as a `SpreadMatrix`: with the pieces that are here.

        Args:
            name: Checkpoint name.

        Returns:
            The matrix.

        Raises:
            UnsupportedModelError: If it is in no process group.
        """
        tensor = self.tensors[name]
        if is_spread(tensor):
            return spread_matrix(tensor)
        if self._mesh is None:
            raise UnsupportedModelError(
                f"{name} was added to {self.label} after DeepSpeed had partitioned it. Add it before, under zero.Init."
            )
        from torch.distributed.tensor import DTensor, Replicate

        # In every process as a whole, such as what tensor parallelism leaves alone: a DTensor of copies.
        copies = [Replicate()] * self._mesh.ndim
        return DTensorMatrix(DTensor.from_local(tensor.detach(), self._mesh, copies, run_check=False))

    def prefetch(self, name: str) -> None:
        """Do nothing: the weights are there."""

    def release(self, name: str) -> None:
        """Do nothing: the weights are the model's."""


def open_model(model: nn.Module, role: str, label: str) -> WeightSource:
    """Open a loaded model, in this process or spread over several.

    Args:
        model: The model.
        role: "aligned" or "base".
        label: How messages call it.

    Returns:
        Its weights by checkpoint name; in pieces where it is spread.

    Raises:
        UnsupportedModelError: If its weights cannot be edited as they are, or a base is spread.
    """
    check_not_flat(model)
    if not is_spread_model(model):
        return DictSource(live_tensors(model), label)
    if role == "base":
        refuse_base(label)
    return SpreadSource(model, label)


def warn_of_steps(model: nn.Module) -> None:
    """Say so where DeepSpeed ZeRO 1 or 2 trains a model, whose next step goes on from a copy that it keeps.

    Args:
        model: A model that was edited.
    """
    if any(map(is_stepped, model.parameters())):
        warnings.warn(
            f"DeepSpeed's optimiser keeps a copy of the weights of {type(model).__name__}, and its next step undoes "
            "the edit. Save the model before it, or apply LoX before deepspeed.initialize.",
            stacklevel=3,
        )


def refuse_base(what: str) -> NoReturn:
    """Refuse a base that is spread.

    Args:
        what: How the message calls it.

    Raises:
        UnsupportedModelError: Always.
    """
    raise UnsupportedModelError(
        f"{what} is spread over processes. Name its folder or Hub id instead: each process reads the rows it needs."
    )


def check_same(source: SpreadSource, given: object, what: str) -> None:
    """Check that all processes that hold pieces of a model are given the same.

    Args:
        source: The model.
        given: What this process is given; it is pickled.
        what: How a message calls it.

    Raises:
        DistributedError: If they are not: in every process.
    """
    everyone = source.peers.gather(given)
    others = [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]
    if others:
        raise DistributedError(
            f"The processes that hold {source.label} were given different {what}: {len(others)} of {len(everyone)} "
            "differ from the first. Call with the same arguments in all of them."
        )


def in_turn(
    work: Callable[[TensorPlan, SpreadMatrix], Result],
    plans: Sequence[TensorPlan],
    source: SpreadSource,
    *,
    progressbar: bool | None,
    description: str,
) -> list[Result]:
    """Work on matrices one after another: every process in the same order, as all of them work on each together.

    Args:
        work: Function of a plan and its matrix.
        plans: What to do, for matrices only.
        source: The model.
        progressbar: Show a progress bar; None shows one on a terminal only.
        description: Text beside the bar.

    Returns:
        What `work` returns, in the order of the plans.
    """
    sizes, results = source.infos(), []
    total = sum(sizes[plan.name].size_bytes for plan in plans)
    with working_on(source.peers.device), progress_bar(total, progressbar, description, unit="B") as advance:
        for plan in plans:
            results.append(work(plan, source.get(plan.name)))
            return_free_memory()
            advance(sizes[plan.name].size_bytes)
    return results


def is_spread(tensor: Tensor) -> bool:
    """Whether processes hold pieces of this: a DTensor, or a parameter under ZeRO-3."""
    return is_dtensor(tensor) or is_partitioned(tensor)


def is_spread_model(model: object) -> bool:
    """Whether processes hold pieces of this model's weights, so that they have to work on it together."""
    return isinstance(model, nn.Module) and any(map(is_spread, model.parameters()))


def spread_matrix(weight: Tensor) -> SpreadMatrix:
    """Return the view that fits how a matrix is spread."""
    return ZeroMatrix(weight) if is_partitioned(weight) else DTensorMatrix(weight)


def together(model: object) -> AbstractContextManager[None]:
    """Have an error of one process raised in all that hold pieces of this model; nothing is done for other models.

    Pieces that FSDP 2 has left whole are put in place before.

    Args:
        model: Any model; every process that holds a piece of it enters and leaves.

    Returns:
        The context.
    """
    if isinstance(model, nn.Module):
        reshard(model)
        if is_spread_model(model):
            return model_peers(model).together()
    return nullcontext()


def commit(model: nn.Module, names: Collection[str]) -> None:
    """Let a spread model have what was written into pieces of these weights; nothing is done for other models.

    Args:
        model: Any model; every process that holds a piece of it calls this.
        names: Checkpoint names.
    """
    if is_spread_model(model):
        source = SpreadSource(model, type(model).__name__)
        for name in source.tensors:
            if name in names:
                source.get(name).commit()


def model_peers(model: nn.Module) -> Peers:
    """Return the processes that hold pieces of a spread model."""
    partitioned = next(filter(is_partitioned, model.parameters()), None)
    if partitioned is not None:
        return Peers([cast("Any", partitioned).ds_process_group], partitioned.device)
    return mesh_peers(_largest_mesh(model))


def _largest_mesh(model: nn.Module) -> Any:
    """The mesh of most processes; some weights may be on a part of it. None where there are no DTensors."""
    meshes = [cast("Any", weight).device_mesh for weight in model.parameters() if is_dtensor(weight)]
    return max(meshes, key=lambda mesh: mesh.size(), default=None)


def by_checkpoint_name(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters by checkpoint name; fused weights cannot be taken apart where processes hold pieces.

    Args:
        model: The model, or the base model under adapters: it knows how its weights are called in a checkpoint.
        parameters: Its parameters, by the names it has without adapters.

    Returns:
        Parameters by checkpoint name.

    Raises:
        UnsupportedModelError: If weights are held in a way that is not known, or are no single matrix.
    """
    found: dict[str, Tensor] = {}
    fused: list[str] = []
    for name, tensor in parameters.items():
        shape = whole_shape(tensor)
        stored = list(as_checkpoint(model, {name: torch.empty(shape, device="meta")}))  # the piece may be empty
        if len(shape) > 2 or (len(shape) == 2 and len(stored) != 1):
            fused.append(f"{name}: {shape}")
            continue
        if not is_spread(tensor):
            check_readable(model, {name: tensor})
        found |= dict.fromkeys(stored, tensor)
    if fused:
        raise UnsupportedModelError(
            f"{type(model).__name__} is spread over processes and holds {len(fused)} weights that are no single "
            f"matrix (fused experts, convolutions): {listing(fused, 8)} Work on its files: harden_checkpoint, "
            "read_drift."
        )
    return found


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of a weight of which this process may hold a piece."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def reshard(model: nn.Module) -> None:
    """Put FSDP 2's pieces in place; it leaves some weights whole after a forward pass without a backward pass.

    Args:
        model: Any model; nothing is done to others.
    """
    for module in model.modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            cast("Any", module).reshard()


def check_not_flat(model: nn.Module) -> None:
    """Refuse FSDP of the first kind, which keeps many weights in one flat parameter.

    Args:
        model: Any model.

    Raises:
        UnsupportedModelError: If it is under FSDP 1.
    """
    flat = [
        name or type(module).__name__
        for name, module in model.named_modules()
        if type(module).__name__ == "FullyShardedDataParallel" or hasattr(module, "_flat_param")
    ]
    if flat:
        raise UnsupportedModelError(
            f"{type(model).__name__} is under FSDP 1, whose flat parameters hold no matrices: {listing(flat, 3)} "
            "Use FSDP 2: fsdp_version: 2 in accelerate's settings."
        )
