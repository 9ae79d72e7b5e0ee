"""Small models with random weights from packages of model code, and inputs for them."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import nn

BATCH, TOKENS, WIDTH = 2, 16, 32

Inputs = Callable[[], tuple[Any, ...]]


def made(path: str, *args: Any, **options: Any) -> nn.Module:
    """Return what a class of ``module:name`` makes."""
    module, _, name = path.partition(":")
    model = getattr(import_module(module), name)(*args, **options)
    assert isinstance(model, nn.Module)
    return model


def rows(width: int = WIDTH, tokens: int = TOKENS) -> Inputs:
    """Return inputs of shape (batch, tokens, width)."""
    return lambda: (torch.randn(BATCH, tokens, width),)


def ids(tokens: int = TOKENS) -> Inputs:
    """Return token numbers below 50."""
    return lambda: (torch.randint(0, 50, (BATCH, tokens)),)


def images(size: int = 32, channels: int = 3) -> Inputs:
    """Return square images."""
    return lambda: (torch.randn(BATCH, channels, size, size),)


def flat(width: int) -> Inputs:
    """Return inputs of shape (rows, width)."""
    return lambda: (torch.randn(16, width),)


def normalized(model: nn.Module, inputs: Inputs) -> nn.Module:
    """Return a model whose batch norms have the statistics of a batch, and weights of one.

    Otherwise random activations vanish from layer to layer, or branches begin at zero.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        nn.init.ones_(norm.weight)
    with torch.no_grad():
        model.train()(*inputs())
    return model


class Graph(nn.Module):
    """Layers of a graph over the same eight nodes."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the features of the nodes."""
        for layer in self.layers:
            x = layer(x, self.edges).tanh()
        return x


class Flow(nn.Module):
    """Logarithm of the density, of a zuko flow."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a number for each row."""
        density: torch.Tensor = self.flow().log_prob(x)
        return density


class LogProb(nn.Module):
    """Call of a flow's ``log_prob``."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a number for each row."""
        density: torch.Tensor = self.flow.log_prob(x)  # type: ignore[operator]
        return density


class Frames(nn.Module):
    """Call of a layer with the frames of points, as keywords."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the features of the points."""
        rotations = torch.eye(3).expand(*x.shape[:2], 3, 3)
        points: torch.Tensor = self.layer(
            x, rotations=rotations, translations=torch.zeros(*x.shape[:2], 3)
        )
        return points


def _x_transformer() -> nn.Module:
    layers = made("x_transformers:Decoder", dim=32, depth=2, heads=2, attn_dim_head=16)
    return made("x_transformers:TransformerWrapper", num_tokens=50, max_seq_len=16,
                attn_layers=layers)  # fmt: skip


def _nflow() -> nn.Module:
    base = made("nflows.distributions.normal:StandardNormal", shape=[8])
    transform = made("nflows.transforms.autoregressive:MaskedAffineAutoregressiveTransform",
                     features=8, hidden_features=16)  # fmt: skip
    return LogProb(made("nflows.flows.base:Flow", transform, base))


def _normflow() -> nn.Module:
    flows = [
        made("normflows.flows:MaskedAffineFlow", torch.tensor([1.0, 0.0] * 4),
             made("normflows.nets:MLP", [8, 16, 8]), made("normflows.nets:MLP", [8, 16, 8]))
        for _ in range(2)
    ]  # fmt: skip
    base = made("normflows.distributions:DiagGaussian", 8)
    return LogProb(made("normflows:NormalizingFlow", base, flows))


def _loralib() -> nn.Module:
    return nn.Sequential(made("loralib:Linear", 16, 16, r=2), nn.ReLU(),
                         made("loralib:MergedLinear", 16, 12, r=2,
                              enable_lora=[True, False, True]))  # fmt: skip


def _graph(name: str, width: int = 16, **options: Any) -> nn.Module:
    return Graph(*(made(f"torch_geometric.nn:{name}", width, width, **options) for _ in range(2)))


def _egnn() -> tuple[Any, ...]:
    return torch.randn(1, 8, 16), torch.randn(1, 8, 3)


def _tab() -> tuple[Any, ...]:
    return torch.randint(0, 5, (BATCH, 3)), torch.randn(BATCH, 4)


#: Package and model, maker, inputs.
MODELS: list[tuple[str, str, Callable[[], nn.Module], Inputs]] = [
    ("x-transformers", "TransformerWrapper", _x_transformer, ids()),
    ("performer-pytorch", "PerformerLM", lambda: made(
        "performer_pytorch:PerformerLM", num_tokens=50, max_seq_len=16, dim=32, depth=1, heads=2,
        dim_head=16), ids()),
    ("linformer", "Linformer", lambda: made(
        "linformer:Linformer", dim=32, seq_len=16, depth=2, heads=2, k=8), rows()),
    ("reformer-pytorch", "ReformerLM", lambda: made(
        "reformer_pytorch:ReformerLM", num_tokens=50, dim=32, depth=1, max_seq_len=16, heads=2,
        bucket_size=4, n_hashes=2), ids()),
    ("perceiver-pytorch", "Perceiver", lambda: made(
        "perceiver_pytorch:Perceiver", num_freq_bands=2, depth=1, max_freq=4.0, input_channels=3,
        num_latents=8, latent_dim=32, cross_dim_head=16, latent_heads=2, latent_dim_head=16,
        num_classes=5), lambda: (torch.randn(BATCH, 8, 8, 3),)),
    ("linear-attention-transformer", "LinearAttentionTransformerLM", lambda: made(
        "linear_attention_transformer:LinearAttentionTransformerLM", num_tokens=50, dim=32, heads=2,
        depth=1, max_seq_len=16), ids()),
    ("sinkhorn-transformer", "SinkhornTransformerLM", lambda: made(
        "sinkhorn_transformer:SinkhornTransformerLM", num_tokens=50, dim=32, heads=2, depth=1,
        max_seq_len=16, bucket_size=4), ids()),
    ("conformer", "ConformerBlock", lambda: made(
        "conformer:ConformerBlock", dim=32, dim_head=16, heads=2), rows()),
    ("g-mlp-pytorch", "gMLP", lambda: made(
        "g_mlp_pytorch:gMLP", num_tokens=50, dim=32, depth=2, seq_len=16), ids()),
    ("mlp-mixer-pytorch", "MLPMixer", lambda: made(
        "mlp_mixer_pytorch:MLPMixer", image_size=32, channels=3, patch_size=8, dim=32, depth=2,
        num_classes=5), images()),
    ("axial-attention", "AxialAttention", lambda: made(
        "axial_attention:AxialAttention", dim=32, dim_index=1, heads=2, num_dimensions=2),
     images(8, 32)),
    ("local-attention", "LocalTransformer", lambda: made(
        "local_attention:LocalTransformer", num_tokens=50, dim=32, depth=1, max_seq_len=16,
        local_attn_window_size=8, heads=2, dim_head=16, causal=True), ids()),
    ("routing-transformer", "RoutingTransformer", lambda: made(
        "routing_transformer:RoutingTransformer", dim=32, heads=2, depth=1, max_seq_len=16,
        window_size=8), rows()),
    ("egnn-pytorch", "EGNN", lambda: made("egnn_pytorch:EGNN", dim=16), _egnn),
    ("soft-moe-pytorch", "SoftMoE", lambda: made(
        "soft_moe_pytorch:SoftMoE", dim=32, seq_len=16, num_experts=2), rows()),
    ("mixture-of-experts", "MoE", lambda: made(
        "mixture_of_experts:MoE", dim=32, num_experts=4), rows()),
    ("vector-quantize-pytorch", "VectorQuantize", lambda: made(
        "vector_quantize_pytorch:VectorQuantize", dim=32, codebook_size=16, codebook_dim=8),
     rows()),
    ("tab-transformer-pytorch", "FTTransformer", lambda: made(
        "tab_transformer_pytorch:FTTransformer", categories=(5, 5, 5), num_continuous=4, dim=16,
        depth=1, heads=2, dim_head=8), _tab),
    ("siren-pytorch", "SirenNet", lambda: made(
        "siren_pytorch:SirenNet", dim_in=2, dim_hidden=16, dim_out=3, num_layers=2), flat(2)),
    ("nystrom-attention", "Nystromformer", lambda: made(
        "nystrom_attention:Nystromformer", dim=32, dim_head=16, heads=2, depth=1, num_landmarks=4),
     rows()),
    ("mega-pytorch", "Mega", lambda: made(
        "mega_pytorch.mega_pytorch:Mega", num_tokens=50, dim=32, depth=1), ids()),
    ("efficientnet-pytorch", "EfficientNet", lambda: normalized(import_module(
        "efficientnet_pytorch").EfficientNet.from_name("efficientnet-b0", num_classes=5),
        images(64)), images(64)),
    ("pytorch-tcn", "TCN", lambda: made(
        "pytorch_tcn:TCN", num_inputs=8, num_channels=[16, 16]),
     lambda: (torch.randn(BATCH, 8, 20),)),
    ("torch-geometric", "GCNConv", lambda: _graph("GCNConv"), lambda: (torch.randn(8, 16),)),
    ("torch-geometric", "GATv2Conv", lambda: _graph("GATv2Conv"), lambda: (torch.randn(8, 16),)),
    ("torch-geometric", "SAGEConv", lambda: _graph("SAGEConv"), lambda: (torch.randn(8, 16),)),
    ("loralib", "Linear, MergedLinear", _loralib, flat(16)),
    ("normflows", "MaskedAffineFlow", _normflow, flat(8)),
    ("nflows", "MaskedAffineAutoregressiveTransform", _nflow, flat(8)),
    ("zuko", "MAF", lambda: Flow(made("zuko.flows:MAF", 8, hidden_features=[16, 16])), flat(8)),
    ("monai", "UNETR", lambda: made(
        "monai.networks.nets:UNETR", in_channels=1, out_channels=2, img_size=32, feature_size=4,
        hidden_size=32, mlp_dim=64, num_heads=2, spatial_dims=2), images(32, 1)),
    ("monai", "SwinUNETR", lambda: made(
        "monai.networks.nets:SwinUNETR", in_channels=1, out_channels=2, feature_size=12,
        spatial_dims=2, depths=(1, 1, 1, 1)), images(64, 1)),
    ("memory-efficient-attention-pytorch", "Attention", lambda: made(
        "memory_efficient_attention_pytorch:Attention", dim=32, dim_head=16, heads=2,
        memory_efficient=True, q_bucket_size=8, k_bucket_size=8), rows()),
    ("simple-hierarchical-transformer", "HierarchicalTransformer", lambda: made(
        "simple_hierarchical_transformer:HierarchicalTransformer", num_tokens=50, dim=32, depth=1,
        seq_len=16, hierarchies=(1, 2), window_sizes=(8, None), dim_head=16, heads=2), ids()),
    ("bottleneck-transformer-pytorch", "BottleStack", lambda: normalized(made(
        "bottleneck_transformer_pytorch:BottleStack", dim=16, fmap_size=8, dim_out=16,
        proj_factor=4, num_layers=1, heads=2, dim_head=8, downsample=False), images(8, 16)),
     images(8, 16)),
    ("lambda-networks", "LambdaLayer", lambda: made(
        "lambda_networks:LambdaLayer", dim=16, dim_out=16, n=8, dim_k=8, heads=2), images(8, 16)),
    ("glom-pytorch", "Glom", lambda: made(
        "glom_pytorch:Glom", dim=16, levels=3, image_size=16, patch_size=4), images(16)),
    ("slot-attention", "SlotAttention", lambda: made(
        "slot_attention:SlotAttention", num_slots=3, dim=32, iters=2), rows()),
    ("timesformer-pytorch", "TimeSformer", lambda: made(
        "timesformer_pytorch:TimeSformer", dim=32, image_size=16, patch_size=8, num_frames=2,
        num_classes=5, depth=1, heads=2, dim_head=16),
     lambda: (torch.randn(1, 2, 3, 16, 16),)),
    ("invariant-point-attention", "IPABlock", lambda: Frames(made(
        "invariant_point_attention:IPABlock", dim=16, heads=2, scalar_key_dim=4, scalar_value_dim=4,
        point_key_dim=2, point_value_dim=2, require_pairwise_repr=False)),
     lambda: (torch.randn(1, 8, 16),)),
    ("agent-attention-pytorch", "AgentTransformer", lambda: made(
        "agent_attention_pytorch:AgentTransformer", dim=32, num_agent_tokens=4, depth=1, heads=2,
        dim_head=16), rows()),
    ("res-mlp-pytorch", "ResMLP", lambda: made(
        "res_mlp_pytorch:ResMLP", image_size=32, patch_size=8, dim=32, depth=2, num_classes=5),
     images()),
    ("point-transformer-pytorch", "PointTransformerLayer", lambda: made(
        "point_transformer_pytorch:PointTransformerLayer", dim=16, pos_mlp_hidden_dim=8,
        attn_mlp_hidden_mult=2), _egnn),
    ("block-recurrent-transformer-pytorch", "BlockRecurrentTransformer", lambda: made(
        "block_recurrent_transformer_pytorch:BlockRecurrentTransformer", num_tokens=50, dim=32,
        depth=2, dim_head=16, heads=2, max_seq_len=32, block_width=16, num_state_vectors=8,
        recurrent_layers=(2,), use_flash_attn=False), ids()),
]  # fmt: skip
