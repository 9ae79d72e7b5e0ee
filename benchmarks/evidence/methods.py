"""The methods: which adapters a model gets, and what they have cost before training."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.eva import get_eva_state_dict, initialize_lora_eva_weights
from torch import nn

import ipa_hf
from benchmarks.evidence.captured import Rule, choose
from benchmarks.evidence.cutting import Batch
from benchmarks.evidence.projections import KINDS, Sample, target_names
from benchmarks.evidence.refreshing import Refresh, ScheduledRefresh
from benchmarks.evidence.task import Settings, Task, run, sample
from benchmarks.evidence.training import Plan, begin_b
from ipa_hf.lora_layers import lora_A_and_B, lora_layers
from ipa_torch import LayerProjectors


@dataclass(frozen=True)
class Method:
    """Low-rank adapters of PEFT, begun in one way or another.

    Parameters
    ----------
    projection : str, optional
        How A is chosen, of `KINDS`; "eva" by PEFT's own EVA; None: as PEFT begins it.
    trainable : bool
        Whether A is trained along with B.
    scaling : "energy" or float
        As in `ipa_hf.initialize_lora_ipa_weights`; of a rule, a number times its rows.
    rank : float
        Times the rank of the settings.
    layers : float
        Share of the layers to adapt, the last ones, that get adapters.
    refresh : Refresh, optional
        Whether a frozen P is chosen anew early in training.
    texts : sequence of str
        The texts that P is chosen from, in equal parts; by default those of the task.
    options : mapping
        Of `LoraConfig`.
    rule : callable, optional
        How the rows of A are made of what is captured, in the place of a projection.
    gradients : bool
        Whether the rule needs gradients: a backward pass.
    plan : Plan
        How A and B are trained.
    """

    projection: str | None = None
    trainable: bool = True
    scaling: str | float = "energy"
    rank: float = 1
    layers: float = 1
    refresh: Refresh | None = None
    texts: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    rule: Rule | None = None
    gradients: bool = False
    plan: Plan = field(default_factory=Plan)


#: LoRA's random A has rows of this length; random orthonormal ones get it too.
RANDOM = 3**-0.5

#: What the paper compares, and P chosen by the gradient.
COMPARED: dict[str, Method] = {
    "LoRA": Method(),
    "LoRA, half rank": Method(rank=0.5),
    "DoRA": Method(options={"use_dora": True}),
    "PiSSA": Method(options={"init_lora_weights": "pissa"}),
    "EVA": Method("eva"),
    "IPA, trainable": Method("inputs"),
    "random A, frozen": Method(trainable=False),
    "orthonormal, frozen": Method("orthonormal", False, RANDOM),
    "IPA, frozen": Method("inputs", False),
    "gradient, frozen": Method("gradient", False),
    "gradient less inputs, frozen": Method("gradient less inputs", False),
    "damped gradient, frozen": Method("damped gradient", False),
    "half inputs, half damped gradient": Method("half inputs", False),
}
#: Ideas beyond the paper.
BEYOND: dict[str, Method] = {
    "random A, then damped gradient": Method(trainable=False, refresh=Refresh("damped gradient")),
    "damped gradient, half refreshed": Method(
        "damped gradient", False, refresh=Refresh("damped gradient", kept=0.5)
    ),
    "natural gradient, frozen": Method("natural gradient", False),
    "short update, frozen": Method("short update", False),
    "inputs by gradient norm, frozen": Method("inputs by gradient norm", False),
    "outputs, frozen": Method("outputs", False),
    "IPA spread ranks, frozen": Method("inputs, spread ranks", False),
    "damped gradient (32), frozen": Method("damped gradient, 32 directions", False),
    "half inputs, half damped gradient (32)": Method("half inputs, 32 directions", False),
    "damped gradient, trainable": Method("damped gradient"),
    "gradient, trainable": Method("gradient"),
    "short update, trainable": Method("short update"),
}
#: How P of the inputs is learned and scaled, and from which texts.
LEARNED: dict[str, Method] = {
    "IPA centered, frozen": Method("inputs, centered", False),
    "IPA padding counted, frozen": Method("inputs, padding counted", False),
    "IPA by IncrementalPCA, frozen": Method("inputs, IncrementalPCA", False),
    "IPA by HebbianRule, frozen": Method("inputs, HebbianRule", False),
    "IPA by an autoencoder, frozen": Method("inputs, autoencoder", False),
    "IPA lambda 0.25, frozen": Method("inputs", False, 0.25),
    "IPA lambda 0.05, frozen": Method("inputs", False, 0.05),
    "IPA of another task, frozen": Method("inputs", False, texts=("adjectives",)),
    "IPA of neutral texts, frozen": Method("inputs", False, texts=("social_iqa",)),
    "IPA shared by two tasks, frozen": Method("inputs", False, texts=("headlines", "reviews")),
}
METHODS = COMPARED | BEYOND | LEARNED


class Adapter:
    """Puts a method's adapters into models of one task; what was learned is kept for other runs.

    A method is compared over learning rates and seeds: P does not depend on the rate.
    """

    def __init__(self, task: Task, settings: Settings) -> None:
        self.task = task
        self.settings = settings
        self._learned: dict[tuple[Any, ...], tuple[Any, float]] = {}

    def __call__(self, method: Method, seed: int) -> tuple[nn.Module, float]:
        """Return an adapted model, and the training steps that choosing its P is worth."""
        settings = self.settings
        rank = max(1, round(method.rank * settings.rank))
        model = self.task.fresh(seed)
        learned, cost = self._learn(model, method, rank, seed)
        torch.manual_seed(seed)  # of LoRA's A
        config = _config(model, method, rank)
        if method.refresh is not None:
            kind = KINDS[method.refresh.projection]
            cost += _steps(kind.passes, self._batches(method, seed))
        if method.projection is None:
            model.body = get_peft_model(model.body, config)
            if method.rule is not None:
                _write(model.body, learned)
            if not method.trainable:
                ipa_hf.freeze_projections(model.body)
        elif method.projection == "eva":
            model.body = get_peft_model(model.body, config, low_cpu_mem_usage=True)
            # It takes what it finds out of the mapping, and names layers as the PEFT model does.
            state = {f"base_model.model.{name}": rows for name, rows in learned.items()}
            initialize_lora_eva_weights(model.body, eva_state_dict=state)
        else:
            model.body = ipa_hf.get_ipa_model(
                model.body,
                ipa_hf.match_ranks(config, learned),
                learned,
                trainable=method.trainable,
                scaling=method.scaling,
            )
        if method.plan.first_step is not None:
            # The gradient comes along with P's backward pass, if there is one; two forward passes.
            cost += 1 if method.gradients else 1 + _steps(2, self._batches(method, seed)) - cost
            some = self._batches(method, seed)
            begin_b(model, self.task.loss, some, method.plan.first_step)
        return model, cost if self.settings.charged else 0.0

    def turn(self, method: Method, model: nn.Module, seed: int) -> ScheduledRefresh | None:
        """Return the refresh that is due in the training of an adapted model, if one is."""
        if method.refresh is None:
            return None
        some = self._batches(method, seed)
        return ScheduledRefresh(
            method.refresh, Sample(model, some, self.task.loss, self.settings.rank, seed)
        )

    def _learn(
        self, model: nn.Module, method: Method, rank: int, seed: int
    ) -> tuple[LayerProjectors | dict[str, torch.Tensor] | None, float]:
        if method.projection is None and method.rule is None:
            return None, 0.0
        options = repr(method.options)  # of EVA
        key = (method.projection, method.rule, method.scaling, method.texts, options, rank, seed)
        if key not in self._learned:
            some = self._batches(method, seed)
            if method.projection == "eva":
                self._learned[key] = _eva(model, _config(model, method, rank), some)
            elif method.rule is not None:
                found = Sample(model, some, self.task.loss, rank, seed)
                rows = choose(
                    found, method.rule, gradients=method.gradients, scaling=method.scaling
                )
                self._learned[key] = rows, _steps(1 + method.gradients, some)
            else:
                kind = KINDS[method.projection]
                chosen = kind.choose(Sample(model, some, self.task.loss, rank, seed))
                self._learned[key] = chosen, _steps(kind.passes, some)
        return self._learned[key]

    def _batches(self, method: Method, seed: int) -> list[Batch]:
        """Return what P is chosen from."""
        settings = self.settings
        sources = [self.task.of_texts(name, seed) for name in method.texts]
        sources = sources or [self.task.training(seed)]
        count = settings.learn_from // len(sources)
        return [
            batch
            for source in sources
            for batch in sample(source, settings.batch_size, count, seed)
        ]


@torch.no_grad()
def _write(body: nn.Module, rows: Mapping[str, torch.Tensor]) -> None:
    """Write A of each layer."""
    for name, layer in lora_layers(body, "default").items():
        lora_A_and_B(layer, "default")[0].copy_(rows[name])


def _steps(passes: int, batches: list[Batch]) -> float:
    """Return what passes over batches cost: a step is a forward and a backward pass, two."""
    return passes * len(batches) / 2


def _config(model: nn.Module, method: Method, rank: int) -> LoraConfig:
    begin = {"init_lora_weights": "eva", "eva_config": EvaConfig()}
    options = (begin if method.projection == "eva" else {}) | {**method.options}
    names = target_names(model)
    names = names[-round(method.layers * len(names)) :]
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=names, **options)


def _eva(
    model: nn.Module, config: LoraConfig, some: list[Batch]
) -> tuple[dict[str, torch.Tensor], float]:
    """Return PEFT's EVA, and its cost: it goes over the batches until it has converged."""
    passes = 0

    def forward(body: nn.Module, batch: Batch) -> None:
        nonlocal passes
        passes += 1
        run(body, batch)

    state = get_eva_state_dict(
        model.body,
        some,
        config,
        forward_fn=forward,
        prepare_model_inputs_fn=lambda batch, _: batch["attention_mask"].bool(),
        # A float32 copy, contiguous, without padding: what its generic route needs.
        prepare_layer_inputs_fn=lambda x, mask, _: x[0][mask].float(),
        show_progress_bar=False,
    )
    return state, passes / 2
