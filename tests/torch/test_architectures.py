"""Model architectures, each against the exact optimum of inputs captured without the library."""

import pytest
import torch
from torch import nn

from ipa_core import ExactCovariance, RandomizedSVD
from ipa_torch import LayerError, attach, detach, disable_adapter, fit_projectors, merge, unmerge

from .models import (
    Bypassed,
    Convolutions,
    Experts,
    Int8Linear,
    LSTMTagger,
    Tied,
    Transformer,
    decaying,
    excess,
    mlp,
)


def captured_rows(model, names, batches, call):
    """Inputs of layers as rows, by code that has nothing in common with the library's."""
    seen = {name: [] for name in names}

    def keep(name):
        def hook(module, args, kwargs):
            seen[name].append((args or tuple(kwargs.values()))[0].detach().clone())

        return hook

    handles = [
        model.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True)
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            call(model, batch)
    for handle in handles:
        handle.remove()
    return {
        name: torch.cat([by_hand(model.get_submodule(name), x) for x in inputs])
        for name, inputs in seen.items()
    }


def by_hand(module, x):
    """Rows of one input: patches are read off the weight's gradient-free linearity."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return x.reshape(-1, x.shape[-1])
    # A convolution with one-hot kernels gives each entry of the patches.
    size = module.weight[0].numel()
    groups, like = module.groups, module.weight
    kernels = torch.eye(size).reshape(size, *like.shape[1:]).to(like)
    with torch.no_grad():
        entries = module._conv_forward(x, kernels.repeat(groups, *[1] * (like.ndim - 1)), None)
    return entries.unflatten(1, (groups, size)).movedim(2, -1).reshape(-1, size)


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_positions=16, n_embd=12, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q", "v"], r=2, init_lora_weights=False)
    return peft.get_peft_model(Transformer(blocks=1, keywords=False), config)


def quantized():
    return nn.Sequential(Int8Linear(nn.Linear(12, 16)), nn.ReLU(), Int8Linear(nn.Linear(16, 4)))


def ids(vocabulary):
    return [torch.randint(0, vocabulary, (6, 9)) for _ in range(5)]


KINDS = {
    "MLP": (lambda: mlp(12, 16, 4), lambda: decaying(400, 12).split(50), None, 3),
    "CNN, grouped and strided": (
        Convolutions,
        lambda: [torch.randn(4, 3, 9, 8) for _ in range(4)],
        ["strided", "grouped", "reflected", "line"],
        3,
    ),
    "transformer, keyword calls": (Transformer, lambda: ids(20), None, 3),
    "LSTM with a linear head": (
        LSTMTagger,
        lambda: [torch.randn(4, 7, 6) for _ in range(5)],
        None,
        3,
    ),
    "GPT-2, Conv1D": (gpt2, lambda: ids(20), None, 3),
    "tied weights": (Tied, lambda: ids(10), ["hidden", "head"], 3),
    "quantized": (quantized, lambda: decaying(400, 12).split(50), None, 3),
    "inside LoRA": (lora, lambda: ids(20), None, 3),
    "expert that batches skip": (
        Experts,
        lambda: (
            [0.2 * torch.randn(2, 6) for _ in range(3)] + [3 * torch.randn(20, 6) for _ in range(4)]
        ),
        None,
        2,
    ),
}


@pytest.fixture(params=list(KINDS))
def kind(request):
    make, batches, targets, rank = KINDS[request.param]
    torch.manual_seed(0)
    return make().eval(), batches(), targets or "all-linear", rank


def call(model, batch):
    return model(batch)


def tensor_of(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("learner", [ExactCovariance, RandomizedSVD])
def test_excess_over_the_optimum_of_inputs_captured_by_hand(kind, learner):
    model, batches, targets, rank = kind
    projectors = fit_projectors(
        model, batches, rank, targets=targets, learner=learner, progress=False, max_patches=None
    )
    rows = captured_rows(model, list(projectors), batches, call)
    bound = 1e-5 if learner is ExactCovariance else learner.guarantee.excess
    assert projectors and not projectors.missing
    for name, projector in projectors.items():
        assert projector.samples == rows[name].shape[0], name
        assert excess(projector, rows[name]) < bound, name


def test_adapters_train_merge_and_go(kind):
    model, batches, targets, rank = kind
    projectors = fit_projectors(model, batches, rank, targets=targets, progress=False)
    batch = batches[-1]
    before = tensor_of(call(model, batch)).detach()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    attach(model, projectors)
    torch.testing.assert_close(tensor_of(call(model, batch)).detach(), before)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    tensor_of(call(model, batch)).square().mean().backward()
    assert all(p.grad is not None for p in optimizer.param_groups[0]["params"])
    optimizer.step()
    trained = tensor_of(call(model, batch)).detach()
    assert not torch.allclose(trained, before, atol=1e-6)
    if any(hasattr(module, "lora_A") or hasattr(module, "steps") for module in model.modules()):
        with pytest.raises(LayerError, match="expected a floating weight to merge into"):
            merge(model)
    else:
        merge(model)
        merged = tensor_of(call(model, batch)).detach()
        torch.testing.assert_close(merged, trained, rtol=1e-5, atol=1e-5)
        unmerge(model)
    with disable_adapter(model):
        torch.testing.assert_close(tensor_of(call(model, batch)).detach(), before)
    detach(model)
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in weights.items()
    }
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def test_patches_within_a_budget():
    model, batches = Convolutions(), [torch.randn(8, 3, 17, 16) for _ in range(6)]
    few = fit_projectors(
        model, batches, 3, targets=["strided", "grouped"], max_patches=100, progress=False
    )
    assert few["strided"].samples == 6 * 100
    assert few["grouped"].samples == 6 * 100 * 4
    every = captured_rows(model.eval(), ["strided", "grouped"], batches, call)
    for name, projector in few.items():
        assert excess(projector, every[name]) < 0.05


def test_transposed_convolution_is_refused():
    model = nn.Sequential(nn.ConvTranspose2d(2, 2, 3))
    with pytest.raises(LayerError, match="layer '0': expected a layer that multiplies rows"):
        fit_projectors(model, [torch.ones(1, 2, 4, 4)], 1, targets=["0"], progress=False)


def test_bypassed_layer_is_reported():
    with pytest.warns(UserWarning, match="'qkv': its weight is used without calling it"):
        projectors = fit_projectors(Bypassed(), [torch.randn(20, 6)], 2, progress=False)
    assert list(projectors) == ["out"]


def test_attention_output_is_reported_and_refused():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    batches = [torch.randn(4, 5, 8)]
    with pytest.warns(UserWarning, match="'self_attn.out_proj': its weight is used"):
        projectors = fit_projectors(model, batches, 2, progress=False)
    assert list(projectors) == ["linear1", "linear2"]
    with pytest.raises(LayerError, match="MultiheadAttention"):
        attach(model, {"self_attn.out_proj": projectors["linear1"]})


def test_encoder_layer_in_evaluation_does_not_read_past_the_adapters():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(4, 5, 8)
    attach(model, fit_projectors(model, [x], 2, on_missing="ignore", progress=False))
    with torch.no_grad():
        before = model(x)
        model.linear1.lora_B["default"].normal_()
        assert not torch.allclose(model(x), before, atol=1e-3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_that_nests_padded_rows():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    mask = torch.arange(5).expand(4, 5) > 2
    batch = {"src": torch.randn(4, 5, 8), "src_key_padding_mask": mask}
    projectors = fit_projectors(model, [batch], 2, on_missing="ignore", progress=False)
    with torch.no_grad():
        before = model(**batch)
        attach(model, projectors)
        torch.testing.assert_close(model(**batch), before)


def test_mixed_precision():
    model, batches = mlp(12, 16, 4), decaying(400, 12).split(50)

    def forward(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(batch)

    projectors = fit_projectors(
        model, batches, 3, learner=ExactCovariance, forward=forward, progress=False
    )
    rows = captured_rows(model, list(projectors), batches, forward)
    for name, projector in projectors.items():
        assert excess(projector, rows[name].float()) < 1e-5
    attach(model, projectors)
    forward(model, batches[0]).square().mean().backward()
    assert model[0].lora_B["default"].grad.dtype == torch.float32


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_two_devices():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 12).to("cuda:0"), nn.Linear(12, 4).to("cuda:1")

        def forward(self, x):
            return self.b(self.a(x).to("cuda:1"))

    model, batches = Split(), decaying(400, 12).split(50)
    projectors = fit_projectors(model, batches, 3, progress=False)
    assert str(projectors["b"].components.device) == "cuda:1"
