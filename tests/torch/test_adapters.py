import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ipa_core.errors import FileFormatError, SettingError, ShapeError
from ipa_torch import (
    LayerError,
    adapter_state_dict,
    attach,
    detach,
    disable_adapter,
    fit_projectors,
    list_adapters,
    load_adapter_state_dict,
    merge,
    set_adapter,
    unmerge,
)
from ipa_torch.extension import energy_scale

from .models import Transformer, decaying, generator, mlp


def batch(seed=0):
    return torch.randint(0, 20, (4, 9), generator=generator(seed))


def fitted(model, rank=3):
    return fit_projectors(model, [batch(1), batch(2)], rank, progress=False)


def adapted(**options):
    model = Transformer()
    attach(model, fitted(model), **options)
    return model


def train(model, steps=3, lr=0.05):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()


def tensors(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class TestAttach:
    def test_output_unchanged_bit_by_bit_at_first(self):
        model = Transformer()
        before = model(batch())
        attach(model, fitted(model))
        assert torch.equal(model(batch()), before)

    def test_only_b_trains_and_p_and_base_stay(self):
        model = adapted()
        before = tensors(model)
        train(model)
        after = model.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {name for name in before if ".lora_B." in name}

    def test_trainable_p_trains(self):
        model = adapted(trainable=True)
        before = tensors(model)
        train(model)
        projections = [name for name in before if "projections" in name and "weight" in name]
        assert projections
        assert not any(torch.equal(before[name], model.state_dict()[name]) for name in projections)

    def test_frozen_p_cannot_be_thawed_by_accident(self):
        model = adapted()
        model.requires_grad_(True)
        assert not any("projections" in name for name, _ in model.named_parameters())

    def test_shared_projection_is_computed_once(self, monkeypatch):
        from ipa_torch.extension import SharedProjection

        computed = []
        compute = SharedProjection._compute
        monkeypatch.setattr(
            SharedProjection, "_compute", lambda self, x: computed.append(1) or compute(self, x)
        )
        model = adapted()
        model(batch())
        assert len(computed) == 2 * 4  # qkv, out, up, down
        model(batch())
        assert len(computed) == 2 * 2 * 4

    def test_shared_result_is_not_kept(self):
        model = adapted()
        projection = model.attention[0].q.projection("default")
        assert projection is model.attention[0].v.projection("default")
        x = torch.randn(2, 12)
        model.attention[0].q(x)
        kept = weakref.ref(x)
        assert projection._recent is not None
        del x
        gc.collect()
        assert kept() is None and projection._recent is None

    def test_input_changed_in_place_is_computed_again(self):
        model = adapted()
        train(model)
        q, k = model.attention[0].q, model.attention[0].k
        x = torch.randn(2, 12)
        with torch.no_grad():
            q(x)
            changed = k(x.mul_(2))
            assert torch.equal(changed, k(x.clone()))

    def test_energy_scale_gives_the_energy_of_loras_a(self):
        model, rows = mlp(48, 8), decaying(4000, 48)
        projector = fit_projectors(model, [rows], 4, progress=False)["0"]
        projected = energy_scale(projector) * projector.project(rows)
        bound = 48**-0.5
        a = torch.empty(2000, 48).uniform_(-bound, bound)
        random = (rows @ a.T).square().mean() * 4
        torch.testing.assert_close(projected.square().sum(1).mean(), random, rtol=0.1, atol=0)

    def test_constant_scaling(self):
        model = adapted(scaling=0.25)
        assert float(model.up[0].projection("default").scale) == 0.25
        with pytest.raises(SettingError, match="scaling"):
            adapted(scaling="rslora")

    def test_dropout_in_training_only(self):
        model = adapted(dropout=0.5)
        train(model)
        assert not torch.equal(model(batch()), model(batch()))
        model.eval()
        assert torch.equal(model(batch()), model(batch()))
        with pytest.raises(SettingError, match="dropout"):
            adapted(dropout=1.0)

    def test_what_does_not_fit_is_refused_and_nothing_changed(self):
        model = Transformer()
        projectors = dict(fitted(model))
        with pytest.raises(ShapeError, match="layer 'down.0': expected a projector of 24"):
            attach(model, {"up.0": projectors["up.0"], "down.0": projectors["up.0"]})
        with pytest.raises(LayerError, match="'up.7'"):
            attach(model, {"up.7": projectors["up.0"]})
        assert all(p.requires_grad for p in model.parameters())
        assert type(model.up[0]) is nn.Linear

    def test_attributes_of_the_layer_can_be_read(self):
        layer = adapted().up[0]
        assert layer.in_features == 12 and layer.weight.shape == (24, 12)
        with pytest.raises(AttributeError):
            _ = layer.nothing


class TestEvaluation:
    def test_evaluating_the_base_model_changes_no_tensor(self):
        model = adapted(trainable=True)
        train(model)
        before, output = tensors(model), model(batch())
        with disable_adapter(model):
            for seed in range(3):
                model(batch(seed))
        model.eval()
        model(batch())
        model.train()
        assert same(before, model.state_dict())
        assert torch.equal(model(batch()), output)

    def test_disabled_gives_the_base_model(self):
        model = Transformer()
        expected = model(batch())
        attach(model, fitted(model))
        train(model)
        with disable_adapter(model):
            assert torch.equal(model(batch()), expected)
        merge(model)
        with disable_adapter(model):
            assert torch.equal(model(batch()), expected)
        assert not torch.equal(model(batch()), expected)


class TestMerge:
    def test_merged_equals_adapted_and_unmerged_is_exact(self):
        model = adapted(trainable=True)
        train(model)
        before, output = tensors(model), model(batch())
        merge(model)
        torch.testing.assert_close(model(batch()), output, rtol=1e-5, atol=1e-5)
        unmerge(model)
        assert same(before, model.state_dict())

    def test_merge_and_detach_leave_a_plain_model(self):
        model = adapted()
        train(model)
        output = model(batch())
        merge(model)
        detach(model)
        assert type(model.up[0]) is nn.Linear
        assert model.state_dict().keys() == Transformer().state_dict().keys()
        torch.testing.assert_close(model(batch()), output, rtol=1e-5, atol=1e-5)

    def test_merged_model_moves_whole(self):
        model = adapted()
        train(model)
        merge(model)
        model.double()
        unmerge(model)
        assert model.up[0].weight.dtype == torch.float64

    def test_detach_is_as_if_nothing_had_been(self):
        model = Transformer()
        before = tensors(model)
        model.embed.weight.requires_grad_(False)
        flags = [p.requires_grad for p in model.parameters()]
        attach(model, fitted(model))
        train(model)
        detach(model)
        assert same(before, model.state_dict())
        assert [p.requires_grad for p in model.parameters()] == flags
        assert type(model.up[0]) is nn.Linear

    def test_tied_weights_are_parted_not_changed(self):
        from .models import Tied

        model = Tied()
        ids = torch.randint(0, 10, (4, 5))
        attach(model, fit_projectors(model, [ids], 2, targets=["head"], progress=False))
        model.head.lora_B["default"].data.normal_()
        embedding = model.embed.weight.clone()
        merge(model)
        assert torch.equal(model.embed.weight, embedding)
        unmerge(model)
        assert model.head.weight is model.embed.weight


class TestNamed:
    def test_two_adapters_over_one_p(self):
        model = Transformer()
        projectors = fitted(model)
        attach(model, projectors, adapter_name="a")
        train(model)
        first = model(batch())
        attach(model, projectors, adapter_name="b")
        assert model.up[0].projection("a") is model.up[0].projection("b")
        assert list_adapters(model) == ["a", "b"]
        train(model, lr=0.1)
        second = model(batch())
        assert not torch.equal(first, second)
        set_adapter(model, "a")
        assert torch.equal(model(batch()), first)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained and all(n.endswith("lora_B.a") for n in trained)
        detach(model, "a")
        set_adapter(model, "b")
        assert torch.equal(model(batch()), second)
        set_adapter(model, None)
        with disable_adapter(model):
            assert torch.equal(model(batch()), model(batch()))

    def test_each_has_its_own_mode(self):
        model = Transformer()
        projectors = fitted(model)
        attach(model, projectors, adapter_name="frozen")
        attach(model, projectors, adapter_name="trained", trainable=True)
        layer = model.up[0]
        assert not layer.projection("frozen").trainable and layer.projection("trained").trainable
        assert layer.projection("frozen") is not layer.projection("trained")

    def test_nothing_of_a_detached_one_stays(self):
        model = Transformer()
        attach(model, fitted(model), adapter_name="a")
        attach(model, fitted(model), adapter_name="b", trainable=True)
        detach(model, "a")
        assert not any(name.endswith((".a", ".a.weight")) for name in model.state_dict())

    def test_names_are_checked(self):
        model = adapted()
        projectors = fitted(model)
        for name in ("default", "", "a.b", "train"):
            with pytest.raises(SettingError, match="in use are \\['default'\\]"):
                attach(model, projectors, adapter_name=name)
        with pytest.raises(SettingError, match="at least one layer"):
            attach(model, {}, adapter_name="empty")
        for call in (set_adapter, merge, detach, adapter_state_dict):
            with pytest.raises(SettingError, match="'other'"):
                call(model, "other")


class TestState:
    def test_holds_each_p_once_and_nothing_else(self):
        model = adapted()
        state = adapter_state_dict(model)
        weights = [key for key in state if key.endswith(".weight")]
        assert len(weights) == 8
        assert len([key for key in state if key.endswith(".lora_B")]) == 12
        numbers = sum(t.numel() for key, t in state.items() if key.endswith(".lora_B"))
        assert numbers == sum(p.numel() for p in model.parameters() if p.requires_grad)

    @pytest.mark.parametrize("trainable", [False, True])
    def test_round_trip_through_a_file(self, tmp_path, trainable):
        from safetensors.torch import load_file, save_file

        model = adapted(trainable=trainable)
        plain = copy.deepcopy(model)
        detach(plain)
        train(model)
        save_file(adapter_state_dict(model), tmp_path / "a.safetensors")
        load_adapter_state_dict(plain, load_file(tmp_path / "a.safetensors"))
        assert torch.equal(plain(batch()), model(batch()))
        q, v = (getattr(plain.attention[0], name).projection("default") for name in "qv")
        assert q is v and q.trainable is trainable
        load_adapter_state_dict(plain, adapter_state_dict(model))
        assert list_adapters(plain) == ["default"]

    def test_loaded_adapter_shares_the_frozen_projections_of_another(self):
        model = adapted()
        load_adapter_state_dict(model, adapter_state_dict(model), adapter_name="second")
        layer = model.attention[0].q
        assert layer.projection("second") is layer.projection("default")

    def test_incomplete_state_is_refused(self):
        model = adapted()
        state = adapter_state_dict(model)
        with pytest.raises(FileFormatError, match="without layers"):
            load_adapter_state_dict(model, {"format_version": state["format_version"]})
        del state["projections.0.weight"]
        with pytest.raises(FileFormatError, match=r"projections\.0\.weight"):
            load_adapter_state_dict(model, state)

    def test_other_format_versions_are_refused(self):
        model = adapted()
        state = adapter_state_dict(model)
        first = {key.replace("lora_B", "lift"): x for key, x in state.items() if "." in key}
        with pytest.raises(
            FileFormatError, match="version 2, got version 1; save the adapter anew"
        ):
            load_adapter_state_dict(model, first)
        with pytest.raises(FileFormatError, match="version 2, got version 3; update"):
            load_adapter_state_dict(model, state | {"format_version": torch.tensor(3)})


class TestConventions:
    def test_deepcopy_is_independent_and_shares_within(self):
        model = adapted()
        model(batch())
        twin = copy.deepcopy(model)
        q, v = twin.attention[0].q, twin.attention[0].v
        assert q.projection("default") is v.projection("default")
        train(model)
        assert not torch.equal(model(batch()), twin(batch()))

    def test_state_dict_round_trip(self):
        model, other = adapted(), adapted()
        train(model)
        other.load_state_dict(model.state_dict())
        assert torch.equal(model(batch()), other(batch()))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_to_dtype(self, dtype):
        model = adapted().to(dtype)
        train(model)
        assert model(batch()).dtype == dtype

    def test_half_base_keeps_b_in_float32(self):
        model = Transformer().bfloat16()
        attach(model, fitted(model))
        assert model.up[0].projection("default").weight.dtype == torch.bfloat16
        assert model.up[0].lora_B["default"].dtype == torch.float32
        train(model)
        assert model(batch()).dtype == torch.bfloat16

    def test_bfloat16_shares_what_is_saved_and_keeps_the_gradient(self):
        model = adapted()
        train(model)
        model.zero_grad()
        half = copy.deepcopy(model).bfloat16()
        for layer in ("q", "k", "v"):
            lora_B = getattr(half.attention[0], layer).lora_B
            lora_B["default"] = nn.Parameter(lora_B["default"].float())  # as attach makes it
        x = torch.randn(4, 9, 12, generator=generator(0))
        saved = set()

        def pack(tensor):
            if tensor.numel() == 4 * 9 * 3:  # P x
                saved.add((tensor.dtype, tensor.untyped_storage().data_ptr()))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output = half.attention[0](x=x.bfloat16())
        output.float().square().mean().backward()
        model.attention[0](x=x).square().mean().backward()
        assert [dtype for dtype, _ in saved].count(torch.bfloat16) == len(saved) == 2  # qkv, out
        for layer in ("q", "k", "v"):
            rough = getattr(half.attention[0], layer).lora_B["default"].grad
            exact = getattr(model.attention[0], layer).lora_B["default"].grad
            assert rough.dtype == torch.float32
            assert (rough - exact).norm() < 0.05 * exact.norm()

    @pytest.mark.parametrize("trainable", [False, True])
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing_gives_the_same_gradients(self, reentrant, trainable):
        model = adapted(trainable=trainable)
        train(model)

        def gradients(run):
            x = torch.randn(4, 9, 12, generator=generator(0))
            x.requires_grad_(True)
            model.zero_grad()
            run(x).square().mean().backward()
            named = model.attention[0].named_parameters()
            return {name: p.grad.clone() for name, p in named if p.grad is not None}

        attention = model.attention[0]
        plain = gradients(lambda x: attention(x=x))
        again = gradients(lambda x: checkpoint(attention, x, use_reentrant=reentrant))
        assert plain.keys() == again.keys() and len(plain) == (6 if trainable else 4)
        for name in plain:
            torch.testing.assert_close(plain[name], again[name])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_compiled_model_agrees(self, dtype):
        model = Transformer().to(dtype)
        attach(model, fitted(model))
        train(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(batch()), model(batch()))
        compiled(batch()).square().mean().backward()
        assert model.up[0].lora_B["default"].grad is not None

    def test_attached_to_a_compiled_model(self):
        model = Transformer()
        compiled = torch.compile(model, backend="aot_eager")
        before = compiled(batch())
        attach(compiled, fitted(compiled))
        assert list(list_adapters(model)) == ["default"]
        torch.testing.assert_close(compiled(batch()), before)
        model.up[0].lora_B["default"].data.normal_()
        torch.testing.assert_close(compiled(batch()), model(batch()))
        assert not torch.allclose(compiled(batch()), before, atol=1e-3)
        detach(compiled)
        torch.testing.assert_close(compiled(batch()), before)

    def test_learned_again_on_an_adapted_model(self):
        model = adapted()
        names = list(fitted(model))
        assert names == list(fitted(Transformer()))
        attach(model, fitted(model), adapter_name="again")
        assert list_adapters(model) == ["default", "again"]

    def test_distributed_data_parallel(self, tmp_path):
        from torch import distributed

        distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
        )
        try:
            model = adapted()
            parallel = nn.parallel.DistributedDataParallel(model)
            parallel(batch()).square().mean().backward()
            assert model.up[0].lora_B["default"].grad is not None
        finally:
            distributed.destroy_process_group()

    def test_fully_sharded(self, tmp_path):
        from torch import distributed
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
        )
        try:
            with torch.device("cpu"):  # where gloo is
                model = adapted()
                expected = model(batch()).detach()
                mesh = init_device_mesh("cpu", (1,))
                for block in model.attention:
                    fully_shard(block, mesh=mesh)
                fully_shard(model, mesh=mesh)
                output = model(batch())
                torch.testing.assert_close(output.detach(), expected)
                output.square().mean().backward()
            assert model.up[0].lora_B["default"].grad is not None
        finally:
            distributed.destroy_process_group()

    def test_saves_less_for_backward_than_the_input(self):
        layer = nn.Sequential(nn.Linear(64, 64))
        rows = torch.randn(256, 64)
        attach(layer, fit_projectors(layer, [rows], 4, progress=False))
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.shape) or t, lambda t: t
        ):
            layer(rows.requires_grad_(True)).sum().backward()
        assert (256, 64) not in [tuple(shape) for shape in saved]
        assert (256, 4) in [tuple(shape) for shape in saved]
