"""Layer with low-rank adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import nn

from ipa_torch._adapters.pass_lock import PassLock
from ipa_torch._adapters.shared_projection import SharedProjection
from ipa_torch._capture.autocast import autocast_dtype
from ipa_torch._capture.hooks import has_hooks
from ipa_torch._layers.activation_tensor import input_of
from ipa_torch._layers.execution_device import execution_device, reference_tensor
from ipa_torch._layers.layer_properties import outputs_of
from ipa_torch._layers.matmul_view import view_of
from ipa_torch._layers.merge_support import merge_obstacle
from ipa_torch._layers.unwrap import unwrap_model
from ipa_torch.errors import LayerError

_OTHER_ARGUMENTS = "expected a layer that is called with its input alone, got other arguments"


class AdapterLayer(nn.Module):
    r"""Layer W with named adapters, one of them active: :math:`W x + B \, s P x`.

    Attributes of the base layer (``weight``, ``in_features``) are read and set as before.
    ``weight`` is W also while an adapter is merged: other code of the model may use it. Within a
    forward pass of the model, ``isinstance`` finds the class of the base layer as well.

    Parameters
    ----------
    base : torch.nn.Module
        The layer. Its tensors are never written.
    pass_lock : PassLock
        Lock of the model, for changes beside passes of other threads.

    Examples
    --------
    >>> import torch
    >>> from ipa_torch import attach, fit_projectors
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 4))
    >>> attach(model, fit_projectors(model, [torch.randn(8, 16)], rank=2, progress=False))
    >>> type(model[0]).__name__, model[0].base_layer, model[0].in_features
    ('AdapterLayer', Linear(in_features=16, out_features=4, bias=True), 16)
    """

    def __init__(self, base: nn.Module, pass_lock: PassLock) -> None:
        super().__init__()
        self.register_module("base_layer", None)  # the first part, set last: see __setattr__
        self.pass_lock = pass_lock
        self.view = view_of(base)
        self.projections = nn.ModuleDict()
        self.lora_B = nn.ParameterDict()
        self.dropouts: dict[str, float] = {}
        self.active: str | None = None
        self.merged: str | None = None
        # A tuple keeps the weight from being a parameter of this module.
        self._unmerged_weight: tuple[nn.Parameter, ...] = ()
        self.weight_read = self.other_arguments = False  # since attached, by code of the model
        # Not self.train(), which would run what a layer does in its own.
        self.training = base.training
        self.base_layer = base

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of P: that of the weight, or float32 if it is quantized."""
        weight = reference_tensor(self.base_layer)
        floating = weight is not None and weight.is_floating_point()
        return weight.dtype if weight is not None and floating else torch.float32

    @property
    def device(self) -> torch.device:
        """Device on which the layer computes."""
        return execution_device(self.base_layer)

    def merge_obstacle(self) -> str | None:
        """Return the reason for which no adapter can be merged, None if it can."""
        return _OTHER_ARGUMENTS if self.other_arguments else merge_obstacle(self.base_layer)

    def projection(self, name: str) -> SharedProjection:
        """Return the projection of an adapter."""
        projection = self.projections[name]
        assert isinstance(projection, SharedProjection)
        return projection

    def find_equal_projection(self, projection: SharedProjection) -> SharedProjection | None:
        """Return a frozen projection of this layer with equal values, or None."""
        for other in map(self.projection, self.projections):
            if not (projection.trainable or other.trainable) and (
                torch.equal(other.scale, projection.scale)
                and torch.equal(other.weight, projection.weight)
            ):
                return other
        return None

    def add(self, name: str, projection: SharedProjection, dropout: float) -> None:
        """Add an adapter with B = 0, in float32 at least."""
        projection.users += projection not in set(self.projections.values())
        self.projections[name] = projection
        dtype = torch.promote_types(self.dtype, torch.float32)
        shape = outputs_of(self.base_layer), projection.rank
        self.lora_B[name] = nn.Parameter(torch.zeros(shape, dtype=dtype, device=self.device))
        self.dropouts[name] = dropout

    def remove(self, name: str) -> None:
        """Remove an adapter; if it is merged and not the last, restore the old weight."""
        if self.merged == name and len(self.lora_B) > 1:
            self.unmerge()
        projection = self.projection(name)
        del self.projections[name], self.lora_B[name], self.dropouts[name]
        projection.users -= projection not in set(self.projections.values())
        if self.active == name:
            self.active = None

    def adapter_parameters(self, name: str | None = None) -> list[nn.Parameter]:
        """Return the parameters of an adapter, or of all."""
        names = list(self.lora_B) if name is None else [name]
        lora_B = [self.lora_B[adapter] for adapter in names]
        return lora_B + [p for adapter in names for p in self.projections[adapter].parameters()]

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output and that of the active adapter, added up."""
        if torch.compiler.is_compiling() or self.pass_lock.in_pass:
            return self._output(*args, **kwargs)
        self.pass_lock.enter_layer()
        try:
            return self._output(*args, **kwargs)
        finally:
            self.pass_lock.leave_pass()

    def _output(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(args) + len(kwargs) > 1:
            self._note_other_arguments((*args, *kwargs.values()))
        if self.active is None or self.merged is not None:
            output: torch.Tensor = self.base_layer(*args, **kwargs)
            return output
        x = input_of(self.base_layer, args, kwargs)
        z = self.projections[self.active](x)
        if self.training and (rate := self.dropouts[self.active]):
            z = nn.functional.dropout(z, rate)
        lora_B = self.lora_B[self.active]
        if self._can_add_in_place(x, z, lora_B):
            return self._added_in_place(x, z, lora_B.to(z.dtype))
        output = self.base_layer(*args, **kwargs)
        if not isinstance(output, torch.Tensor):
            raise LayerError(
                f"expected a {type(self.base_layer).__name__} that returns a tensor, got "
                f"{type(output).__name__}; leave it out of the targets"
            )
        if autocast_dtype(output.device) is None:
            z = z.to(lora_B.dtype)
        return output + self.view.expand(z, lora_B).to(output.dtype)

    def _note_other_arguments(self, values: Iterable[Any]) -> None:
        """Keep adapters from being merged into a layer whose output may depend on more than x."""
        if sum(value is not None for value in values) > 1:
            self.other_arguments = True
            if self.merged is not None:
                raise LayerError(f"{_OTHER_ARGUMENTS}; unmerge the adapter {self.merged!r}")

    def _can_add_in_place(self, x: torch.Tensor, z: torch.Tensor, lora_B: torch.Tensor) -> bool:
        base = self.base_layer
        return (
            type(base) is nn.Linear
            and not has_hooks(base)
            and not x.is_nested
            and x.dtype == z.dtype == base.weight.dtype
            # The range of float16 is too small for B and its gradient.
            and z.dtype in (lora_B.dtype, torch.bfloat16)
            and autocast_dtype(x.device) is None
            and torch._C._get_tracing_state() is None  # a trace would keep the shape
        )

    def _added_in_place(
        self, x: torch.Tensor, z: torch.Tensor, lora_B: torch.Tensor
    ) -> torch.Tensor:
        """Add B s P x in place to the output of a linear layer, which autograd does not save.

        This saves two passes over the output. It is computed with two axes, as autograd copies a
        view that is changed in place.
        """
        output: torch.Tensor = self.base_layer(x.reshape(-1, x.shape[-1]))
        output.addmm_(z.reshape(-1, z.shape[-1]), lora_B.T)
        # Not a view for autograd, as in F.linear: the caller may change it in place, too.
        shape = [*x.shape[:-1], output.shape[-1]]
        whole: torch.Tensor = torch.ops.aten._unsafe_view(output, shape)
        return whole

    def merge(self, name: str) -> None:
        """Give the layer the weight W + s B P; keep the old weight for `unmerge`."""
        self.unmerge()
        weight = self.base_layer.get_parameter("weight")
        projection = self.projection(name)
        with torch.no_grad():
            wide = torch.promote_types(weight.dtype, torch.float32)
            lora_B = self.lora_B[name].to(wide) * projection.scale.to(wide)
            delta = self.view.delta_weight(lora_B @ projection.weight.to(wide), weight)
            merged = (weight.to(wide) + delta).to(weight.dtype)
        self._unmerged_weight, self.merged = (weight,), name
        try:
            # A new parameter: a tied weight (of an embedding) must not change.
            self.base_layer.weight = nn.Parameter(merged, requires_grad=False)
        except BaseException:
            self.unmerge()
            raise

    def unmerge(self) -> None:
        """Restore the old weight, bit by bit."""
        if self.merged is not None:
            (self.base_layer.weight,) = self._unmerged_weight
            self._unmerged_weight, self.merged = (), None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        self._unmerged_weight = tuple(_moved(w, fn(w)) for w in self._unmerged_weight)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Name the adapters."""
        state = f"merged={self.merged!r}" if self.merged else f"active={self.active!r}"
        return f"adapters={list(self.lora_B)}, {state}"

    @property
    def __class__(self) -> type:
        """Class of the base layer within a forward pass of the model, which may ask for it."""
        attributes = vars(self)
        lock = attributes.get("pass_lock")
        if lock is None or not lock.in_pass:
            return type(self)
        return type(attributes["_modules"]["base_layer"])

    @__class__.setter
    def __class__(self, kind: type) -> None:  # FSDP2 sets it
        vars(object)["__class__"].__set__(self, kind)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
        if name == "weight":
            if not torch.compiler.is_compiling() and self.pass_lock.in_pass:
                self.weight_read = True
            if self._unmerged_weight:
                return self._unmerged_weight[0]
        return getattr(super().__getattr__("base_layer"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        base = vars(self).get("_modules", {}).get("base_layer")
        if base is None or _has_own(self, name) or not hasattr(base, name):
            super().__setattr__(name, value)
        elif name == "weight" and self.merged is not None:
            raise LayerError(
                f"expected no new weight of a {type(base).__name__} while the adapter "
                f"{self.merged!r} is merged, got one; unmerge first"
            )
        elif name in base._parameters and isinstance(value, torch.Tensor):
            base._parameters[name] = value  # perhaps no parameter: torch.func puts tensors there
        else:
            setattr(base, name, value)


def _has_own(layer: AdapterLayer, name: str) -> bool:
    """Return whether an adapter layer itself, not its base layer, has an attribute."""
    held = (vars(layer)[key] for key in ("_parameters", "_buffers", "_modules"))
    return name in vars(layer) or hasattr(type(layer), name) or any(name in part for part in held)


def _moved(old: nn.Parameter, data: torch.Tensor) -> nn.Parameter:
    """Give a parameter new data, as modules do: what is tied to it stays tied."""
    if torch._has_compatible_shallow_copy_type(old, data):
        old.data = data.detach()
        return old
    return nn.Parameter(data, requires_grad=old.requires_grad)


def adapter_layers(model: nn.Module) -> list[tuple[str, AdapterLayer]]:
    """Return the adapter layers of a model by name."""
    return [
        (name, m) for name, m in unwrap_model(model).named_modules() if isinstance(m, AdapterLayer)
    ]
