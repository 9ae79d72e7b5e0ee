import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ipa_core import ExactCovariance, HebbianRule, IncrementalPCA, RandomizedSVD
from ipa_core.errors import ArrayTypeError, NonFiniteError, SettingError
from ipa_torch import OnlineLearning, attach, disable_adapter, fit_projectors
from ipa_torch._layers import async_device

from .models import Transformer, decaying, mlp


def adapted(model, batches, rank=2, **options):
    attach(model, fit_projectors(model, batches, rank, progress=False), **options)
    return model


def tensors(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_p_follows_the_inputs_and_only_in_step():
    old, new = decaying(200, 12, seed=0), decaying(200, 12, seed=1)
    model = adapted(mlp(12, 4), [old])
    p = model[0].projection("default").weight
    with OnlineLearning(model, learner=ExactCovariance) as online:
        before = p.clone()
        model(new)
        assert torch.equal(p, before)
        assert repr(online) == "OnlineLearning(1 layers, 1 projectors, 200 rows)"
        online.step()
    wanted = fit_projectors(mlp(12, 4), [new], 2, learner=ExactCovariance, progress=False)["0"]
    inside = torch.linalg.svdvals(p @ wanted.components.T)
    torch.testing.assert_close(inside, torch.ones(2))
    torch.testing.assert_close(p @ p.T, torch.eye(2), atol=1e-5, rtol=0)


def test_only_training_passes_with_gradients_record():
    rows = decaying(200, 12)
    model = adapted(mlp(12, 4), [rows])
    before = tensors(model)
    with OnlineLearning(model) as online:
        with torch.no_grad():
            model(rows)
        model.eval()
        model(rows)
        model.train()
        with disable_adapter(model):
            model(rows)
        with pytest.raises(SettingError, match="forward pass in training mode"):
            online.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_function_is_kept_where_the_span_is():
    # The inputs of the new batch span the same two directions, with another first one.
    basis = torch.linalg.qr(torch.randn(12, 2)).Q.T
    old = torch.randn(200, 2) * torch.tensor([3.0, 1.0]) @ basis
    new = torch.randn(200, 2) * torch.tensor([1.0, 5.0]) @ basis
    model = adapted(mlp(12, 4), [old])
    model[0].lora_B["default"].data.normal_()
    with OnlineLearning(model) as online:
        before = model(new)
        lost_share = online.step()
    assert lost_share["0"] < 1e-3
    torch.testing.assert_close(model(new), before, rtol=1e-4, atol=1e-4)


def test_jump_is_the_part_outside_the_new_span():
    old, new = torch.zeros(50, 4), torch.zeros(50, 4)
    old[:, :2] = torch.randn(50, 2)
    new[:, 1:3] = torch.randn(50, 2)
    model = adapted(nn.Sequential(nn.Linear(4, 3)), [old])
    layer = model[0]
    layer.lora_B["default"].data.normal_()
    projection = layer.projection("default")

    def full():
        return layer.lora_B["default"] @ projection.weight * projection.scale

    with OnlineLearning(model) as online:
        model(new)
        before = full().detach()
        jump = online.step()["0"]
    lost = torch.linalg.norm(full() - before) / torch.linalg.norm(before)
    torch.testing.assert_close(jump, lost.item(), rtol=1e-4, atol=0)
    # The common direction keeps its part of the function, the lost one does not return.
    torch.testing.assert_close(full()[:, 1], before[:, 1], rtol=1e-4, atol=1e-5)


def test_first_moment_turns_as_gradients_do():
    basis = torch.linalg.qr(torch.randn(12, 2)).Q.T
    old = torch.randn(200, 2) * torch.tensor([3.0, 1.0]) @ basis
    new = torch.randn(200, 2) * torch.tensor([1.0, 5.0]) @ basis
    model = adapted(mlp(12, 4), [old])
    lift = model[0].lora_B["default"]
    lift.data.normal_()
    optimizer = torch.optim.AdamW([lift], lr=0.0, betas=(0.0, 0.9), weight_decay=0.0)
    with OnlineLearning(model) as online:
        model(new).square().sum().backward()
        optimizer.step()
        online.step(optimizer)
    lift.grad = None
    model(new).square().sum().backward()
    torch.testing.assert_close(optimizer.state[lift]["exp_avg"], lift.grad, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_batch_counts_once_under_checkpointing(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = mlp(12, 12, 4)

        def forward(self, x):
            if reentrant is None:
                return self.block(x)
            return checkpoint(self.block, x, use_reentrant=reentrant)

    x = decaying(50, 12).requires_grad_(True)
    model = adapted(Checkpointed(), [x])
    with OnlineLearning(model) as online:
        for _ in range(2):
            model(x).square().mean().backward()
        assert {learner.samples for learner in online._learners.values()} == {100}
        online.step()
        model(x).square().mean().backward()
        assert {learner.samples for learner in online._learners.values()} == {150}


def test_shared_inputs_and_padding():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"input_ids": torch.randint(0, 20, (2, 3)), "attention_mask": mask}
    model = adapted(Transformer(), [{"input_ids": torch.randint(0, 20, (4, 9))}])
    with OnlineLearning(model) as online:
        model(**batch)
        assert {learner.samples for learner in online._learners.values()} == {3}
        assert len(online._learners) == 8


@pytest.mark.parametrize("learner", [IncrementalPCA, HebbianRule])
def test_training_goes_on(learner):
    model = adapted(Transformer(), [torch.randint(0, 20, (4, 9))], dropout=0.1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    losses, hooks = [], sum(len(module._forward_pre_hooks) for module in model.modules())
    with OnlineLearning(model, learner=learner) as online:
        for step in range(20):
            batch = torch.randint(0, 20, (8, 9), generator=torch.Generator().manual_seed(step))
            loss = model(batch).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            lost_share = online.step(optimizer)
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(0 <= jump <= 1 for jump in lost_share.values())
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks


def test_trained_p_or_no_adapter_is_refused():
    model = mlp(12, 4)
    with pytest.raises(SettingError, match="got none"):
        OnlineLearning(model)
    with pytest.raises(SettingError, match="got a trained P"):
        OnlineLearning(adapted(model, [decaying(50, 12)], trainable=True))


@pytest.mark.parametrize("learner", [IncrementalPCA, RandomizedSVD])
def test_asynchronous_devices_give_the_same_to_the_bit(monkeypatch, learner):
    def learned():
        torch.manual_seed(0)
        batch = torch.randint(0, 20, (16, 40))
        model = adapted(Transformer(width=48), [batch])
        with OnlineLearning(model, learner=learner) as online:
            for _ in range(3):
                model(batch).square().mean().backward()
                online.step()
        return model.state_dict()

    synchronous = learned()
    monkeypatch.setattr(async_device, "is_async_device", lambda device: True)
    for name, value in learned().items():
        assert torch.equal(value, synchronous[name]), name


def test_an_asynchronous_update_begins_before_the_layer_and_ends_after_it(monkeypatch):
    events = []

    class Recorded(ExactCovariance):
        def begin_update(self, batch, weights=None):
            events.append("begun")
            return super().begin_update(batch, weights)

        def _finish_update(self, update):
            events.append("finished")
            return super()._finish_update(update)

    monkeypatch.setattr(async_device, "is_async_device", lambda device: True)
    rows = decaying(50, 12)
    model = adapted(mlp(12, 4), [rows])
    model[0].base_layer.register_forward_hook(lambda *_: events.append("computed"))
    with OnlineLearning(model, learner=Recorded):
        model(rows)
    assert events == ["begun", "computed", "finished"]


def test_an_update_of_a_forward_that_failed_is_finished_in_step(monkeypatch):
    monkeypatch.setattr(async_device, "is_async_device", lambda device: True)
    rows = decaying(50, 12)
    model = adapted(mlp(12, 4), [rows])
    handle = model[0].base_layer.register_forward_hook(lambda *_: 1 / 0)
    with OnlineLearning(model, learner=ExactCovariance) as online:
        with pytest.raises(ZeroDivisionError):
            model(rows)
        handle.remove()
        online.step()
    assert [learner.samples for learner in online._learners.values()] == [50]


def test_an_invalid_input_is_named():
    model = adapted(mlp(12, 4), [decaying(50, 12)])
    with OnlineLearning(model), pytest.raises(NonFiniteError, match="layer '0'"):
        model(torch.full((4, 12), torch.nan))
    nested = torch.nested.nested_tensor([torch.ones(2, 12), torch.ones(3, 12)], layout=torch.jagged)
    with OnlineLearning(model), pytest.raises(ArrayTypeError, match="layer '0': .*a nested tensor"):
        model(nested)


def _worker(rank, folder, results):
    from torch import distributed

    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    model = adapted(mlp(12, 4), [decaying(100, 12)])
    with OnlineLearning(model, learner=ExactCovariance) as online:
        model(decaying(100, 12, seed=rank + 1))
        online.step()
    torch.save(model[0].projection("default").weight, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_workers_agree(tmp_path):
    torch.multiprocessing.spawn(_worker, (str(tmp_path), None), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)
    both = [decaying(100, 12, seed=1), decaying(100, 12, seed=2)]
    wanted = fit_projectors(mlp(12, 4), both, 2, learner=ExactCovariance, progress=False)["0"]
    torch.testing.assert_close(torch.linalg.svdvals(first @ wanted.components.T), torch.ones(2))
