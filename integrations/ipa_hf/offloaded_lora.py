"""LoRA matrices of layers whose base weights are offloaded."""

from __future__ import annotations

from peft.tuners.lora import LoraLayer

from ipa_core.errors import SettingError, with_context
from ipa_hf.lora_layers import lora_A_and_B
from ipa_torch import LayerError
from ipa_torch.extension import execution_device


def materialize(name: str, layer: LoraLayer, adapter_name: str) -> None:
    """Allocate and initialize A and B that PEFT left on the meta device (offloaded layers).

    accelerate loads the base weights of an offloaded layer when the layer runs. A and B are small
    and stay on the device where it runs, initialized as in LoRA.

    Raises
    ------
    LayerError
        If the base weights were never loaded.
    SettingError
        If the adapter needs them in memory (DoRA).
    """
    if adapter_name not in layer.lora_B or not lora_A_and_B(layer, adapter_name)[1].is_meta:
        return
    try:
        device = execution_device(layer.get_base_layer())
    except LayerError as error:
        raise with_context(error, f"layer {name!r}") from error
    if layer.use_dora[adapter_name]:
        raise SettingError(
            f"layer {name!r}: expected a layer in memory, as DoRA needs norms of its weights, got "
            "an offloaded one; load it without offloading, or use no DoRA"
        )
    for part in (layer.lora_A, layer.lora_B):
        part[adapter_name].to_empty(device=device)
    layer.reset_lora_parameters(adapter_name, True)
