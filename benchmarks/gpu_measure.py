"""Stage ``measure`` of `benchmarks.gpu`: learning and training beside their floors and PEFT.

The default learner of CuPy and torch on the same device; learning over a random-weight model of
LLaMA-3-8B's shapes in bfloat16, 8 of its blocks by default, beside its bare forward pass and
PEFT's EVA; a training step beside PEFT's LoRA and DoRA. The device's own floor (a large matrix
product, a large copy) stands beside each.
"""

import copy
import importlib
import importlib.util
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import floor
from benchmarks.memory import peak_bytes
from benchmarks.timing import Action, interleaved, medians, ratio
from benchmarks.torch_peers import Late, Loader
from ipa_core import RandomizedSVD
from ipa_torch import attach, fit_projectors, select_layers

RANK = 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ARRAYS = "cupy" if DEVICE == "cuda" else "numpy"
#: Of LLaMA-3-8B's 32.
BLOCKS = 8
#: Attention with random weights averages over all positions: what it returns falls off along every
#: sequence, which a learner takes for a change. With queries this many times as long it is sharp.
SHARPNESS = 4.0
#: Seconds of EVA for each batch.
EVA_SECONDS = 2.5
Results: TypeAlias = Mapping[str, Any]
Step: TypeAlias = Callable[[Results], Any]


def learners(features: int, rows: int, batches: int, machine: floor.Machine) -> dict[str, Any]:
    """Compare libraries with the two bare products of the sketch's width, in float32."""
    scale = torch.arange(1, features + 1, device=DEVICE) ** -0.5
    pool = [torch.randn(rows, features, device=DEVICE) * scale for _ in range(4)]
    basis = torch.linalg.qr(torch.randn(features, floor.width(RANK), device=DEVICE)).Q

    def bare() -> None:
        image = torch.zeros_like(basis)
        for number in range(batches):
            x = pool[number % 4]
            image = image + x.T @ (x @ basis)

    def learn(data: list[Any]) -> None:
        learner = RandomizedSVD(RANK)
        for number in range(batches):
            learner.update(data[number % 4])
        learner.finalize()

    libraries: dict[str, list[Any]] = {"torch": pool}
    if importlib.util.find_spec(ARRAYS):
        other = importlib.import_module(ARRAYS)
        libraries[ARRAYS] = [other.from_dlpack(x) for x in pool]
    actions: dict[str, Action] = {"two bare products": bare} | {
        library: partial(learn, data) for library, data in libraries.items()
    }
    times = interleaved(actions, 3)
    entries = batches * rows * features
    least = machine.seconds(floor.two_products(RANK, entries), 4 * entries)
    figures: dict[str, Any] = {
        name: {"seconds": taken, "ratio": ratio(times, name, "two bare products")}
        for name, taken in medians(times).items()
    }
    return figures | {"floor": least / figures["two bare products"]["seconds"]}


def llama(blocks: int, tiny: bool) -> nn.Module:
    """Return a random-weight model of LLaMA-3-8B's shapes, frozen."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = (
        {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
        if tiny
        else {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    )
    config = LlamaConfig(
        **shape,
        num_key_value_heads=2 if tiny else 8,
        num_hidden_layers=blocks,
        vocab_size=256 if tiny else 128_256,
        use_cache=False,
        dtype=torch.bfloat16,
    )
    with torch.device(DEVICE):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(torch.float32)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight *= SHARPNESS
    return model


def twin(model: nn.Module) -> nn.Module:
    """Return a copy with modules of its own and the same frozen weights."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def tokens(model: nn.Module, count: int, batch: int, length: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(model.config.vocab_size, (count, batch, length), device=DEVICE)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids]


def learning(
    model: nn.Module, batches: list[Any], rank: int, wide: floor.Machine
) -> dict[str, Any]:
    """Compare a pass over batches with the same pass, learning; a quarter of them with EVA.

    Learning costs a part for each token and a part for each layer: `per_token` is the ratio of
    what the further three quarters take.
    """
    body = model.get_submodule("model")
    targets = list(select_layers(body, "all-linear"))
    some = batches[: max(1, len(batches) // 4)]

    def run(part: list[Any]) -> None:
        with torch.no_grad():
            for batch in part:
                body(**batch)

    fit = partial(fit_projectors, body, rank=rank, targets=targets, progress=False)
    actions: dict[str, Action] = {
        "bare": partial(run, batches),
        "learning": partial(fit, batches),
        "bare, a quarter": partial(run, some),
        "learning, a quarter": partial(fit, some),
    }
    times = interleaved(actions, 3)
    seconds = medians(times)
    print(seconds, flush=True)
    projectors = fit(some)
    least = wide.seconds(floor.two_products(rank, floor.entries(projectors)))
    own = {name: projector.components for name, projector in projectors.items()}
    other = eva(body, some, rank, targets)
    bare, learn = actions["bare, a quarter"], actions["learning, a quarter"]
    further = {name: seconds[name] - seconds[f"{name}, a quarter"] for name in ("bare", "learning")}
    return {
        **seconds,
        "tokens": sum(batch["input_ids"].numel() for batch in batches),
        "ratio": ratio(times, "learning", "bare"),
        "ratio, a quarter": ratio(times, "learning, a quarter", "bare, a quarter"),
        "per_token": further["learning"] / further["bare"],
        "floor": 1 + least / seconds["bare, a quarter"],
        "peak_bytes": {"bare": peak_bytes(bare), "learning": peak_bytes(learn)},
        "lost": lost(body, own, batches[0]),
        "eva_seconds": other["seconds"],
        "eva_ended": other["ended"],
        "eva_lost": lost(body, other["a"], batches[0]) if other["ended"] else None,
        "times_faster_than_eva": other["seconds"] / seconds["learning, a quarter"],
        "eva_floor": other["seconds"] / (seconds["bare, a quarter"] + least),
    }


def eva(body: nn.Module, batches: list[Any], rank: int, targets: list[str]) -> dict[str, Any]:
    from peft import EvaConfig, LoraConfig, get_eva_state_dict, get_peft_model

    config = LoraConfig(
        r=rank, target_modules=targets, init_lora_weights="eva", eva_config=EvaConfig()
    )
    wrapped = get_peft_model(twin(body), config, low_cpu_mem_usage=True)
    state: dict[str, torch.Tensor] = {}
    start = time.perf_counter()
    try:
        state = get_eva_state_dict(wrapped, Loader(batches, EVA_SECONDS), show_progress_bar=False)
    except Late:
        pass
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return {
        "seconds": time.perf_counter() - start,
        "ended": bool(state),
        "a": {name.removeprefix("base_model.model."): a for name, a in state.items()},
    }


@torch.no_grad()
def lost(body: nn.Module, found: Mapping[str, torch.Tensor], batch: Any) -> float:
    """Return the share of energy that projections lose of a batch's inputs, mean over layers."""
    shares: list[torch.Tensor] = []

    def look(rows: torch.Tensor, module: nn.Module, given: tuple[torch.Tensor]) -> None:
        x = given[0].flatten(0, -2).float()
        basis = torch.linalg.qr(rows.float().T).Q
        shares.append(1 - (x @ basis).square().sum() / x.square().sum())

    handles = [
        body.get_submodule(name).register_forward_pre_hook(partial(look, rows))
        for name, rows in found.items()
    ]
    body(**batch)
    for handle in handles:
        handle.remove()
    return float(torch.stack(shares).mean())


def training(
    model: nn.Module, batch: Any, rank: int, machine: floor.Machine
) -> dict[str, dict[str, Any]]:
    """Compare a training step, frozen and shared projections against LoRA and DoRA, interleaved.

    Peaks are above what stays between two steps: weights, adapters, states of the optimizer.
    """
    from peft import LoraConfig, get_peft_model

    targets = [f"model.{name}" for name in select_layers(model.get_submodule("model"))]
    projectors = fit_projectors(model, [batch], rank, targets=targets, progress=False)
    ours = twin(model)
    attach(ours, projectors)
    config = partial(LoraConfig, r=rank, lora_alpha=rank, target_modules=targets)
    steps = {
        "ipa": stepper(ours.train(), batch),
        "lora": stepper(get_peft_model(twin(model), config()).train(), batch),
        "dora": stepper(get_peft_model(twin(model), config(use_dora=True)).train(), batch),
    }
    with FlopCounterMode(display=False) as counter:
        steps["ipa"]()
    least = machine.seconds(counter.get_total_flops())
    times = interleaved(steps, 5)
    figures: dict[str, dict[str, Any]] = {
        name: {"seconds": taken, "peak_bytes": peak_bytes(steps[name])}
        for name, taken in medians(times).items()
    }
    for name in ("lora", "dora"):
        peak, own = figures[name]["peak_bytes"], figures["ipa"]["peak_bytes"]
        figures[name]["time_ratio"] = ratio(times, "ipa", name)
        figures[name]["memory_ratio"] = own / peak if peak else None
        figures[name]["floor"] = least / figures[name]["seconds"]
    return figures


def stepper(model: nn.Module, batch: Any) -> Action:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # at the end: gradients belong to the peak of their own step

    return step


def steps(tiny: bool, blocks: int | None) -> dict[str, Step]:
    """Return the steps in their order; each gets the results of those before it."""
    rank = 4 if tiny else RANK
    model = cache(llama)

    def machine_floor(results: Results) -> Any:
        size = {"size": 256, "copied": 2**20} if tiny else {"size": 8192, "copied": 2**30}
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        return {n: floor.machine(DEVICE, dtype, **size).record() for n, dtype in dtypes.items()}

    def learner_times(results: Results) -> Any:
        size = (128, 256, 4) if tiny else (4096, 8192, 64)  # features, rows, batches
        return learners(*size, _machine(results, "float32"))

    def count_blocks(results: Results) -> Any:
        return 2 if tiny else blocks or BLOCKS

    def learning_times(results: Results) -> Any:
        frozen = model(results["blocks"], tiny)
        batches = tokens(frozen, *((4, 2, 32) if tiny else (32, 8, 1024)))
        return learning(frozen, batches, rank, _machine(results, "bfloat16"))

    def training_times(results: Results) -> Any:
        frozen = model(results["blocks"], tiny)
        batch = tokens(frozen, 1, 2, 16 if tiny else 1024)[0]
        return training(frozen, batch, rank, _machine(results, "bfloat16"))

    return {
        "machine_floor": machine_floor,
        "learners": learner_times,
        "blocks": count_blocks,
        "learning": learning_times,
        "training": training_times,
        "floors": _floors,
    }


def _machine(results: Results, dtype: str) -> floor.Machine:
    return floor.Machine.from_record(results["machine_floor"][dtype])


def _floors(results: Results) -> dict[str, float]:
    return {
        "learners": results["learners"]["floor"],
        "learning": results["learning"]["floor"],
        "eva": results["learning"]["eva_floor"],
        "step": results["training"]["lora"]["floor"],
    }
