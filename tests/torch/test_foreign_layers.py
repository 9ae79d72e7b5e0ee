"""Layers of other libraries' kinds: adapted and merged right, or refused by name."""

import collections
import copy
import functools
import threading
import types
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from ipa_core.errors import ArrayTypeError, FileFormatError, IPAError, SettingError
from ipa_torch import (
    LayerError,
    adapter_state_dict,
    attach,
    detach,
    fit_projectors,
    load_adapter_state_dict,
    merge,
    select_layers,
    unmerge,
)
from ipa_torch._capture.eval_mode import eval_mode

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


class EqualLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 0.25, self.bias)


class CosineLinear(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight), self.bias)


class ReluLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


class ClampedLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x.clamp(-20, 20), self.weight, self.bias)


class CastingLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class GraphLinear(nn.Module):
    """No nn.Linear, and with the names of graph libraries."""

    def __init__(self, features, outputs):
        super().__init__()
        self.in_channels, self.out_channels = features, outputs
        self.weight = nn.Parameter(torch.randn(outputs, features) / 4)

    def forward(self, x):
        return x @ self.weight.T


class TupleLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


X = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))


def around(layer):
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(16, 4))


def adapted(model):
    attach(model, fit_projectors(model, [X], 4, progress=False))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    return model


@pytest.mark.parametrize("kind", [EqualLinear, CosineLinear, ReluLinear, ClampedLinear])
def test_layer_that_is_not_its_weight_adapts_and_refuses_to_merge(kind):
    model = adapted(around(kind(16, 16)))
    before = model(X)
    with pytest.raises(LayerError, match=f"layer '0': expected a layer .* got a {kind.__name__}"):
        merge(model)
    assert torch.equal(model(X), before) and all(m.merged is None for m in (model[0], model[2]))


@pytest.mark.parametrize("kind", [CastingLinear, GraphLinear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_that_passes_the_proof_is_merged(kind, dtype):
    model = around(kind(16, 16)).to(dtype)
    assert list(select_layers(model)) == ["0", "2"]
    x = X.to(dtype)
    attach(model, fit_projectors(model, [x], 4, progress=False))
    model[0].lora_B["default"].data.normal_(std=0.1)
    before = model(x)
    merge(model)
    error = (model(x) - before).abs().max() / before.abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 5e-2)


class GatedLinear(nn.Linear):
    def forward(self, x, gate=None, shift=None):
        y = F.linear(x if shift is None else x + shift, self.weight, self.bias)
        return y if gate is None else y * gate


@pytest.mark.parametrize("name", ["gate", "shift"])
@pytest.mark.parametrize("by_name", [False, True])
def test_layer_called_with_other_arguments_is_not_merged(name, by_name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.alone = GatedLinear(16, 4), True

        def forward(self, x):
            other = None if self.alone else x[:, :4] if name == "gate" else x
            keywords = {name: other} if by_name else {}
            values = () if by_name else (other,) if name == "gate" else (None, other)
            return self.layer(x, *values, **keywords)

    model = adapted(Net())
    before = model(X)
    merge(model)
    torch.testing.assert_close(model(X), before)
    model.alone = False
    with pytest.raises(LayerError, match="got other arguments; unmerge"):
        model(X)
    unmerge(model)
    model(X)
    with pytest.raises(LayerError, match="layer 'layer': .*got other arguments; leave"):
        merge(model)


@pytest.mark.parametrize("hook", ["pre", "post", "both"])
def test_hooks_act_on_the_adapted_layer_merged_or_not(hook):
    model, seen = around(nn.Linear(16, 16)), []
    if hook != "post":
        model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    if hook != "pre":
        model[0].register_forward_hook(lambda module, args, output: output.tanh())
    layer = model[0]
    handle = layer.register_forward_hook(lambda module, *_: seen.append(module))
    expected = model(X)
    attach(model, fit_projectors(model, [X], 4, progress=False))
    torch.testing.assert_close(model(X), expected)
    model[0].lora_B["default"].data.normal_()
    before = model(X)
    merge(model)
    torch.testing.assert_close(model(X), before)
    unmerge(model)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(X), before)
    handle.remove()
    detach(model)
    assert model[0] is layer and {*seen} >= {layer}
    count = len(seen)
    assert torch.equal(model(X), expected) and len(seen) == count


def test_hooks_see_no_probe():
    model, seen = around(nn.Linear(16, 16)), []
    model[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    fit_projectors(model, [X], 4, progress=False)
    assert seen == [X.shape]


@pytest.mark.parametrize("where", ["layer", "pre", "global"])
def test_backward_hooks_run_in_training(where):
    model, seen = around(nn.Linear(16, 16)), []
    record = lambda *_: seen.append(1)  # noqa: E731
    if where == "global":
        handle = nn.modules.module.register_module_full_backward_hook(record)
    elif where == "layer":
        handle = model[2].register_full_backward_hook(record)
    else:
        handle = model[2].register_full_backward_pre_hook(record)
    try:
        attach(model, fit_projectors(model, [X], 4, progress=False))
        model(X.clone().requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert seen and model[2].lora_B["default"].grad is not None


@pytest.mark.parametrize(
    "kind", [lambda: nn.LayerNorm(16), lambda: around(nn.Linear(16, 16)),
             lambda: TupleLinear(16, 16), lambda: torch.jit.script(nn.Linear(16, 16))]
)  # fmt: skip
def test_unsupported_targets_are_refused_before_learning(kind):
    ran = []
    model = nn.Sequential(nn.Identity(), kind())
    with pytest.raises(LayerError, match="layer '1'"):
        fit_projectors(
            model, [X], 4, targets=["1"], forward=lambda m, x: ran.append(1), progress=False
        )
    assert not ran


def test_lazy_layer_is_not_initialized_by_the_check():
    model = nn.Sequential(nn.LazyLinear(4))
    assert fit_projectors(model, [X], 2, progress=False)["0"].features == 16


def test_scripted_part_is_left_out_by_default():
    model = nn.Sequential(nn.Linear(16, 16), torch.jit.script(nn.Sequential(nn.Linear(16, 4))))
    assert list(fit_projectors(model, [X], 2, progress=False)) == ["0"]


@pytest.mark.parametrize(
    ("batch", "run"),
    [
        (X.to_sparse(), None),
        (torch.nested.nested_tensor([X, X[:3]], layout=torch.jagged), None),
        (X, lambda model, x: torch.vmap(model)(x)),
    ],
)
def test_inputs_without_rows_are_refused_with_the_layer(batch, run):
    with pytest.raises(ArrayTypeError, match="layer '0': expected"):
        fit_projectors(around(nn.Linear(16, 16)), [batch], 4, forward=run, progress=False)


def test_merge_is_all_or_nothing(monkeypatch):
    model = adapted(around(nn.Linear(16, 16)))
    before, weights = model(X), [model[0].weight, model[2].weight]

    def fails(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(model[2], "merge", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        merge(model)
    assert torch.equal(model(X), before)
    assert model[0].weight is weights[0] and model[2].weight is weights[1]


@pytest.mark.parametrize(
    "part", [parametrizations.spectral_norm, parametrizations.weight_norm,
             nn.utils.spectral_norm]
)  # fmt: skip
def test_reparametrized_layer_is_left_as_it_was(part):
    model = around(part(nn.Linear(16, 16)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    attach(model, fit_projectors(model, [X], 4, progress=False))
    detach(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_training_flags_are_set_without_train():
    calls = []

    class Merging(nn.Linear):
        def train(self, mode=True):
            calls.append(mode)
            return super().train(mode)

    model = around(Merging(16, 16))
    attach(model, fit_projectors(model, [X], 4, progress=False))
    detach(model)
    assert not calls


def test_tie_outlives_a_move_while_merged():
    embed, head = nn.Embedding(10, 16), nn.Linear(16, 10, bias=False)
    head.weight = embed.weight
    model = nn.Sequential(embed, nn.Linear(16, 16), head)
    ids = torch.randint(0, 10, (4, 5))
    assert list(select_layers(model)) == ["1"]
    attach(model, fit_projectors(model, [ids], 2, targets=["2"], progress=False))
    merge(model)
    model.double()
    unmerge(model)
    assert model[2].weight is embed.weight and embed.weight.dtype == torch.float64


@pytest.mark.parametrize("other", ["embedding", "linear", "shared module"])
def test_merged_weight_that_was_tied_is_told(other):
    head = nn.Linear(16, 16, bias=False)
    tied = {
        "embedding": nn.Embedding(16, 16),
        "linear": nn.Linear(16, 16, bias=False),
        "shared module": nn.ParameterList([nn.Parameter(torch.zeros(16, 16))]),
    }[other]
    head.weight = tied[0] if other == "shared module" else tied.weight
    model = nn.Sequential(nn.Linear(16, 16), head, nn.Identity())
    model[2].tied = tied
    attach(model, fit_projectors(model, [X], 2, targets=["1"], progress=False))
    merge(model)
    with pytest.warns(UserWarning, match="weight of layer '1' .* was tied"):
        detach(model)
    assert model[1].weight is not (tied[0] if other == "shared module" else tied.weight)


class ScaledTensor(torch.Tensor):
    """A tensor of another class, as quantization libraries make them."""


class LoudParameter(nn.Parameter):
    pass


@pytest.mark.parametrize("kind", ["parameter", "tensor", "meta", "shard"])
def test_weight_of_another_class_is_not_merged_into(tmp_path, kind):
    from torch import distributed

    model = adapted(around(nn.Linear(16, 16)))
    before, weight = model(X), model[2].base_layer.weight
    layer = model[2].base_layer
    if kind == "parameter":
        layer.weight = LoudParameter(weight.detach())
    elif kind == "tensor":
        layer.weight = nn.Parameter(weight.detach().as_subclass(ScaledTensor))
    elif kind == "meta":
        layer.weight = nn.Parameter(weight.detach().to("meta"))
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
        )
    try:
        if kind == "shard":
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(LayerError, match=r"layer '[02]': expected a weight that is"):
            merge(model)
        assert all(layer.merged is None for layer in (model[0], model[2]))
        if kind != "meta":
            torch.testing.assert_close(torch.as_tensor(model(X)), before)
    finally:
        if kind == "shard":
            distributed.destroy_process_group()


@pytest.mark.parametrize("change", ["outputs", "rank", "scale", "matrix", "number", "dropout"])
def test_misfit_state_changes_nothing(change):
    model = adapted(around(nn.Linear(16, 16)))
    state, options, before = dict(adapter_state_dict(model)), {}, model(X)
    if change == "outputs":
        state["layers.2.lora_B"] = state["layers.2.lora_B"][:1]
    elif change == "rank":
        state["layers.2.lora_B"] = state["layers.2.lora_B"][:, :1]
    elif change == "scale":
        state["projections.1.scale"] = torch.tensor(float("nan"))
    elif change == "matrix":
        state["projections.1.weight"] = torch.zeros(3)
    elif change == "number":
        state["layers.2.projection"] = torch.zeros(2)
    else:
        options = {"dropout": 2.0}
    with pytest.raises((FileFormatError, SettingError)) as error:
        load_adapter_state_dict(model, state, **options)
    assert isinstance(error.value, IPAError) and torch.equal(model(X), before)


@pytest.mark.parametrize("wrapper", ["DDP", "DDP inside", "FSDP2"])
def test_attached_after_wrapping_is_refused(tmp_path, wrapper):
    from torch import distributed

    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        plain = around(nn.Linear(16, 16))
        projectors = fit_projectors(plain, [X], 4, progress=False)
        state = adapter_state_dict(adapted(copy.deepcopy(plain)))
        if wrapper == "FSDP2":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            model = fully_shard(plain, mesh=init_device_mesh("cpu", (1,)))
        else:
            model = nn.parallel.DistributedDataParallel(plain)
            model = nn.Sequential(model) if wrapper == "DDP inside" else model
        for call in (lambda: attach(model, projectors),
                     lambda: load_adapter_state_dict(model, state)):  # fmt: skip
            with pytest.raises(SettingError, match="first, then wrap"):
                call()
    finally:
        distributed.destroy_process_group()


def test_overlapping_fits_restore_the_switches_of_torch():
    entered, leave, first = threading.Event(), threading.Event(), nn.Linear(2, 2)

    def other():
        with eval_mode(nn.Linear(2, 2)):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with eval_mode(first):
        thread.start()
        assert entered.wait(10)
    assert not torch.backends.mha.get_fastpath_enabled()  # the other one still runs
    leave.set()
    thread.join()
    assert torch.backends.mha.get_fastpath_enabled()


class Held(nn.Module):
    """Calls its layer by what else than its name holds it."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.layer, layer = nn.Linear(16, 4), None
        layer = self.layer
        self.how, self.calls = how, {
            "list": [layer],
            "nested": {"a": [{"b": layer}]},
            "closure": lambda x: layer(x),
            "closure of a closure": (lambda inner: lambda x: inner(x))(lambda x: layer(x)),
            "hidden module": [nn.Sequential(layer)],
            "tuple": (layer,),
            "set": {layer},
            "bound": layer.forward,
            "partial": functools.partial(nn.Module.__call__, layer),
            "deque": collections.deque([layer]),
            "subclass of list": type("Layers", (list,), {})([layer]),
            "object": types.SimpleNamespace(call=layer),
            "weak reference": weakref.ref(layer),
            "default argument": lambda x, held=layer: held(x),
        }[how]  # fmt: skip
        self.__dict__["attribute"] = layer

    def forward(self, x):
        if self.how in ("tuple", "set"):
            return next(iter(self.calls))(x)
        if self.how == "nested":
            return self.calls["a"][0]["b"](x)
        if self.how == "object":
            return self.calls.call(x)
        if self.how == "weak reference":
            return self.calls()(x)
        listed = isinstance(self.calls, (list, collections.deque))
        return self.calls[0](x) if listed else self.calls(x)


@pytest.mark.parametrize(
    "how", ["list", "nested", "closure", "closure of a closure", "hidden module", "deque",
            "subclass of list", "object"]
)  # fmt: skip
def test_layer_called_past_its_name_has_its_adapter(how):
    model = Held(how)
    layer, before = model.layer, model(X)
    attach(model, fit_projectors(model, [X], 4, progress=False))
    assert model.attribute is model.layer
    model.layer.lora_B["default"].data.normal_()
    assert not torch.allclose(model(X), before, atol=1e-2)
    torch.testing.assert_close(model(X), model.layer(X))
    if "closure" not in how:  # Python copies no functions
        twin = copy.deepcopy(model)
        twin.layer.lora_B["default"].data.zero_()
        torch.testing.assert_close(twin(X), before)
    detach(model)
    assert model.layer is model.attribute is layer and torch.equal(model(X), before)


@pytest.mark.parametrize(
    "how", ["tuple", "set", "bound", "partial", "weak reference", "default argument"]
)
@pytest.mark.parametrize("loads", [False, True])
def test_layer_that_cannot_be_replaced_everywhere_is_refused(how, loads):
    model, plain = Held(how), Held("list")
    projectors = fit_projectors(plain, [X], 4, progress=False)
    attach(plain, projectors)
    before = {name: value.requires_grad for name, value in model.named_parameters()}
    with pytest.raises(LayerError, match=r"layer 'layer': .* Held.calls .*holds as well"):
        if loads:
            load_adapter_state_dict(model, adapter_state_dict(plain))
        else:
            attach(model, projectors)
    assert {name: value.requires_grad for name, value in model.named_parameters()} == before
    assert isinstance(model.layer, nn.Linear)
