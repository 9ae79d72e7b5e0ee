"""Two ranks: fits of which a rank fails, and training under DDP, FSDP and compile: FOLDER."""

import sys
import warnings
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ipa_core.errors import SettingError
from ipa_torch import (
    StoppingCriteria,
    adapter_state_dict,
    attach,
    detach,
    fit_projectors,
    load_adapter_state_dict,
)

BATCHES = 4


def two():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def data(rank, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 * rank + 1)
    return [torch.randn(8, 16, generator=generator).to(dtype) for _ in range(BATCHES)]


def failing(kind, rank):
    """Return the outcome of a fit in which rank 1 fails in some way."""
    model, batches = two(), data(rank)
    if rank and kind.startswith("nan"):
        batches[int(kind[-1])][0, 0] = torch.nan
    elif rank and kind.startswith("shape"):
        batches[int(kind[-1])] = torch.randn(8, 5)
    elif rank and kind == "layer":
        model[0].register_forward_hook(lambda module, args, output: output * torch.nan)
    elif kind == "both":
        batches[2][0, 0] = torch.nan
    elif kind == "all":
        batches = broken(batches, 0)
    elif rank and kind.startswith("loader"):
        batches = broken(batches, int(kind[-1]))
    stop = StoppingCriteria(on_error="return")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = fit_projectors(model, batches, 4, stop=stop, progress=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return {
        "projectors": {name: (p.components, p.samples) for name, p in found.items()},
        "missing": dict(found.missing),
        "warnings": [str(warning.message) for warning in caught],
    }


def broken(batches, at):
    yield from batches[:at]
    raise OSError("no such disk")


FAILURES = (
    "nan0", "nan2", "shape0", "shape2", "layer", "both", "loader0", "loader2", "all",
)  # fmt: skip


def train(model, batches, parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for batch in batches:
        optimizer.zero_grad()
        model(batch).float().square().mean().backward()
        optimizer.step()


def prepared(dtype=torch.float32):
    model = two().to(dtype)
    attach(model, fit_projectors(model, data(7, dtype), 4, process_group=None, progress=False))
    return model


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def refused(*calls):
    """Return the errors of calls that must leave the model alone."""
    errors = []
    for call in calls:
        try:
            call()
        except SettingError as error:
            errors.append(str(error))
    return errors


def in_ddp(rank, order):
    """Train under DDP, compiled before or after it is wrapped, or not compiled."""
    model = prepared()
    wrapped = model
    if order == "compile, DDP":
        wrapped = torch.compile(model, backend="eager")
    wrapped = DistributedDataParallel(wrapped)
    if order == "DDP, compile":
        wrapped = torch.compile(wrapped, backend="eager")
    projectors = fit_projectors(two(), data(9), 4, process_group=None, progress=False)
    state = adapter_state_dict(model)
    errors = refused(
        lambda: attach(wrapped, projectors, adapter_name="second"),
        lambda: load_adapter_state_dict(wrapped, state),
    )
    train(wrapped, data(rank), trainable(model))
    saved = {key: value.clone() for key, value in adapter_state_dict(wrapped).items()}
    detach(wrapped)
    return saved, errors


def in_one_process():
    """Train on the batches of both ranks."""
    model = prepared()
    train(model, [torch.cat(pair) for pair in zip(data(0), data(1), strict=True)], trainable(model))
    return adapter_state_dict(model)


def in_fsdp2(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = prepared(torch.bfloat16)
    projectors = fit_projectors(two(), data(9), 4, process_group=None, progress=False)
    mesh = init_device_mesh("cpu", (size,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    errors = refused(lambda: attach(model, projectors, adapter_name="second"))
    train(model, data(rank, torch.bfloat16), trainable(model))
    lora_B = {name: p.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
    return {name: value.detach().clone() for name, value in lora_B.items()}, errors


def in_fsdp1(rank, dtype, cast):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = prepared(dtype)
    try:
        model = FullyShardedDataParallel(
            model.to(dtype) if cast else model,
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
        train(model, data(rank, dtype), trainable(model))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    with FullyShardedDataParallel.summon_full_params(model):
        return {
            name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name
        }


def main(folder):
    """Run all, and save the outcomes."""
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    outcomes = {kind: failing(kind, rank) for kind in FAILURES}
    for order in ("DDP", "compile, DDP", "DDP, compile"):
        outcomes[order] = in_ddp(rank, order)
    outcomes["one process"] = in_one_process()
    outcomes["FSDP2, bfloat16"] = in_fsdp2(rank, size)
    outcomes["FSDP1, float32"] = in_fsdp1(rank, torch.float32, cast=False)
    outcomes["FSDP1, bfloat16, B in float32"] = in_fsdp1(rank, torch.bfloat16, cast=False)
    outcomes["FSDP1, bfloat16"] = in_fsdp1(rank, torch.bfloat16, cast=True)
    torch.save(outcomes, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
