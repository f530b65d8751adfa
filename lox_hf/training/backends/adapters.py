"""A PeftModel: a matrix is its base weight with the active LoRA adapters, and corrections never touch the base.

Trainers save the adapters alone, so what is added to a base weight would be lost: see `correction_adapter`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lox_hf.core.lowrank import LowRank
from lox_hf.errors import LoxError, UnsupportedModelError, listing
from lox_hf.lora import check_plain_lora
from lox_hf.training.backends.correction_adapter import CORRECTION, FixedFactor, add_correction, check_correction
from lox_hf.training.backends.live import LiveWeights, live_matrix, plain_matrices, spread_matrices
from lox_hf.training.backends.matrix import LiveMatrix
from lox_hf.training.backends.quantised import quantised_matrices
from lox_hf.weights.live import as_checkpoint, check_plain
from lox_hf.weights.selection import module_name

if TYPE_CHECKING:
    from peft import PeftModel

Product = tuple[Tensor, Tensor, float, bool]
"""B, A, the scaling, and whether the weight is stored as (B A)^T."""


class AdaptedWeights(LiveWeights):
    """The matrices of a PeftModel.

    Args:
        model: The PeftModel.
        matrices: Its matrices by checkpoint name.
    """

    def __init__(self, model: "PeftModel", matrices: Mapping[str, LiveMatrix]) -> None:
        super().__init__(model, matrices)
        self.model = model

    def check_add(self, names: Iterable[str]) -> None:
        """Raise now what would keep `add` from changing these matrices later, at the end of a training.

        Args:
            names: Matrix names.

        Raises:
            UnsupportedModelError: If a matrix can carry no LoRA (embeddings, fused experts), or TRL's DPO switches
                between adapters by name; the first is told of all matrices at once.
            LoxError: If there is an adapter "lox" that is not a correction: LoX itself, or one that is trained.
        """
        modules = self._corrected(names)
        _check_name_is_free(self.model)
        nothing = torch.empty(0)
        check_correction(self.model, {}, dict.fromkeys(modules.values(), (nothing, nothing)))

    def add(self, changes: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add left @ right to matrices, in the adapter "lox"; copies of `modules_to_save` are changed in place.

        Args:
            changes: left (m, k) and right (k, n) by matrix name; for a matrix `right` is the same at every call.

        Raises:
            UnsupportedModelError: If a matrix can carry no LoRA (embeddings, fused experts); nothing is changed.
            LoxError: If there is an adapter "lox" that does not fit; nothing is changed.
        """
        modules = self._corrected(changes)
        add_correction(self.model, {module: changes[name] for name, module in modules.items()})
        for name, change in changes.items():
            if name not in modules:
                self.matrices[name].add(*change)

    def _corrected(self, names: Iterable[str]) -> dict[str, str]:
        """The modules that take corrections in the adapter "lox", by matrix name; the others are copies.

        Returns:
            Names of modules in the base model.

        Raises:
            UnsupportedModelError: If a matrix is neither.
        """
        found = {name: self.matrices[name] for name in names}
        wrong = [name for name, matrix in found.items() if not isinstance(matrix, AdaptedMatrix | CopiedMatrix)]
        if wrong:
            raise UnsupportedModelError(
                f"{len(wrong)} matrices of {self.label} can carry no LoRA, and a change of a base weight is lost when "
                f"adapters are saved: {listing(wrong, 8)} Leave them out of the subspace with exclude_modules."
            )
        return {name: matrix.module for name, matrix in found.items() if isinstance(matrix, AdaptedMatrix)}


class AdaptedMatrix:
    """A base weight with the LoRA adapters that are active when it is read: W_0 + sum of scaling * B A.

    Within directions nothing larger than the factors is touched: U^T W V = U^T W_0 V + scaling (U^T B)(A V), and the
    first part is read once while W_0 is frozen.

    Args:
        model: The PeftModel.
        module: Name of the module in the base model, which may get its first adapter later.
        weight: The parameter of W_0.
        stored: W_0.
    """

    dtype = torch.float32

    def __init__(self, model: "PeftModel", module: str, weight: Tensor, stored: LiveMatrix) -> None:
        self.model, self.module, self.weight, self.stored = model, module, weight, stored
        self.shape, self.collective = stored.shape, stored.collective
        self._known: tuple[LowRank, bool, Tensor] | None = None

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return the sum, in float32."""
        total = self.stored.dense().float()
        for b, a, scaling, transposed in self._products():
            product = live_matrix(b).dense().float() @ live_matrix(a).dense().float()
            total = total.add(product.T if transposed else product, alpha=scaling)
        return total

    def coordinates(self, directions: LowRank) -> Tensor:
        """Return U_k^T W V_k."""
        found = self._stored_coordinates(directions)
        turned = LowRank(directions.Vh.T, directions.S, directions.U.T)
        for b, a, scaling, transposed in self._products():
            part = _product_coordinates(b, a, turned).T if transposed else _product_coordinates(b, a, directions)
            found = found + scaling * part
        return found

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add left @ right to the adapter "lox".

        Args:
            left: (m, k).
            right: (k, n), the same at every call.

        Raises:
            UnsupportedModelError: If the module can carry no LoRA, or TRL's DPO switches between adapters by name.
            LoxError: If there is an adapter "lox" that is trained, or that holds other directions.
        """
        add_correction(self.model, {self.module: (left, right)})

    def _layer(self) -> Any:
        return self.model.get_base_model().get_submodule(self.module)

    def _stored_coordinates(self, directions: LowRank) -> Tensor:
        if self.weight.requires_grad:
            return self.stored.coordinates(directions)
        merged = bool(getattr(self._layer(), "merged", False))  # PEFT's merge changes W_0
        if self._known is None or self._known[0] is not directions or self._known[1] is not merged:
            self._known = directions, merged, self.stored.coordinates(directions)
        return self._known[2]

    def _products(self) -> Iterator[Product]:
        """What PEFT's forward pass adds to the base layer now.

        Yields:
            Each active adapter's product.

        Raises:
            UnsupportedModelError: If an adapter is a variant of LoRA.
        """
        layer = self._layer()
        if not hasattr(layer, "lora_A") or layer.disable_adapters or layer.merged:
            return
        for adapter in layer.active_adapters:
            if adapter in layer.lora_variant:
                raise UnsupportedModelError(
                    f"{self.module}: adapter '{adapter}' is a variant of LoRA, not plain LoRA."
                )
            if adapter in layer.lora_A:
                b, a = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
                yield b, a, float(layer.scaling[adapter]), layer.fan_in_fan_out
            elif adapter in layer.lora_embedding_A:
                b, a = layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter]
                yield b, a, float(layer.scaling[adapter]), True


class CopiedMatrix:
    """A weight that PEFT trains and saves as a whole, `modules_to_save`: the active copy is the weight.

    Args:
        wrapper: PEFT's wrapper of the module.
        inner: Name of the weight in the module.
        stored: The original, which counts where no copy is active.
    """

    def __init__(self, wrapper: Any, inner: str, stored: LiveMatrix) -> None:
        self.wrapper, self.inner, self.stored = wrapper, inner, stored
        self.shape, self.dtype, self.collective = stored.shape, stored.dtype, stored.collective

    def dense(self) -> Tensor:
        """Return the active copy."""
        return self._current().dense()

    def coordinates(self, directions: LowRank) -> Tensor:
        """Return U_k^T W V_k of the active copy."""
        return self._current().coordinates(directions)

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add left @ right to the active copy, which is saved."""
        self._current().add(left, right)

    def _current(self) -> LiveMatrix:
        active = self.wrapper.active_adapters
        if self.wrapper.disable_adapters or not active:
            return self.stored
        return live_matrix(self.wrapper.modules_to_save[active[0]].get_parameter(self.inner))


def open_adapted(model: "PeftModel") -> AdaptedWeights:
    """Open the weights of a PeftModel that trains LoRA adapters.

    Args:
        model: The PeftModel; its base may be quantised by bitsandbytes.

    Returns:
        Its matrices by checkpoint name, with the adapters that are active whenever one is read.

    Raises:
        UnsupportedModelError: If an active adapter is not plain LoRA of whole matrices, or base weights are held in a
            way that is not known.

    Example:
        >>> weights = open_adapted(get_peft_model(model, LoraConfig(r=8)))  # doctest: +SKIP
    """
    for name in model.active_adapters:
        check_plain_lora(model.peft_config[name], f"Adapter '{name}'")
    base = model.get_base_model()
    parameters = base_parameters(base)
    codes = quantised_matrices(base, parameters)
    rest = {name: tensor for name, tensor in parameters.items() if name not in codes}
    matrices = spread_matrices(base, rest) or plain_matrices(_views(base, rest, bool(codes)))
    whole = {}
    for name, tensor in parameters.items():
        shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
        stored = list(as_checkpoint(base, {name: torch.empty(shape, device="meta")}))  # the piece may be empty
        if len(stored) == 1 and (name in codes or len(shape) == 2):
            matrices[stored[0]] = _adapted(model, name, tensor, codes.get(name) or matrices[stored[0]])
            whole[name] = stored[0]
    _check_whole(base, whole)
    return AdaptedWeights(model, matrices)


def base_parameters(base: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a base model that are not adapters', by the names they have without PEFT."""
    parts = [
        getattr(module, attribute)
        for module in base.modules()
        for attribute in getattr(module, "adapter_layer_names", ())
    ]
    added = {id(parameter) for part in parts for parameter in part.parameters()}
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): parameter
        for name, parameter in base.named_parameters()
        if id(parameter) not in added
    }


def _check_name_is_free(model: "PeftModel") -> None:
    """Refuse an adapter "lox" that no correction has made; a Trainer's resumed one is made fixed before this."""
    factors = [getattr(module, "lora_A", {}) for module in model.get_base_model().modules()]
    held = [held[CORRECTION] for held in factors if CORRECTION in held]
    if CORRECTION in model.peft_config and not (held and all(isinstance(factor, FixedFactor) for factor in held)):
        raise LoxError(
            f"This model has an adapter '{CORRECTION}' that LoxCallback has not made, but the name is kept for its "
            "corrections. If get_lox_model made it, put it into the base before training, with merge_and_unload(), or "
            "make it with another adapter_name. If you train it, give it another name."
        )


def _views(base: nn.Module, parameters: Mapping[str, Tensor], quantised: bool) -> dict[str, Tensor]:
    """Views of a base model's weights by checkpoint name."""
    check_plain(nn.Module() if quantised else base, parameters)  # here are those that are not quantised
    views = as_checkpoint(base, parameters)
    owned = {tensor.untyped_storage().data_ptr() for tensor in parameters.values()}
    copies = [name for name, view in views.items() if view.untyped_storage().data_ptr() not in owned]
    if copies:
        raise UnsupportedModelError(
            f"{type(base).__name__} stores {len(copies)} weights rearranged, which cannot be read in training: "
            f"{listing(copies, 8)} Read its merged checkpoints with read_drift instead."
        )
    return views


def _adapted(model: "PeftModel", name: str, weight: Tensor, stored: LiveMatrix) -> LiveMatrix:
    parts = name.split(".")
    for end in range(1, len(parts)):
        module = model.get_base_model().get_submodule(".".join(parts[:end]))
        if hasattr(module, "modules_to_save"):
            return CopiedMatrix(module, ".".join(parts[end:]), stored)
    return AdaptedMatrix(model, module_name(name), weight, stored)


def _check_whole(base: nn.Module, whole: Mapping[str, str]) -> None:
    """Refuse LoRA on what is not the one matrix of a module: convolutions, attention in one piece, fused experts."""
    wrong = [
        name
        for name, module in base.named_modules()
        if hasattr(module, "lora_A") and f"{name.replace('.base_layer', '')}.weight" not in whole
    ]
    if wrong:
        raise UnsupportedModelError(
            f"{type(base).__name__} has LoRA on {len(wrong)} modules that are not one matrix each (fused experts, "
            f"convolutions): {listing(wrong, 8)} Leave them out of the adapter with exclude_modules."
        )


def _product_coordinates(b: Tensor, a: Tensor, directions: LowRank) -> Tensor:
    """Return U_k^T B A V_k through (U_k^T B)(A V_k): neither factor is gathered where it is in pieces."""
    inner = torch.eye(live_matrix(a).shape[0])
    left = live_matrix(b).coordinates(LowRank(directions.U, directions.S, inner))
    right = live_matrix(a).coordinates(LowRank(inner, inner.diag(), directions.Vh))
    return left @ right
