"""Code of a model that does more with its layers than call them: right, or told."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from ipa_core import fit_projector
from ipa_core.errors import ArrayTypeError
from ipa_torch import LayerError, attach, detach, fit_projectors, merge, unmerge
from ipa_torch._capture.tensor_ids import sample_bytes

X = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two layers, and a function of (model, x) that computes the output."""

    def __init__(self, compute):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.compute = nn.Linear(8, 8), nn.Linear(8, 4), compute

    def forward(self, x):
        return self.compute(self, x)

    def encode(self, x):
        return self.compute(self, x)


def adapted(compute, layers=2):
    model = Net(compute).eval()
    before = model(X)
    projectors = fit_projectors(model, [X], 2, progress=False)
    assert len(projectors) == layers
    attach(model, projectors)
    assert torch.equal(model(X), before)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    assert not torch.allclose(model(X), before, atol=0.1)
    return model


def beside(model, x):
    return model.last(model.first(x) + F.linear(x, model.first.weight.T))


def decoder(model, x):
    return F.linear(model.first(x).tanh(), model.last.weight) + model.last(x)


def matmul(model, x):
    return model.last(x) + (model.first(x) @ model.first.weight)[:, :4]


READERS = [beside, decoder, matmul]


class TestReads:
    @pytest.mark.parametrize("compute", READERS)
    @pytest.mark.parametrize("call", ["forward", "encode", "compiled"])
    def test_weight_is_the_layers_while_an_adapter_is_merged(self, compute, call):
        model = adapted(compute)
        run = {"forward": model, "encode": model.encode}.get(call)
        run = run or torch.compile(model, backend="eager", fullgraph=True)
        before = model(X)
        merge(model)
        torch.testing.assert_close(run(X), before, rtol=1e-4, atol=1e-4)
        unmerge(model)
        torch.testing.assert_close(run(X), before, rtol=1e-4, atol=1e-4)
        torch._dynamo.reset()

    @pytest.mark.parametrize("compute", READERS)
    def test_detached_while_merged_is_told(self, compute):
        model = adapted(compute)
        merge(model)
        with pytest.warns(UserWarning, match="of layer '(first|last)' .* is read by the model"):
            detach(model)

    def test_nothing_is_told_without_a_reader(self):
        model = adapted(lambda model, x: model.last(model.first(x).tanh()))
        before = model(X)
        merge(model)
        detach(model)
        torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-4)


def set_gain(model, x):
    model.first.gain = 1 + x.mean().detach()
    return model.last(model.first(x))


def set_bias(model, x):
    model.last.bias = None
    return model.last(model.first(x))


def tie(model, x):
    model.first.weight = nn.Parameter(model.first.weight.detach().clone())
    return model.last(model.first(x))


def call_with_bias(model, x):
    return model.last(functional_call(model.first, {"bias": x.mean() + model.first.bias}, (x,)))


class Gained(nn.Linear):
    gain = 1.0

    def forward(self, x):
        return super().forward(x) * self.gain


class TestWrites:
    @pytest.mark.parametrize("compute", [set_gain, set_bias, tie, call_with_bias])
    def test_attribute_of_a_layer_is_set_on_the_layer(self, compute):
        model = Net(compute).eval()
        if compute is set_gain:
            model.first = Gained(8, 8)
        layers, before = (model.first, model.last), model(3 * X)
        attach(model, fit_projectors(model, [X], 2, progress=False))
        assert torch.equal(model(3 * X), before)
        detach(model)
        model(X)
        assert (model.first, model.last) == layers and torch.equal(model(3 * X), before)

    @pytest.mark.parametrize("how", ["set", "functional_call"])
    def test_weight_of_a_merged_layer_is_refused(self, how):
        model = adapted(lambda model, x: model.last(model.first(x)))
        merge(model)
        before = model(X)
        with pytest.raises(LayerError, match="unmerge first"):
            if how == "set":
                model.first.weight = nn.Parameter(torch.zeros(8, 8))
            else:
                functional_call(model, {"first.weight": torch.zeros(8, 8)}, (X,))
        assert torch.equal(model(X), before)

    def test_attributes_of_both_stay_apart(self):
        class Merging(nn.Linear):  # as in loralib
            merged = active = False

        model = Net(lambda model, x: model.last(model.first(x))).eval()
        model.first = Merging(8, 8)
        attach(model, fit_projectors(model, [X], 2, progress=False))
        merge(model)
        assert model.first.merged == "default" and model.first.base_layer.merged is False


def by_instance(model, x):
    for layer in (model.first, nn.Tanh(), model.last):
        x = 2 * layer(x) if isinstance(layer, nn.Linear) else layer(x)
    return x


def by_class(model, x):
    return model.last(model.first(x) if model.first.__class__ is nn.Linear else x)


def by_name(model, x):
    return model.last(model.first(x) if model.first.__class__.__name__ == "Linear" else x)


class TestClasses:
    @pytest.mark.parametrize("compute", [by_instance, by_class, by_name])
    def test_in_a_pass_the_class_is_that_of_the_layer(self, compute):
        model = adapted(compute)
        before = model(X)
        assert not isinstance(model.first, nn.Linear)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(X), before)
        merge(model)
        torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-4)
        detach(model)
        assert type(model.first) is nn.Linear

    @pytest.mark.parametrize("how", ["type", "isinstance", "in a method"])
    def test_forward_that_asks_for_classes_is_told(self, how):
        class Asking(nn.Sequential):
            def forward(self, x):
                for layer in self:
                    known = {
                        "type": lambda layer=layer: type(layer) is nn.Linear,
                        "isinstance": lambda layer=layer: isinstance(layer, nn.Linear),
                    }
                    x = layer(x) if known[how]() else x
                return x

        class Calling(nn.Sequential):
            def forward(self, x):
                return self.last_of(super().forward(x))

            def last_of(self, x):
                return x if isinstance(self[-1], nn.Linear) else -x

        model = (Calling if how == "in a method" else Asking)(nn.Linear(8, 8), nn.Linear(8, 4))
        projectors = fit_projectors(model, [X], 2, progress=False)
        with pytest.warns(UserWarning, match="(Asking|Calling) asks for the class"):
            attach(model, projectors)

    def test_forward_that_asks_for_other_classes_is_not(self):
        class Other(nn.Sequential):
            def forward(self, x):
                return super().forward(x if isinstance(x, torch.Tensor) else x[0])

        model = Other(nn.Linear(8, 8))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attach(model, fit_projectors(model, [X], 2, progress=False))


def ensemble(model, x):
    weights, _ = stack_module_state([model.first, model.first])
    run = lambda weight: functional_call(model.first, weight, (x,))  # noqa: E731
    return model.last(vmap(run)(weights).mean(0))


def derivative(model, x):
    weights = {name: p.detach() for name, p in model.first.named_parameters()}
    loss = lambda weights: functional_call(model.first, weights, (x,)).sum()  # noqa: E731
    return model.last(torch.func.grad(loss)(weights)["weight"])


@pytest.mark.parametrize("compute", [ensemble, derivative])
def test_transformed_weights_are_refused_with_the_layer(compute):
    with pytest.raises(ArrayTypeError, match="layer 'first': expected ordinary tensors"):
        fit_projectors(Net(compute), [X], 2, progress=False)


class TestExports:
    @pytest.mark.parametrize("merged", [False, True])
    def test_trace_takes_other_shapes(self, merged):
        model = adapted(lambda model, x: model.last(model.first(x).tanh()))
        if merged:
            merge(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trace = torch.jit.trace(model, X[:6].view(2, 3, 8))
        for shape in [(3, 2, 8), (1, 4, 8)]:
            x = torch.randn(shape)
            torch.testing.assert_close(trace(x), model(x), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("strict", [False, True])
    def test_exported_program_agrees(self, strict):
        model = adapted(lambda model, x: model.last(model.first(x).tanh()))
        program = torch.export.export(model, (X,), strict=strict).module()
        torch.testing.assert_close(program(X), model(X), rtol=1e-4, atol=1e-4)


def by_data(x):
    x.data.mul_(torch.arange(8.0))


def by_numpy(x):
    x.detach().numpy()[:, 0] = 100


def one_row(x):
    x.data[3] += 50


@pytest.mark.parametrize("change", [by_data, by_numpy, one_row])
@pytest.mark.parametrize("grad", [False, True])
def test_inputs_changed_behind_the_version_counter(change, grad):
    seen = []

    def compute(model, x):
        x = x.clone()
        first = model.first(x)
        change(x)
        seen.append(x.clone())
        return first[:, :4] + model.last(x)

    model = Net(compute).eval()
    batches = [X, X.flip(1), X * 2]
    with torch.set_grad_enabled(grad):
        projectors = fit_projectors(model, batches, 2, progress=False)
    expected = fit_projector(torch.cat(seen), 2)
    np.testing.assert_allclose(projectors["last"].project(X), expected.project(X), atol=1e-4)
    assert ("first",) in projectors.shared
    attach(model, projectors)
    nn.init.normal_(model.last.lora_B["default"], generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = model(X)
        merge(model)
        torch.testing.assert_close(model(X), before)


def test_large_inputs_are_compared_in_every_column():
    x = torch.zeros(64, 1024)
    for column in (0, 1, 511, 1023):
        other = x.clone()
        other[:, column] = 1
        assert sample_bytes(other) != sample_bytes(x)
    other = x.clone()
    other[5] = 1
    assert sample_bytes(other) != sample_bytes(x)


def test_inputs_that_are_lazily_negated_are_compared():
    x = torch.complex(X, X).conj().imag
    assert x.is_neg()
    assert sample_bytes(x) == sample_bytes(-X)
