"""The backbone of an ONNX graph that transformers exported, under timm's names."""

import numpy as np
import onnx
import torch
from onnx import numpy_helper

_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_PARTS = [f"attention.attention.{part}" for part in ("query", "key", "value")]


def timm_weights(graph: bytes) -> dict[str, torch.Tensor]:
    """Return the weights of a Dinov2Model in an ONNX graph as timm's vision transformer has them.

    Weights of linear layers are anonymous there and transposed; the node that multiplies by one
    says whose it is.
    """
    found = onnx.load_model_from_string(graph).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in found.initializer}
    named = {name.removeprefix("backbone."): array for name, array in arrays.items()}
    for node in found.node:
        weight = next((name for name in node.input if name in arrays), None)
        if node.op_type == "MatMul" and weight and node.name.startswith("/backbone/"):
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            named[f"{layer}.weight"] = arrays[weight].T
    first, grid = (
        next(array for name, array in arrays.items() if name.startswith("onnx::") and fits(array))
        for fits in (_is_class_position, _is_grid_of_positions)
    )
    patches = "embeddings.patch_embeddings.projection"
    weights = {
        "cls_token": named["embeddings.cls_token"],
        "pos_embed": np.concatenate([first, grid], axis=1),
        "patch_embed.proj.weight": named[f"{patches}.weight"],
        "patch_embed.proj.bias": named[f"{patches}.bias"],
        "norm.weight": named["layernorm.weight"],
        "norm.bias": named["layernorm.bias"],
    }
    for number in range(sum(name.endswith("layer_scale1.lambda1") for name in named)):
        old, new = f"encoder.layer.{number}", f"blocks.{number}"
        for part in ("weight", "bias"):
            for theirs, ours in _BLOCK.items():
                weights[f"{new}.{ours}.{part}"] = named[f"{old}.{theirs}.{part}"]
            qkv = [named[f"{old}.{one}.{part}"] for one in _PARTS]
            weights[f"{new}.attn.qkv.{part}"] = np.concatenate(qkv)
        for side in "12":
            weights[f"{new}.ls{side}.gamma"] = named[f"{old}.layer_scale{side}.lambda1"]
    return {name: torch.tensor(array.copy(order="C")) for name, array in weights.items()}


def _is_class_position(array: np.ndarray) -> bool:
    return array.ndim == 3 and array.shape[:2] == (1, 1)


def _is_grid_of_positions(array: np.ndarray) -> bool:
    return array.ndim == 3 and array.shape[0] == 1 and array.shape[1] > 1
