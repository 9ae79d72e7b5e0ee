"""Adapters of several tasks over one frozen P."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear, LoraLayer
from safetensors.torch import load_file, save_file

import ipa_hf
import ipa_torch
from ipa_core.errors import FileFormatError, MissingFileError, RankError, SettingError, ShapeError
from ipa_hf.adapter_metadata import find_metadata
from ipa_hf.lora_layers import lora_layers
from ipa_hf.shared_lora_layers import SharedLoraLinear
from ipa_torch import LayerError

from .models import TARGETS, config, make, outputs, text_batches, train

TASKS = ["mail", "news", "code"]


@pytest.fixture(scope="module")
def projectors():
    """Return projectors of rank 4 by family."""
    return {
        family: ipa_torch.fit_projectors(
            make(family), text_batches(), 4, targets=TARGETS[family], progress=False
        )
        for family in TARGETS
    }


def shared(projectors, family="llama", names=TASKS, **options):
    """Return a model with adapters over one P, each with a random B."""
    model = ipa_hf.share(make(family), projectors[family], names, **options)
    randomize(model)
    return model.eval()


def randomize(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=generator)


def separate(model, names=TASKS):
    """Return a copy of the model with a module A for each adapter, as PEFT makes it."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, LoraLayer):
            module.__class__ = Linear
            for name in names:
                module.lora_A[name] = copy.deepcopy(module.lora_A[name])
                module.lora_A[name].__class__ = torch.nn.Linear
    return plain


def same_A(model, names):
    layers = lora_layers(model, names[0])
    return all(x.lora_A[n] is x.lora_A[names[0]] for x in layers.values() for n in names)


def by_task(model, task, batch):
    model.set_adapter(task)
    return outputs(model, batch)


def delta_weights(model, task):
    return {name: x.get_delta_weight(task) for name, x in lora_layers(model, task).items()}


class TestShare:
    @pytest.mark.parametrize("family", TARGETS)
    def test_one_A_and_outputs_of_the_base_model_at_first(self, projectors, family):
        base, batch = make(family), text_batches()[0]
        model = ipa_hf.share(make(family), projectors[family], TASKS)
        assert same_A(model, TASKS)
        assert {type(layer) for layer in lora_layers(model, "mail").values()} == {SharedLoraLinear}
        assert model.active_adapter == "mail"
        assert len([n for n, _ in model.named_parameters() if "lora_A" in n]) == len(
            projectors[family]
        )
        for task in TASKS:
            assert torch.equal(by_task(model, task, batch), outputs(base, batch))

    def test_A_is_that_of_get_ipa_model(self, projectors):
        settings = config(lora_alpha=4)
        one = ipa_hf.get_ipa_model(make("llama"), settings, projectors["llama"])
        model = ipa_hf.share(make("llama"), projectors["llama"], TASKS)
        for name, layer in lora_layers(one, "default").items():
            other = lora_layers(model, "code")[name]
            assert torch.equal(layer.lora_A["default"].weight, other.lora_A["code"].weight)
            assert layer.scaling["default"] == other.scaling["code"]

    def test_ranks_by_layer(self, projectors):
        ranks = {name: 1 + i % 4 for i, name in enumerate(projectors["llama"])}
        truncated = {n: p.truncate(ranks[n]) for n, p in projectors["llama"].items()}
        model = ipa_hf.share(make("llama"), truncated, TASKS)
        for name, layer in lora_layers(model, "news").items():
            assert layer.r["news"] == ranks[name] and layer.scaling["news"] == 1

    def test_settings(self, projectors):
        settings = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, use_rslora=True)
        model = ipa_hf.share(
            make("llama"), projectors["llama"], ["mail"], config=settings, scaling=0.5
        )
        assert settings.target_modules is None, "the configuration was changed"
        layers = lora_layers(model, "mail")
        assert layers.keys() == projectors["llama"].keys()
        assert {layer.r["mail"] for layer in layers.values()} == {2}

    def test_each_task_trains_its_B_alone(self, projectors):
        model = shared(projectors)
        for task in TASKS:
            model.set_adapter(task)
            trainable = [n for n, p in model.named_parameters() if p.requires_grad]
            assert trainable and all(f"lora_B.{task}." in name for name in trainable)
            before = {n: p.clone() for n, p in model.named_parameters()}
            train(model, text_batches())
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, before[name]) != (name in trainable), name

    def test_refusals(self, projectors):
        good = projectors["llama"]
        first = next(iter(good))
        cases = [
            (SettingError, "one or more", {"names": []}),
            (SettingError, "different names", {"names": ["a", "a"]}),
            (SettingError, "without dots", {"names": ["a.b"]}),
            (SettingError, "without dots", {"names": ["a/b"]}),
            (SettingError, r"got \['use_dora'\]", {"config": config(use_dora=True)}),
            (SettingError, r"'modules_to_save'", {"config": config(modules_to_save=["lm_head"])}),
            (
                LayerError,
                "no projector of this name",
                {"config": config(target_modules="all-linear")},
            ),
            (RankError, "rank 8 or more", {"config": config(r=8)}),
            (
                ShapeError,
                "features",
                {"projectors": dict(good) | {first: good["model.layers.0.mlp.down_proj"]}},
            ),
            (SettingError, "pass projectors", {"projectors": "mail"}),
        ]
        for error, match, change in cases:
            call = {"projectors": dict(good), "names": TASKS} | change
            with pytest.raises(error, match=match):
                ipa_hf.share(make("llama"), call.pop("projectors"), call.pop("names"), **call)
        with pytest.raises(SettingError, match=r"got a PeftModel with \['default'\]"):
            ipa_hf.share(get_peft_model(make("llama"), config()), good, TASKS)

    def test_copies(self, projectors):
        model, batch = shared(projectors), text_batches()[0]
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert same_A(copied, TASKS)
            assert torch.equal(by_task(copied, "news", batch), by_task(model, "news", batch))


class TestMixedBatches:
    ROWS = ["news", "mail", "__base__", "news", "code", "mail"]

    @pytest.mark.parametrize("family", TARGETS)
    def test_each_row_as_alone(self, projectors, family):
        model, batch = shared(projectors, family), text_batches()[0]
        with torch.no_grad():
            mixed = model(**batch, adapter_names=self.ROWS)[0]
            stock = separate(model)(**batch, adapter_names=self.ROWS)[0]
        torch.testing.assert_close(mixed, stock, rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            base = outputs(model, batch)
        for row, task in enumerate(self.ROWS):
            alone = base if task == "__base__" else by_task(model, task, batch)
            torch.testing.assert_close(mixed[row], alone[row], rtol=1e-5, atol=1e-5)
        assert (mixed - base)[[0, 1, 3, 4, 5]].abs().amax(dim=(1, 2)).min() > 1e-3

    def test_projection_is_computed_once(self, projectors):
        model, batch = shared(projectors), text_batches()[0]
        counts = dict.fromkeys(lora_layers(model, "mail"), 0)
        for name, layer in lora_layers(model, "mail").items():
            layer.lora_A["mail"].register_forward_hook(
                lambda *_, name=name: counts.update({name: counts[name] + 1})
            )
        model(**batch, adapter_names=self.ROWS)
        assert set(counts.values()) == {1}

    def test_scalings_count_by_adapter(self, projectors):
        model, batch = shared(projectors), text_batches()[0]
        for layer in lora_layers(model, "mail").values():
            layer.set_scale("news", 0.25)
        with torch.no_grad():
            mixed = model(**batch, adapter_names=self.ROWS)[0]
            stock = separate(model)(**batch, adapter_names=self.ROWS)[0]
        torch.testing.assert_close(mixed, stock, rtol=1e-5, atol=1e-5)

    def test_adapters_with_their_own_A_beside_shared_ones(self, projectors):
        model, batch = shared(projectors), text_batches()[0]
        model.add_adapter("own", config(init_lora_weights=False))
        rows = ["own", "mail", "__base__", "news", "code", "own"]
        model.eval()
        with torch.no_grad():
            mixed = model(**batch, adapter_names=rows)[0]
            stock = separate(model)(**batch, adapter_names=rows)[0]
        assert torch.equal(mixed, stock)
        assert not torch.allclose(mixed[0], by_task(model, "mail", batch)[0], atol=1e-3)

    def test_only_base_rows_and_half_precision(self, projectors):
        model, batch = shared(projectors, config=config(lora_dropout=0.5)), text_batches()[0]
        with torch.no_grad():
            base = model(**batch, adapter_names=["__base__"] * 6)[0]
            with model.disable_adapter():
                assert torch.equal(base, outputs(model, batch))
            half = copy.deepcopy(model).to(torch.bfloat16)
            mixed, stock = (m(**batch, adapter_names=self.ROWS)[0] for m in (half, separate(half)))
            assert mixed.dtype == torch.bfloat16
            with torch.autocast("cpu", torch.bfloat16):
                under_autocast = model(**batch, adapter_names=self.ROWS)[0]
            torch.testing.assert_close(under_autocast.float(), mixed.float(), rtol=0.05, atol=0.05)
            wide = make("llama").to(torch.bfloat16)
            over_half = ipa_hf.share(wide, projectors["llama"], TASKS).eval()
            assert over_half(**batch, adapter_names=self.ROWS)[0].dtype == torch.bfloat16
            torch.testing.assert_close(mixed, stock, rtol=0.05, atol=0.05)

    def test_gradients_reach_the_B_of_each_row(self, projectors):
        model, batch = shared(projectors), text_batches()[0]
        plain = separate(model)
        for m in (model, plain):
            for name, parameter in m.named_parameters():
                parameter.requires_grad_("lora_B" in name)
            m(**batch, adapter_names=self.ROWS)[0].square().mean().backward()
        expected = dict(plain.named_parameters())
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(
                    parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-7
                )

    def test_generation_with_beams(self, projectors):
        settings = config(lora_alpha=4, task_type="CAUSAL_LM")
        model = shared(projectors, config=settings)
        ids = text_batches(padding=0)[0]["input_ids"][:3]
        options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
        rows = ["news", "mail", "__base__"]
        mixed = model.generate(input_ids=ids, adapter_names=rows, **options)
        stock = separate(model).generate(input_ids=ids, adapter_names=rows, **options)
        assert torch.equal(mixed, stock)


class TestPeft:
    """Functions of PEFT that keep working."""

    def test_portable_folders_load_in_stock_peft_and_join_again(self, projectors, tmp_path):
        model, batch = shared(projectors), text_batches()[0]
        expected = {task: by_task(model, task, batch) for task in TASKS}
        model.save_pretrained(tmp_path)
        for task in TASKS:
            alone = PeftModel.from_pretrained(make("llama"), tmp_path / task)
            assert torch.equal(outputs(alone, batch), expected[task])
        joined = PeftModel.from_pretrained(make("llama"), tmp_path / "mail", adapter_name="mail")
        for task in TASKS[1:]:
            joined.load_adapter(tmp_path / task, task)
        assert not same_A(joined, TASKS)
        assert ipa_hf.share(joined, "mail", TASKS) is joined
        assert same_A(joined, TASKS)
        for task in TASKS:
            assert torch.equal(by_task(joined, task, batch), expected[task])

    def test_another_task_joins(self, projectors):
        model, batch = shared(projectors), text_batches()[0]
        ipa_hf.share(model, "mail", ["poems"])
        assert same_A(model, [*TASKS, "poems"])
        model.set_adapter("poems")
        assert all("lora_B.poems" in n for n, p in model.named_parameters() if p.requires_grad)
        with model.disable_adapter():
            base = outputs(model, batch)
        assert torch.equal(by_task(model, "poems", batch), base)
        train(model, text_batches())
        assert not torch.equal(by_task(model, "poems", batch), base)

    def test_other_A_and_other_layers_are_refused(self, projectors):
        model = shared(projectors)
        model.add_adapter("own", config())
        with pytest.raises(SettingError, match=r"layer '.*': expected adapters with the same A"):
            ipa_hf.share(model, "mail", ["own"])
        model.add_adapter("few", config(target_modules=["q_proj"]))
        with pytest.raises(SettingError, match="expected adapters of the same layers"):
            ipa_hf.share(model, "mail", ["few"])
        model.add_adapter("dora", config(use_dora=True))
        with pytest.raises(SettingError, match=r"got \['use_dora'\] in 'dora'"):
            ipa_hf.share(model, "mail", ["dora"])
        with pytest.raises(SettingError, match="expected one of the adapters"):
            ipa_hf.share(model, "none", ["mail"])

    def test_loading_over_a_shared_A_is_refused(self, projectors, tmp_path):
        model, batch = shared(projectors), text_batches()[0]
        expected = {task: by_task(model, task, batch) for task in TASKS}
        model.save_pretrained(tmp_path / "good")
        model.load_adapter(tmp_path / "good" / "news", "news")  # the same A: nothing changes
        other = get_peft_model(make("llama"), config(lora_alpha=4, init_lora_weights=False))
        other.save_pretrained(tmp_path / "other")
        with pytest.raises(SettingError, match="expected the A that several adapters share"):
            model.load_adapter(tmp_path / "other", "news")
        for task in TASKS:
            assert torch.equal(by_task(model, task, batch), expected[task])

    def test_deleted_adapters_leave_the_others(self, projectors):
        model, batch = shared(projectors), text_batches()[0]
        expected = by_task(model, "news", batch)
        model.set_adapter("news")
        for task in ("mail", "code"):
            model.delete_adapter(task)
        assert torch.equal(by_task(model, "news", batch), expected)

    @pytest.mark.parametrize("family", TARGETS)
    def test_merging_adds_the_B(self, projectors, family):
        model, batch = shared(projectors, family), text_batches()[0]
        deltas = {task: delta_weights(model, task) for task in ("mail", "news")}
        base = {n: x.get_base_layer().weight.clone() for n, x in lora_layers(model, "mail").items()}
        merged = copy.deepcopy(model).merge_and_unload(adapter_names=["mail", "news"])
        for name, weight in base.items():
            total = weight + deltas["mail"][name] + deltas["news"][name]
            error = (merged.get_submodule(name).weight - total).norm() / total.norm()
            assert error <= 1e-6
        one = copy.deepcopy(model).merge_and_unload(adapter_names=["code"])
        torch.testing.assert_close(
            outputs(one, batch), by_task(model, "code", batch), rtol=1e-4, atol=1e-5
        )

    def test_weighted_sum_adds_the_B_exactly(self, projectors):
        model, batch = shared(projectors), text_batches()[0]
        weights = {"mail": 0.5, "news": -2.0}
        deltas = {task: delta_weights(model, task) for task in weights}
        model.add_weighted_adapter(list(weights), list(weights.values()), "sum")
        assert same_A(model, [*TASKS, "sum"])
        for name, delta in delta_weights(model, "sum").items():
            total = sum(weights[task] * deltas[task][name].double() for task in weights)
            assert (delta - total).norm() <= 1e-6 * total.norm()
        rows = ["sum", "mail", "__base__", "sum", "news", "code"]
        with torch.no_grad():
            mixed = model(**batch, adapter_names=rows)[0]
        torch.testing.assert_close(mixed[3], by_task(model, "sum", batch)[3], rtol=1e-5, atol=1e-5)

    def test_unload_gives_the_base_model(self, projectors):
        batch = text_batches()[0]
        plain = shared(projectors).unload()
        assert not any(isinstance(module, LoraLayer) for module in plain.modules())
        assert torch.equal(outputs(plain, batch), outputs(make("llama"), batch))

    def test_merged_rows_are_refused_and_unmerged_ones_computed(self, projectors):
        model, batch = shared(projectors), text_batches()[0]
        model.set_adapter("mail")
        model.merge_adapter()
        with pytest.raises(ValueError, match="unmerge_adapter"):
            model(**batch, adapter_names=["news"] * 6)
        with pytest.raises(SettingError, match="call unmerge_adapter"):
            ipa_hf.share(model, "mail", ["poems"])

    def test_export(self, projectors, tmp_path):
        model, batch = shared(projectors), text_batches()[0]
        ipa_hf.export_lora(model, tmp_path, adapter_name="news")
        served = PeftModel.from_pretrained(make("llama"), tmp_path)
        torch.testing.assert_close(
            outputs(served, batch), by_task(model, "news", batch), rtol=1e-5, atol=1e-5
        )


class TestFiles:
    def test_round_trip(self, projectors, tmp_path):
        model, batch = shared(projectors), text_batches()[0]
        ipa_hf.save_shared(model, tmp_path)
        loaded = ipa_hf.load_shared(make("llama"), tmp_path)
        assert list(loaded.peft_config) == sorted(TASKS) and same_A(loaded, TASKS)
        assert not any(p.requires_grad for p in loaded.parameters())
        for task in TASKS:
            assert torch.equal(by_task(loaded, task, batch), by_task(model, task, batch))
            assert find_metadata(loaded, task) == find_metadata(model, task) is not None
        trainable = ipa_hf.load_shared(make("llama"), tmp_path, ["news"], is_trainable=True)
        names = [n for n, p in trainable.named_parameters() if p.requires_grad]
        assert names and all("lora_B.news" in name for name in names)

    def test_A_is_written_once(self, projectors, tmp_path):
        model = shared(projectors)
        ipa_hf.save_shared(model, tmp_path / "one")
        model.save_pretrained(tmp_path / "many")
        sizes = {
            folder: sum(f.stat().st_size for f in (tmp_path / folder).rglob("*.safetensors"))
            for folder in ("one", "many")
        }
        layers = lora_layers(model, "mail").values()
        a = sum(layer.lora_A["mail"].weight.nbytes for layer in layers)
        b = sum(layer.lora_B["mail"].weight.nbytes for layer in layers)
        assert a + 3 * b <= sizes["one"] <= a + 3 * b + 3 * 4096
        assert 3 * (a + b) <= sizes["many"]

    def test_alpha_of_each_adapter_is_kept(self, projectors, tmp_path):
        model, batch = shared(projectors, names=["mail"]), text_batches()[0]
        model.save_pretrained(tmp_path / "stock")
        loaded = PeftModel.from_pretrained(
            make("llama"), tmp_path / "stock" / "mail", adapter_name="mail"
        )
        other = copy.deepcopy(loaded.peft_config["mail"])
        other.lora_alpha *= 2
        loaded.load_adapter(tmp_path / "stock" / "mail", "loud", config=other)
        loaded.eval()
        for layer in lora_layers(loaded, "loud").values():
            layer.scaling["loud"] = 2.0
        loaded.peft_config["loud"].lora_alpha = other.lora_alpha
        ipa_hf.share(loaded, "mail", ["loud"])
        ipa_hf.save_shared(loaded, tmp_path / "shared")
        again = ipa_hf.load_shared(make("llama"), tmp_path / "shared")
        for task in ("mail", "loud"):
            assert torch.equal(by_task(again, task, batch), by_task(loaded, task, batch))

    def test_one_adapter_can_be_sent_later(self, projectors, tmp_path):
        model, batch = shared(projectors), text_batches()[0]
        ipa_hf.save_shared(model, tmp_path)
        ipa_hf.share(model, "mail", ["poems"])
        randomize(model)
        ipa_hf.save_shared(model, tmp_path, ["poems"])
        loaded = ipa_hf.load_shared(make("llama"), tmp_path)
        assert list(loaded.peft_config) == sorted([*TASKS, "poems"])
        assert torch.equal(by_task(loaded, "poems", batch), by_task(model, "poems", batch))

    def test_refusals(self, projectors, tmp_path):
        model = shared(projectors)
        ipa_hf.save_shared(model, tmp_path)
        with pytest.raises(MissingFileError):
            ipa_hf.load_shared(make("llama"), tmp_path / "nowhere")
        with pytest.raises(MissingFileError):
            ipa_hf.load_shared(make("llama"), tmp_path, ["poems"])
        with pytest.raises(SettingError, match="got a PeftModel"):
            ipa_hf.load_shared(model, tmp_path)
        with pytest.raises(FileFormatError, match=r"layer '.*': expected shape"):
            small = make("llama")
            small.model.layers = small.model.layers[:1]
            ipa_hf.load_shared(small, tmp_path)
        model.add_adapter("own", config())
        with pytest.raises(SettingError, match="'own', which does not share that of 'mail'"):
            ipa_hf.save_shared(model, tmp_path)
        with pytest.raises(SettingError, match="expected one of the adapters"):
            ipa_hf.save_shared(model, tmp_path, ["poems"])

    def test_damaged_and_mixed_folders(self, projectors, tmp_path):
        model = shared(projectors)
        ipa_hf.save_shared(model, tmp_path)
        path = tmp_path / "news" / "lora_B.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[:40])
        with pytest.raises(FileFormatError, match="expected a safetensors file"):
            ipa_hf.load_shared(make("llama"), tmp_path)
        save_file(load_file(tmp_path / "mail" / "lora_B.safetensors"), path)
        with pytest.raises(FileFormatError, match="expected format 'ipa-shared-adapter'"):
            ipa_hf.load_shared(make("llama"), tmp_path)
        path.write_bytes(whole)
        other = {n: p.truncate(4) for n, p in projectors["llama"].items()}
        moved = ipa_hf.share(make("llama"), other, ["mail"], scaling=0.5)
        ipa_hf.save_shared(moved, tmp_path)
        with pytest.raises(FileFormatError, match=r"(code|news).*those of another A"):
            ipa_hf.load_shared(make("llama"), tmp_path)
        assert list(ipa_hf.load_shared(make("llama"), tmp_path, ["mail"]).peft_config) == ["mail"]
        (tmp_path / "lora_A.safetensors").write_bytes(b"nothing")
        with pytest.raises(FileFormatError, match="lora_A.safetensors: expected a safetensors"):
            ipa_hf.load_shared(make("llama"), tmp_path)
