"""Adapters of timm models: attach, train, merge and detach."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

timm = pytest.importorskip("timm", reason="needs timm on the path: make test-timm")

import ipa_timm
from ipa_core.errors import SettingError
from ipa_timm.classifier import classifier_parameters
from ipa_torch import LayerError, StoppingCriteria, disable_adapter
from ipa_torch.extension import adapter_layers

SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 64}


def vit(**options):
    return timm.create_model("vit_tiny_patch16_224", num_classes=3, **SMALL | options)


def beit():
    return timm.create_model("beit_base_patch16_224", num_classes=3, **SMALL)


def convnet():
    return timm.create_model("resnet18", num_classes=3, zero_init_last=False)


def loader(batches=2):
    return [(torch.randn(4, 3, 64, 64), torch.randint(0, 3, (4,))) for _ in range(batches)]


def adapt(model, **options):
    return ipa_timm.adapt(model, loader(), 4, progress=False, **options)


def trained(model, steps=3):
    """Train the trainable parameters for a few steps; return the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    images, target = loader(1)[0]
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def everything(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(state, other, names):
    return all(torch.equal(state[name], other[name]) for name in names)


@pytest.mark.parametrize("trainable", [False, True])
def test_b_and_the_head_are_trained_and_p_if_asked_for(trainable):
    model = vit()
    adapt(model, trainable=trainable)
    trainable_names = {name for name, p in model.named_parameters() if p.requires_grad}
    lora_B = {name for name in trainable_names if ".lora_B." in name}
    projections = {name for name in trainable_names if ".projections." in name}
    assert (len(lora_B), len(projections)) == (8, 8 * trainable)
    assert trainable_names == lora_B | projections | {"head.weight", "head.bias"}


@pytest.mark.parametrize("make", [vit, beit, convnet])
def test_training_changes_nothing_but_adapter_and_head(make):
    model = make()
    before, flags = everything(model), {n: p.requires_grad for n, p in model.named_parameters()}
    images = loader(1)[0][0]
    with torch.no_grad():
        base = model.eval()(images)
    adapt(model)
    losses = trained(model, steps=20)
    assert losses[-1] < 0.5 * losses[0]
    head = classifier_parameters(model)
    ipa_timm.detach(model)
    after = everything(model)
    assert after.keys() == before.keys()
    assert same(before, after, before.keys() - head.keys())
    assert not same(before, after, head)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    model.load_state_dict(before)
    with torch.no_grad():
        assert torch.equal(model(images), base)


def test_batch_norms_keep_to_their_statistics_in_training():
    model = convnet()
    adapt(model)
    images = loader(1)[0][0]
    with torch.no_grad():
        evaluated = model.eval()(images)
        torch.testing.assert_close(model.train()(images), evaluated)
    assert model.training and not model.bn1.training
    ipa_timm.detach(model)
    assert model.bn1.training
    before = model.bn1.running_mean.clone()
    model(images)
    assert not torch.equal(model.bn1.running_mean, before)


def test_attention_with_direct_qkv_weight_calls_the_layer_while_adapted():
    model = beit()
    switches = [block.attn for block in model.blocks]
    ipa_timm.fit_projectors(model, loader(), 4, progress=False)
    assert not any(attention.qkv_bias_separate for attention in switches)
    projectors = adapt(model)
    assert "blocks.0.attn.qkv" in projectors and not projectors.missing
    assert all(attention.qkv_bias_separate for attention in switches)
    ipa_timm.merge_and_unload(model)
    assert not any(attention.qkv_bias_separate for attention in switches)
    assert not hasattr(model, "_ipa_timm_separate_qkv_bias")


def test_a_switch_that_was_set_stays_set():
    model = beit()
    model.blocks[1].attn.qkv_bias_separate = True
    adapt(model)
    ipa_timm.detach(model)
    assert [block.attn.qkv_bias_separate for block in model.blocks] == [False, True]


class Bypassing(nn.Module):
    """Attention that uses the qkv weight without calling the layer, and has no switch."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x, **_):
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, dim=-1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


def test_attention_without_the_switch_is_refused_with_the_reason():
    model = vit()
    model.blocks[0].attn = Bypassing()
    with pytest.warns(UserWarning, match="'blocks.0.attn.qkv': its weight is used without calling"):
        projectors = adapt(model)
    assert len(projectors) == 7
    assert "blocks.0.attn.qkv" not in dict(adapter_layers(model))
    with pytest.raises(LayerError, match="'blocks.0.attn.qkv'"):
        ipa_timm.fit_projectors(model, loader(), 4, on_missing="raise", progress=False)


def test_the_classifier_is_trained_and_not_adapted():
    model = vit()
    with pytest.warns(UserWarning, match="'head': it belongs to the classifier, which is trained"):
        projectors = adapt(model, targets=["head", "qkv"])
    assert list(projectors) == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert type(model.head) is nn.Linear


def test_standardized_weights_are_refused_with_the_reason():
    model = timm.create_model("nf_resnet26", num_classes=3)
    with pytest.raises(
        LayerError, match="and 25 more: .* got ScaledStdConv2d with its own forward"
    ):
        ipa_timm.fit_projectors(model, loader(), 4, progress=False)
    assert not adapter_layers(model)


def test_layers_of_one_input_share_one_projector():
    model = timm.create_model("eva02_base_patch14_224", num_classes=3, **SMALL | {"img_size": 56})
    images = [torch.randn(2, 3, 56, 56)]
    projectors = ipa_timm.fit_projectors(model, images, 4, progress=False)
    attention = [f"blocks.0.attn.{part}_proj" for part in "qkv"]
    assert projectors[attention[0]] is projectors[attention[1]] is projectors[attention[2]]


def test_explicit_targets_include_depthwise_convolutions_and_limit_ranks():
    model = timm.create_model("test_efficientnet", num_classes=3)
    targets = [r"conv_dw", "conv_pwl"]
    projectors = ipa_timm.fit_projectors(model, loader(), 12, targets=targets, progress=False)
    ranks = {name: (p.rank, p.features) for name, p in projectors.items() if "conv_dw" in name}
    assert ranks and all(pair == (9, 9) for pair in ranks.values())
    by_name = dict.fromkeys(projectors, 2)
    few = ipa_timm.fit_projectors(model, loader(), by_name, targets=targets, progress=False)
    assert {p.rank for p in few.values()} == {2}


def test_options_of_the_fit_are_passed_on():
    model = convnet()
    stop = StoppingCriteria(max_batches=1)
    projectors = adapt(model, targets=["layer1.0.conv1"], stop=stop, max_patches=7)
    assert projectors["layer1.0.conv1"].samples == 7
    assert projectors.stopped == {"layer1.0.conv1": "max_batches of 1 reached"}


def test_default_targets_exclude_stem_head_and_depthwise_convolutions():
    names = ipa_timm.default_targets(timm.create_model("regnetx_002"))
    assert names and not [name for name in names if name.startswith(("stem", "head"))]
    assert not [
        n for n in ipa_timm.default_targets(timm.create_model("mnasnet_small")) if "dw" in n
    ]


def test_merged_model_is_plain():
    model = convnet()
    adapt(model, trainable=True)
    trained(model)
    images = loader(1)[0][0]
    with torch.no_grad():
        adapted = model(images)
        with disable_adapter(model):
            assert not torch.allclose(model(images), adapted, atol=1e-3)
    ipa_timm.merge_and_unload(model)
    stock = convnet().eval()
    stock.load_state_dict(model.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert not any(m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(stock(images), adapted, rtol=1e-5, atol=1e-5)


def test_distilled_model_trains_both_heads():
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, **SMALL)
    adapt(model)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.partition(".")[0] for name in names if "lora_B" not in name} == {
        "head",
        "head_dist",
    }


def test_model_without_a_head_trains_adapters_alone():
    model = vit()
    model.reset_classifier(0)
    adapt(model)
    assert all("lora_B" in name for name, p in model.named_parameters() if p.requires_grad)


def test_adapters_come_once():
    model = vit()
    adapt(model)
    with pytest.raises(SettingError, match="expected a new name"):
        ipa_timm.attach(model, ipa_timm.fit_projectors(vit(), loader(), 4, progress=False))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("make", [beit, convnet])
def test_adapted_model_can_be_copied(make, copied):
    model = make().eval()
    adapt(model)
    twin, images = copied(model), loader(1)[0][0]
    with torch.no_grad():
        torch.testing.assert_close(twin(images), model(images))
        twin.train()(images)
    trained(twin)
    ipa_timm.merge_and_unload(twin)
    assert not adapter_layers(twin) and adapter_layers(model)
    assert not any(m._forward_pre_hooks for m in twin.modules())


@pytest.mark.parametrize("make", [vit, convnet, beit])
def test_offloaded_as_in_memory(make):
    accelerate = pytest.importorskip("accelerate")
    whole = make()
    split = copy.deepcopy(whole)
    for part in (split.blocks,) if hasattr(split, "blocks") else (split.layer1, split.layer4):
        accelerate.cpu_offload(part, torch.device("cpu"))
    assert any(parameter.is_meta for parameter in split.parameters())
    data = loader()
    for model in (whole, split):
        torch.manual_seed(0)
        ipa_timm.adapt(model, data, 4, progress=False)
        trained(model)
    tensors = dict(split.named_parameters())
    for name, parameter in whole.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, tensors[name]), name
    assert torch.equal(split.eval()(data[0][0]), whole.eval()(data[0][0]))


def test_offloaded_classifier_is_refused(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = vit()
    adapt(model)
    ipa_timm.save_adapter(model, tmp_path / "adapter.safetensors")
    split = accelerate.cpu_offload(vit(), torch.device("cpu"))
    for change in (
        lambda: adapt(split),
        lambda: ipa_timm.load_adapter(split, tmp_path / "adapter.safetensors"),
    ):
        with pytest.raises(LayerError, match=r"classifier 'head.weight': .*in memory"):
            change()
    assert not adapter_layers(split)
