import re
from functools import partial

import pytest
import torch
from torch import nn

from ipa_core import (
    ExactCovariance,
    HebbianRule,
    IncrementalPCA,
    RandomizedSVD,
    ReconstructionAutoencoder,
)
from ipa_core.errors import (
    EmptyStreamError,
    NonFiniteError,
    RankError,
    SettingError,
    ShapeError,
    WeightError,
)
from ipa_torch import LayerError, LayerProjectors, StoppingCriteria, fit_projectors

from .models import Transformer, WithIdleLayer, angle, decaying, excess, mlp


def quiet_fit(model, batches, rank, **options):
    return fit_projectors(model, batches, rank, progress=False, **options)


class TestInputs:
    @pytest.mark.parametrize("learner", [ExactCovariance, IncrementalPCA, RandomizedSVD])
    def test_optimum_of_what_the_layer_saw(self, learner):
        model, rows = mlp(12, 16, 4), decaying(800, 12)
        projectors = quiet_fit(model, rows.split(100), 3, learner=learner)
        bound = 1e-5 if learner is ExactCovariance else learner.guarantee.excess
        assert excess(projectors["0"], rows) < bound
        assert excess(projectors["2"], model[1](model[0](rows))) < bound

    @pytest.mark.parametrize("shape", [(12,), (8, 12), (2, 3, 12), (2, 3, 2, 12)])
    def test_any_rank(self, shape):
        batches = [torch.randn(shape) for _ in range(10)]
        projector = quiet_fit(mlp(12, 4), batches, 2, learner=ExactCovariance)["0"]
        assert excess(projector, torch.cat([b.reshape(-1, 12) for b in batches])) < 1e-5

    def test_non_contiguous(self):
        rows = decaying(60, 12)
        strided = rows.reshape(6, 10, 12).transpose(0, 1)
        projector = quiet_fit(mlp(12, 4), [strided], 2, learner=ExactCovariance)["0"]
        assert excess(projector, rows) < 1e-5

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_learns_in_float32(self, dtype):
        model, rows = mlp(12, 4).to(dtype), decaying(200, 12).to(dtype)
        projector = quiet_fit(model, [rows], 2)["0"]
        assert projector.components.dtype == torch.float32
        assert excess(projector, rows) < 1e-5

    def test_autocast_does_not_reach_the_learner(self):
        model, rows = mlp(12, 16, 4), decaying(200, 12)

        def forward(model, batch):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                model(batch)

        projector = quiet_fit(model, [rows], 2, learner=ExactCovariance, forward=forward)["0"]
        assert excess(projector, rows) < 1e-5

    def test_autocast_around_it_all_does_not_either(self):
        model, rows = mlp(12, 16, 4), decaying(2000, 12)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            projectors = quiet_fit(model, rows.split(100), 2)
        assert excess(projectors["0"], rows) < 1e-5

    def test_generator_without_length(self):
        rows = decaying(100, 12)
        batches = (part for part in rows.split(7))
        assert quiet_fit(mlp(12, 4), batches, 2)["0"].samples == 100

    def test_positional_tuple(self):
        model = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(5, 3)})
        model.forward = lambda x, y: model["a"](x) + model["b"](y)
        projectors = quiet_fit(model, [(torch.randn(9, 4), torch.randn(9, 5))], 2)
        assert [p.features for p in projectors.values()] == [4, 5]

    def test_batches_smaller_than_the_rank(self):
        rows = decaying(50, 12)
        projector = quiet_fit(mlp(12, 4), rows.split(1), 5, learner=ExactCovariance)["0"]
        assert excess(projector, rows) < 1e-5

    def test_empty_batch_is_nothing(self):
        rows = decaying(50, 12)
        batches = [rows[:0], rows, rows[:0]]
        assert quiet_fit(mlp(12, 4), batches, 2)["0"].samples == 50

    def test_rank_by_layer(self):
        projectors = quiet_fit(mlp(12, 16, 4), [decaying(50, 12)], {"0": 2, "2": 5})
        assert [p.rank for p in projectors.values()] == [2, 5]

    def test_compiled_model(self):
        model, rows = mlp(12, 4), decaying(50, 12)
        compiled = torch.compile(model, backend="eager")
        compiled(rows)
        assert quiet_fit(compiled, [rows], 2)["0"].samples == 50

    @pytest.mark.parametrize("learner", [HebbianRule, ReconstructionAutoencoder])
    def test_sequential_learners_take_a_transformers_inputs(self, learner):
        batches = [{"input_ids": torch.randint(0, 20, (8, 9))} for _ in range(20)]
        projectors = quiet_fit(Transformer(), batches, 3, learner=learner)
        assert len(projectors) == 12
        assert all(0 < p.captured() <= 1 for p in projectors.values())


class TestSharing:
    def test_query_key_value_get_the_identical_projector(self):
        batches = [{"input_ids": torch.randint(0, 20, (4, 9))} for _ in range(3)]
        projectors = quiet_fit(Transformer(), batches, 3)
        for block in ("attention.0", "attention.1"):
            group = {id(projectors[f"{block}.{name}"]) for name in "qkv"}
            assert len(group) == 1
        assert projectors["attention.0.q"] is not projectors["attention.1.q"]
        assert projectors["attention.0.q"] is not projectors["attention.0.out"]

    def test_one_update_for_each_distinct_input(self):
        updates = []

        class Counting(ExactCovariance):
            def begin_update(self, batch, weights=None):
                updates.append(batch.shape)
                return super().begin_update(batch, weights)

        quiet_fit(Transformer(), [{"input_ids": torch.randint(0, 20, (4, 9))}], 3, learner=Counting)
        assert len(updates) == 2 * 4  # qkv, out, up, down

    def test_layers_part_where_control_flow_parts_them(self):
        class Forked(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

            def forward(self, x):
                y = x if x.shape[0] == 20 else 2 * x.flip(-1)
                return self.a(x) + self.b(x) + self.c(y)

        first, second, third = decaying(20, 6), decaying(30, 6, 1), decaying(20, 6, 2)
        projectors = quiet_fit(Forked(), [first, second, third], 2, learner=ExactCovariance)
        assert projectors["a"] is projectors["b"]
        assert projectors["a"] is not projectors["c"]
        assert excess(projectors["a"], torch.cat([first, second, third])) < 1e-5
        assert excess(projectors["c"], torch.cat([first, 2 * second.flip(-1), third])) < 1e-5

    def test_a_skipped_expert_learns_from_its_own_batches(self):
        class Experts(nn.Module):
            def __init__(self):
                super().__init__()
                self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
                self.calls = 0

            def forward(self, x):
                self.calls += 1
                chosen = self.experts if self.calls == 1 else self.experts[:1]
                return sum(expert(x) for expert in chosen)

        batches = [decaying(40, 6), decaying(30, 6, 1)]
        projectors = quiet_fit(Experts(), batches, 2, learner=ExactCovariance)
        assert excess(projectors["experts.0"], torch.cat(batches)) < 1e-5
        assert excess(projectors["experts.1"], batches[0]) < 1e-5

    def test_an_input_changed_in_place_is_another(self):
        class InPlace(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

            def forward(self, x):
                x = x.clone()
                y = self.a(x)
                return y + self.b(x.mul_(torch.arange(6.0)))

        rows = decaying(40, 6)
        projectors = quiet_fit(InPlace(), [rows], 2, learner=ExactCovariance)
        assert excess(projectors["b"], rows * torch.arange(6.0)) < 1e-5

    def test_a_reused_address_is_another_input(self):
        class Reusing(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = nn.ModuleList(nn.Linear(64, 1) for _ in range(8))

            def forward(self, x):
                # Each product is freed before the next is made, mostly at the same address.
                return sum(layer(x * (i + 1)) for i, layer in enumerate(self.layers))

        x = decaying(64, 64)
        projectors = quiet_fit(Reusing(), [x], 2)
        assert len(projectors.shared) == 8
        energies = torch.tensor([p.total_energy for p in projectors.values()])
        expected = projectors["layers.0"].total_energy * torch.arange(1, 9) ** 2
        torch.testing.assert_close(energies, expected)

    def test_a_layer_run_twice_learns_from_both(self):
        model = nn.Sequential(layer := nn.Linear(6, 6), layer)
        rows = decaying(40, 6)
        projector = quiet_fit(model, [rows], 2, learner=ExactCovariance)["0"]
        assert excess(projector, torch.cat([rows, layer(rows)])) < 1e-5


class TestPadding:
    def batches(self):
        generator = torch.Generator().manual_seed(1)
        padded, single = [], []
        for _ in range(6):
            ids = torch.randint(1, 20, (5, 11), generator=generator)
            lengths = torch.randint(1, 12, (5,), generator=generator)
            mask = (torch.arange(11) < lengths[:, None]).long()
            padded.append({"input_ids": ids * mask, "attention_mask": mask})
            single += [
                {"input_ids": row[None, :n]} for row, n in zip(ids, lengths.tolist(), strict=True)
            ]
        return padded, single

    def test_padding_rows_do_not_count(self):
        padded, single = self.batches()
        model = Transformer().double()
        with_mask = quiet_fit(model, padded, 3, learner=ExactCovariance)
        alone = quiet_fit(model, single, 3, learner=ExactCovariance)
        for name, projector in with_mask.items():
            assert projector.samples == alone[name].samples
            assert angle(projector, alone[name]) < 1e-3, name

    def test_weights_by_callable(self):
        x = decaying(40, 12)
        weights = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(0))
        model = mlp(12, 4)
        weighted = quiet_fit(
            model, [x], 3, learner=ExactCovariance, row_weights=lambda batch: weights.float()
        )
        with pytest.raises(WeightError, match=r"layer '0': .*\.bool\(\).*for x, _ in loader"):
            quiet_fit(model, [x], 3, row_weights=lambda batch: weights)
        repeated = quiet_fit(model, [x.repeat_interleave(weights, 0)], 3, learner=ExactCovariance)
        assert angle(weighted["0"], repeated["0"]) < 1e-3

    def test_rows_count_once_over_several_passes(self):
        x = decaying(400, 12)
        batches = list(x.split(50))
        learner = partial(ReconstructionAutoencoder, epochs=2)
        fitted = quiet_fit(mlp(12, 4), batches, 3, learner=learner)
        assert fitted["0"].samples == 400
        stop = StoppingCriteria(max_rows=400)
        stopped = quiet_fit(mlp(12, 4), batches, 3, learner=learner, stop=stop)
        assert angle(stopped["0"], fitted["0"]) < 1e-6

    def test_flattened_rows_are_masked_too(self):
        class Flat(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(6, 2)

            def forward(self, x, attention_mask):
                return self.layer(x.flatten(0, 1))

        mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        batch = {"x": torch.randn(2, 3, 6), "attention_mask": mask}
        assert quiet_fit(Flat(), [batch], 2)["layer"].samples == 3

    def test_all_rows_masked(self):
        batch = {"input_ids": torch.ones(2, 3, dtype=torch.long)}
        nothing = batch | {"attention_mask": torch.zeros(2, 3, dtype=torch.long)}
        projectors = quiet_fit(Transformer(), [nothing, batch], 1)
        assert projectors["up.0"].samples == 6
        with pytest.raises(LayerError, match="no row of positive weight"):
            quiet_fit(Transformer(), [nothing], 1)

    def test_weights_must_be_a_tensor(self):
        with pytest.raises(ShapeError, match="expected row weights as a tensor, got int"):
            quiet_fit(mlp(6, 2), [torch.ones(2, 6)], 1, row_weights=lambda batch: [1, 0])

    def test_encoder_and_decoder_have_their_own(self):
        transformers = pytest.importorskip("transformers")
        config = transformers.T5Config(
            vocab_size=30, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2
        )
        model = transformers.T5ForConditionalGeneration(config)
        ids = torch.randint(0, 30, (2, 4))
        batch = {
            "input_ids": ids,
            "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
            "decoder_input_ids": ids,
            "decoder_attention_mask": torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]]),
        }
        projectors = quiet_fit(model, [batch], 2)
        assert projectors["encoder.block.0.layer.0.SelfAttention.q"].samples == 7
        assert projectors["decoder.block.0.layer.0.SelfAttention.q"].samples == 3
        assert projectors["decoder.block.0.layer.1.EncDecAttention.q"].samples == 3
        assert projectors["decoder.block.0.layer.1.EncDecAttention.k"].samples == 7


class TestFailures:
    def test_idle_layer_is_named_and_the_rest_returned(self):
        with pytest.warns(UserWarning, match="'idle': its forward never ran"):
            projectors = quiet_fit(WithIdleLayer(), [torch.randn(8, 6)], 2)
        assert list(projectors) == ["used"]
        assert projectors.missing == {"idle": "its forward never ran"}
        with pytest.raises(KeyError, match="never ran"):
            projectors["idle"]

    def test_idle_layer_refused_or_ignored(self):
        with pytest.raises(LayerError, match="'idle'"):
            quiet_fit(WithIdleLayer(), [torch.randn(8, 6)], 2, on_missing="raise")
        ignored = quiet_fit(WithIdleLayer(), [torch.randn(8, 6)], 2, on_missing="ignore")
        assert list(ignored) == ["used"]
        with pytest.raises(SettingError, match="on_missing"):
            quiet_fit(WithIdleLayer(), [torch.randn(8, 6)], 2, on_missing="drop")

    def test_nan_names_the_layer(self):
        model = mlp(6, 6, 2)
        model[0].weight.data[0, 0] = float("nan")
        with pytest.raises(NonFiniteError, match="layer '2': expected finite values"):
            quiet_fit(model, [torch.randn(8, 6)], 2)

    def test_rank_beyond_features_names_the_layer(self):
        with pytest.raises(RankError, match="layer '2': expected a rank of at most 4"):
            quiet_fit(mlp(6, 4, 2), [torch.randn(8, 6)], 5)

    def test_no_batches(self):
        with pytest.raises(EmptyStreamError, match="at least one batch"):
            quiet_fit(mlp(6, 2), [], 2)

    def test_nothing_matches(self):
        with pytest.raises(LayerError, match="'0'"):
            quiet_fit(mlp(6, 2), [torch.ones(2, 6)], 2, targets=["q_proj"])

    def test_rank_left_out(self):
        with pytest.raises(LayerError, match="rank for layer '2'"):
            quiet_fit(mlp(6, 4, 2), [torch.ones(2, 6)], {"0": 2})

    def test_batch_of_another_form_gets_a_hint(self):
        pairs = [(torch.ones(2, 6), torch.ones(2))]
        with pytest.raises(TypeError) as raised:
            quiet_fit(mlp(6, 2), pairs, 1)
        assert "Pass forward=" in "".join(raised.value.__notes__)
        first = quiet_fit(mlp(6, 2), pairs, 1, forward=lambda model, batch: model(batch[0]))
        assert first["0"].samples == 2


class Breaking(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.first, self.error = nn.Linear(6, 6), error
        self.frozen = nn.Dropout().eval()

    def forward(self, x):
        x = self.first(x)
        torch.rand(3)
        if self.error is not None:
            raise self.error
        return x


class TestNoTrace:
    @pytest.mark.parametrize("error", [None, RuntimeError("broken"), KeyboardInterrupt()])
    def test_model_and_random_state_as_before(self, error):
        model = Breaking(error).train()
        model.frozen.eval()
        before = torch.get_rng_state()
        flags = [module.training for module in model.modules()]
        if error is None:
            quiet_fit(model, [torch.ones(8, 6)], 2)
        else:
            with pytest.raises(type(error)):
                quiet_fit(model, [torch.ones(8, 6)], 2)
        assert torch.equal(torch.get_rng_state(), before)
        assert [module.training for module in model.modules()] == flags
        assert all(not module._forward_pre_hooks for module in model.modules())
        assert torch.is_grad_enabled()

    def test_activations_are_not_kept_alive(self):
        import weakref

        seen = []

        class Watching(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

            def forward(self, x):
                hidden = self.a(x)
                seen.append(weakref.ref(hidden))
                out = self.b(hidden)
                del hidden
                assert seen[-1]() is None
                return out

        quiet_fit(Watching(), [torch.randn(700, 6)], 2)
        assert len(seen) == 1


class TestProjectors:
    def fitted(self):
        batches = [{"input_ids": torch.randint(0, 20, (4, 9))}]
        return quiet_fit(Transformer(), batches, 3)

    def test_summary_and_groups(self):
        projectors = self.fitted()
        assert ("attention.0.q", "attention.0.k", "attention.0.v") in projectors.shared
        assert "attention.0.{q, k, v}" in projectors.table()
        assert "the batches ended" in projectors.table()
        assert re.fullmatch(
            r"LayerProjectors\(12 layers, 8 projectors, rank 3, captured 0\.\d{3} to \d\.\d{3}\)",
            repr(projectors),
        )

    def test_saved_and_loaded(self, tmp_path):
        projectors = self.fitted()
        projectors.save(tmp_path / "p.safetensors")
        again = LayerProjectors.load(tmp_path / "p.safetensors")
        assert sorted(again) == sorted(projectors)
        assert set(map(frozenset, again.shared)) == set(map(frozenset, projectors.shared))
        for name in projectors:
            assert torch.equal(again[name].components, projectors[name].components)

    def test_truncated(self):
        projectors = self.fitted()
        small = projectors.truncate(1)
        assert {p.rank for p in small.values()} == {1}
        assert small.shared == projectors.shared
        with pytest.raises(RankError):
            projectors.truncate(4)

    def test_ranks_allocated_over_the_model(self):
        projectors = self.fitted()
        some = projectors.allocate(14)
        assert sum(some[names[0]].rank for names in some.shared) == 14
        assert some.shared == projectors.shared
