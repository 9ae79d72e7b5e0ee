"""Online learning within transformers.Trainer."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from ipa_core import ExactCovariance, SettingError
from ipa_hf import OnlineCallback
from ipa_torch import (
    OnlineLearning,
    adapter_state_dict,
    attach,
    fit_projectors,
    load_adapter_state_dict,
)

from .models import TARGETS, base_state, make, outputs, same_state, text_batches

pytestmark = pytest.mark.filterwarnings("ignore")  # raised by the trainer's dependencies


class ProjectionRecorder(TrainerCallback):
    """Callback that records P after each micro-batch and each optimizer step."""

    def __init__(self, p):
        self.p, self.within, self.after = p, [], []

    def on_substep_end(self, args, state, control, **kwargs):
        self.within.append(self.p.clone())

    def on_step_end(self, args, state, control, **kwargs):
        self.after.append(self.p.clone())


def prepared():
    model = make("llama")
    targets = TARGETS["llama"]
    attach(model, fit_projectors(model, text_batches(), 4, targets=targets, progress=False))
    return model


def projection(model):
    return model.model.layers[1].mlp.down_proj.projection("default").weight


def train(model, folder, callbacks, **settings):
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": ids}
        for batch in text_batches()
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    arguments = TrainingArguments(
        str(folder), save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, **settings
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()


def test_p_moves_with_the_optimizer_and_not_in_between(tmp_path):
    model = prepared()
    initial, recorder = projection(model).clone(), ProjectionRecorder(projection(model))
    with OnlineLearning(model) as online:
        callback = OnlineCallback(online)
        accumulating = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        train(model, tmp_path, [callback, recorder], max_steps=3, **accumulating)
    assert len(recorder.within) == len(recorder.after) == 3
    for old, within, new in zip(
        (initial, *recorder.after[:-1]), recorder.within, recorder.after, strict=True
    ):
        assert torch.equal(within, old)
        assert not torch.equal(new, old)
    assert len(callback.lost_share) == 10
    assert all(0 <= jump < 1 for jump in callback.lost_share.values())


def test_only_the_adapter_is_changed(tmp_path):
    model = prepared()
    with OnlineLearning(model) as online:
        train(model, tmp_path, [OnlineCallback(online)], max_steps=2)
    plain = base_state(make("llama"))
    assert same_state({name: base_state(model)[name] for name in plain}, plain)


def test_every_accumulated_batch_is_learned_from(tmp_path):
    projections = []
    for size, count in ((4, 6), (24, 1)):
        model = prepared()
        with OnlineLearning(model, learner=ExactCovariance) as online:
            sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": count}
            train(model, tmp_path, [OnlineCallback(online)], max_steps=1, **sizes)
        projections.append(projection(model))
    torch.testing.assert_close(*projections, atol=1e-4, rtol=1e-3)


def test_a_model_that_runs_unseen_is_an_error(tmp_path):
    model = prepared()
    with OnlineLearning(model) as online:
        pass  # left before training
    with pytest.raises(SettingError, match="enter the context"):
        train(model, tmp_path, [OnlineCallback(online)], max_steps=1)


def test_trained_adapter_is_saved_and_loaded(tmp_path):
    model, batch = prepared(), text_batches()[0]
    with OnlineLearning(model) as online:
        train(model, tmp_path, [OnlineCallback(online)], max_steps=2)
    save_file(adapter_state_dict(model), tmp_path / "adapter.safetensors")
    again = make("llama")
    load_adapter_state_dict(again, load_file(tmp_path / "adapter.safetensors"))
    torch.testing.assert_close(outputs(again, batch), outputs(model, batch))
