"""The methods: each begins as the base model, trains what it says, and costs what it says."""

import inspect
from pathlib import Path

import pytest
import torch

import ipa_hf
from benchmarks.evidence import texts
from benchmarks.evidence.methods import METHODS, Adapter, Method
from benchmarks.evidence.projections import (
    COMMON,
    Sample,
    damped,
    gradient,
    joined,
    leading,
    less_inputs,
    natural,
    outputs,
    second_moments,
    short_update,
    weight_gradients,
)
from benchmarks.evidence.refreshing import Refresh
from benchmarks.evidence.similarity import matrix, of_a, of_b, of_features, of_update, pairs_of
from benchmarks.evidence.task import Settings, sample
from benchmarks.evidence.texts import TextTask
from benchmarks.evidence.training import train
from ipa_hf.__main__ import _parser
from ipa_torch import DampedGradientSketch
from tests.benchmarks import evidence_models as tiny

SETTINGS = Settings(rank=2, steps=60, batch_size=16, learn_from=48)


@pytest.fixture(scope="module", autouse=True)
def toy_texts():
    """Let the texts that P alone is chosen from be toys, too."""
    names = {name for method in METHODS.values() for name in method.texts}
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(texts.SOURCES, name, lambda: tiny.rows(60))
        yield


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tiny.bert(tmp_path_factory.mktemp("bert"))
    return TextTask("toy", adapted=2, rows=tiny.rows(200), folder=folder, sizes=(100, 80, 40, 60))


@pytest.fixture
def some(task):
    batches = sample(task.training(0), 16, 48, 0)
    return Sample(task.fresh(0), batches, task.loss, rank=2, seed=0)


@pytest.fixture(scope="module")
def adapter(task):
    return Adapter(task, SETTINGS)


@pytest.mark.parametrize("name", METHODS)
def test_method(name, task, adapter):
    method = METHODS[name]
    model, spent = adapter(method, seed=0)
    batch = sample(task.training(0), 16, 16, 0)[0]
    plain = task.fresh(0)
    with torch.no_grad():
        torch.testing.assert_close(model(batch), plain(batch), atol=1e-5, rtol=1e-4)
    before = pairs_of(model.body)
    cost = train(model, task, SETTINGS, 1e-2, 0, spent)
    after = pairs_of(model.body)
    still = all(torch.equal(before[layer].a, after[layer].a) for layer in before)
    assert still == (not method.trainable)
    assert any(pair.b.any() for pair in after.values())
    assert cost.steps == SETTINGS.steps - round(spent)
    head = sum(p.numel() for p in model.head.parameters())
    count = sum(pair.b.numel() + method.trainable * pair.a.numel() for pair in after.values())
    magnitudes = sum(p.numel() for n, p in model.named_parameters() if "lora_magnitude_vector" in n)
    assert cost.trainable == count + head + magnitudes


def test_eva_is_eva_each_time(adapter):
    for _ in range(2):
        for pair in pairs_of(adapter(METHODS["EVA"], seed=0)[0].body).values():
            unit = torch.eye(len(pair.a), dtype=pair.a.dtype)
            torch.testing.assert_close(pair.a @ pair.a.T, unit, atol=1e-4, rtol=0)


def test_what_choosing_costs(adapter):
    costs = {
        name: adapter(METHODS[name], seed=0)[1]
        for name in ("LoRA", "orthonormal, frozen", "IPA, frozen", "gradient, frozen")
    }
    assert list(costs.values()) == [0, 0, 1.5, 3]  # steps, for three batches
    assert adapter(METHODS["EVA"], seed=0)[1] >= 1.5


def test_frozen_keep_less_for_the_backward_pass(task, adapter):
    kept = {}
    for name in ("LoRA", "IPA, frozen"):
        model, _ = adapter(METHODS[name], seed=0)
        kept[name] = train(model, task, SETTINGS, 1e-2, 0, 0.0).mebibytes
    assert kept["IPA, frozen"] < kept["LoRA"]


def test_training_learns(task, adapter):
    model, _ = adapter(METHODS["LoRA"], seed=0)
    batches = sample(task.training(0), 16, 80, 0)

    def loss():
        with torch.no_grad():
            return sum(float(task.loss(model, batch)) for batch in batches)

    before = loss()
    train(model, task, SETTINGS, 3e-2, 0, 0.0)
    assert loss() < 0.8 * before


def test_choosing_for_all_steps_is_refused(task, adapter):
    with pytest.raises(ValueError, match="expected P to cost less than 60 steps, got 60"):
        train(adapter(METHODS["LoRA"], seed=0)[0], task, SETTINGS, 1e-2, 0, 60.0)


def test_second_moments(some):
    name, seen = "encoder.layer.1.intermediate.dense", []
    layer = some.model.body.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for batch in some.batches:
        with torch.no_grad():
            some.loss(some.model, batch)
        seen[-1] = seen[-1][batch["attention_mask"].bool()]
    handle.remove()
    x = torch.cat(seen).double()
    torch.testing.assert_close(second_moments(some)[name], x.T @ x / len(x), atol=1e-5, rtol=1e-4)


def test_sketched_gradient_is_the_gradient(some):
    exact, sketched = weight_gradients(some), gradient(some)
    for name, g in exact.items():
        rows = leading(g, 2)
        kept = (g @ torch.as_tensor(sketched[name].components).double().T).norm()
        assert kept > 0.98 * (g @ rows.T).norm()
    assert not any(p.requires_grad for p in some.model.body.parameters())
    assert all(p.grad is None for p in some.model.parameters())


def test_less_inputs_is_orthogonal_to_common_directions(some):
    moments = second_moments(some)
    for name, p in less_inputs(some).items():
        common = torch.linalg.eigh(moments[name]).eigenvectors[:, -COMMON:]
        assert (p.components.double() @ common).abs().max() < 1e-5


def test_damped_gradient_is_a_damped_step(some):
    gradients, moments = weight_gradients(some), second_moments(some)
    few = gradient(some, DampedGradientSketch)
    for name, p in damped(some).items():
        c = moments[name]
        unit = c.trace() / len(c) * torch.eye(len(c), dtype=c.dtype)
        step = gradients[name] @ torch.linalg.inv(c + unit)
        rows = p.components.double()
        assert (step @ rows.T).norm() == pytest.approx(float((step @ leading(step, 2).T).norm()))
        kept = (step @ few[name].components.double().T).norm()
        assert kept > 0.95 * (step @ rows.T).norm()


def test_natural_gradient_turns_to_where_outputs_matter_least(some):
    """With outputs' gradients of one size everywhere it is the damped gradient."""
    gradients, moments = weight_gradients(some), second_moments(some)
    of_outputs = {}
    for name, layer in some.layers.items():
        seen = []

        def hear(module, args, output, seen=seen):
            output.register_hook(seen.append)

        handle = layer.register_forward_hook(hear)
        weight_gradients(some)
        handle.remove()
        rows = torch.cat([g.flatten(0, -2) for g in seen]).double()
        of_outputs[name] = rows.T @ rows
    for name, p in natural(some).items():

        def damped_inverse(c):
            return torch.linalg.inv(c + c.trace() / len(c) * torch.eye(len(c), dtype=c.dtype))

        step = damped_inverse(of_outputs[name]) @ gradients[name] @ damped_inverse(moments[name])
        kept = (step @ p.components.double().T).norm()
        assert float(kept) == pytest.approx(float((step @ leading(step, 2).T).norm()), rel=1e-5)


def test_joined_keeps_the_first_rows():
    first, second = torch.eye(4)[:1], torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 0]])
    rows = joined(first, second, 2)
    torch.testing.assert_close(rows.abs(), torch.eye(4)[:2])


@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_refresh_changes_p_and_carries_b(kept, task, adapter):
    """B A is unchanged within the new span, which contains the directions used most."""
    method = Method(trainable=False, refresh=Refresh("damped gradient", after=0, kept=kept))
    model, spent = adapter(method, seed=0)
    assert spent == 3
    turn = adapter.turn(method, model, seed=0)
    train(model, task, SETTINGS, 1e-2, 0, spent)
    before = pairs_of(model.body)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    task.loss(model, sample(task.training(0), 16, 16, 0)[0]).backward()
    optimizer.step()
    before = pairs_of(model.body)
    turn(optimizer)
    after = pairs_of(model.body)
    for name, old in before.items():
        update, now = old.b @ old.a, after[name].b @ after[name].a
        rows = torch.linalg.qr(after[name].a.T).Q.T
        torch.testing.assert_close(now, update @ rows.T @ rows, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(old.a, after[name].a)
        if kept:
            most = leading(update, 1)
            assert float((most @ rows.T).norm()) == pytest.approx(1, abs=1e-5)
    assert all(
        id(p) not in map(id, optimizer.state) for n, p in model.named_parameters() if "lora_B" in n
    )


def test_refresh_comes_after_its_steps(task, adapter):
    method = METHODS["random A, then damped gradient"]
    changed = {}
    for refresh in (False, True):
        model, spent = adapter(method, seed=0)
        start = pairs_of(model.body)
        train(
            model,
            task,
            SETTINGS,
            1e-2,
            0,
            spent,
            adapter.turn(method, model, 0) if refresh else None,
        )
        end = pairs_of(model.body)
        changed[refresh] = [not torch.equal(start[name].a, end[name].a) for name in start]
    assert not any(changed[False]) and all(changed[True])


def test_recommended_call_is_the_method_of_the_tables():
    """The README's call and the command line, without options, are "IPA, frozen"."""
    method = METHODS["IPA, frozen"]
    call = inspect.signature(ipa_hf.get_ipa_model).parameters
    line = _parser().parse_args(["fit", "model", "texts.jsonl", "--out", "adapter"])
    for name in ("trainable", "scaling"):
        assert call[name].default == getattr(line, name) == getattr(method, name)
    assert not line.without_first_token and line.alpha is None
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    assert "LoraConfig(r=8, lora_alpha=8, " in readme and line.rank == Settings().rank == 8
    assert "get_ipa_model(model, config, loader)" in readme


def test_texts_that_p_is_chosen_from(task, adapter):
    shared = Method("inputs", False, texts=("toy", "reviews"))
    batches = adapter._batches(shared, seed=0)
    assert [len(batch["labels"]) for batch in batches] == [16, 8, 16, 8]
    own = {id(example) for example in task.training(0)}
    assert not own & {id(example) for example in task.of_texts("reviews", 0)}


def test_spread_ranks_have_the_budget_of_equal_ones(adapter):
    pairs = pairs_of(adapter(METHODS["IPA spread ranks, frozen"], seed=0)[0].body)
    ranks = {pair.a.numpy().tobytes(): len(pair.a) for pair in pairs.values()}  # shared: once
    assert sum(ranks.values()) == 2 * len(ranks)
    assert len(set(ranks.values())) > 1


def test_outputs_rebuild_best(some):
    """W x from P x: the optimum is the tail of the singular values of W C^1/2."""
    moments = second_moments(some)
    for name, p in outputs(some).items():
        w, c = some.layers[name].weight.detach().double(), moments[name]
        rows = p.components.double()
        rebuilt = w @ c @ rows.T @ torch.linalg.inv(rows @ c @ rows.T)
        error = (w - rebuilt @ rows) @ c @ (w - rebuilt @ rows).T
        best = torch.linalg.eigvalsh(w @ c @ w.T)[:-2].sum()
        assert float(error.trace()) == pytest.approx(float(best), rel=1e-3)


def test_short_update_gives_the_weights_back(some):
    before = {name: layer.weight.clone() for name, layer in some.layers.items()}
    projectors = short_update(some)
    for name, layer in some.layers.items():
        assert torch.equal(layer.weight, before[name])
        assert not layer.weight.requires_grad
        rows = projectors[name].components
        torch.testing.assert_close(rows @ rows.T, torch.eye(2), atol=1e-5, rtol=0)


def test_likeness(task, adapter):
    pairs = []
    for seed in (0, 1):
        model, _ = adapter(METHODS["LoRA"], seed=0)
        train(model, task, SETTINGS, 1e-2, seed, 0.0)
        pairs.append(pairs_of(model.body))
    name = next(iter(pairs[0]))
    one, other = (found[name] for found in pairs)
    dense = torch.cosine_similarity((one.b @ one.a).flatten(), (other.b @ other.a).flatten(), dim=0)
    assert of_update(one, other) == pytest.approx(float(dense))
    for likeness in (of_a, of_b, of_update):
        values = torch.tensor(matrix(pairs, likeness))
        torch.testing.assert_close(values, values.T)
        torch.testing.assert_close(values.diag(), torch.ones(2))
        assert values.max() <= 1 + 1e-6


def test_likeness_of_features_looks_past_rotations():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    assert of_features(a, 2 * rotation @ a, x.T @ x) == pytest.approx(1)
    grams = [(x @ m.T) @ (x @ m.T).T for m in (a, b)]
    cka = (grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm())
    assert of_features(a, b, x.T @ x) == pytest.approx(float(cka))
