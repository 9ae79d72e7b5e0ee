"""Stress of threads: python -m tests.torch.thread_stress [CALLS].

Overlapping fits, serving beside changes of adapters, and fits beside serving, with eight threads
and CALLS calls of each kind. Ends with an error if a result is wrong.
"""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import torch
from torch import nn

from ipa_core import ExactCovariance
from ipa_torch import (
    adapter_state_dict,
    attach,
    detach,
    fit_projectors,
    load_adapter_state_dict,
    merge,
    set_adapter,
    unmerge,
)
from ipa_torch._adapters.pass_lock import PassLock

THREADS = 8
BATCHES = [torch.randn(12, 8, generator=torch.Generator().manual_seed(n)) for n in range(2)]


def model():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    )
    return net.eval()


def fit(net):
    return fit_projectors(net, BATCHES, 2, learner=ExactCovariance, progress=False)


def equal(found, wanted):
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name].components, wanted[name].components)
        and found[name].samples == wanted[name].samples
        for name in wanted
    )


def in_threads(calls, call, beside=lambda: None, threads=THREADS):
    """Return the number of calls and of wrong ones; ``beside`` repeats in a thread of its own."""
    numbers, wrong, stop = count(), [], threading.Event()

    def work():
        while next(numbers) < calls:
            if not call():
                wrong.append(1)

    def change():
        while not stop.is_set():
            beside()
            time.sleep(0)

    with ThreadPoolExecutor(threads + 1) as pool:
        changes = pool.submit(change)
        try:
            for done in [pool.submit(work) for _ in range(threads)]:
                done.result()
        finally:
            stop.set()
        changes.result()
    return calls, len(wrong)


def overlapping_fits(calls):
    """Fits of one model in eight threads: the same projectors each time, and no trace."""
    net = model()
    net.train()
    wanted, state = fit(net), torch.get_rng_state()
    result = in_threads(calls, lambda: equal(fit(net), wanted))
    assert all(module.training for module in net.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled()
    assert not any(module._forward_pre_hooks for module in net.modules())
    return result


def serving_beside_changes(calls):
    """Passes while another thread merges, switches, detaches and loads: old or new answers."""
    net, x = model(), BATCHES[0]
    with torch.no_grad():
        base = net(x)
    attach(net, fit(net))
    for parameter in net.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    state = {key: value.clone() for key, value in adapter_state_dict(net).items()}
    with torch.no_grad():
        adapted = net(x)
    assert not torch.allclose(base, adapted, atol=0.1)

    gate = PassLock()

    def serve():
        gate.enter_pass()
        with torch.no_grad():
            found = net(x)
        gate.leave_pass()
        return any(torch.allclose(found, known, atol=1e-4) for known in (base, adapted))

    def change():
        merge(net)
        unmerge(net)
        set_adapter(net, None)
        set_adapter(net, "default")
        load_adapter_state_dict(net, state)

    def change_and_detach():
        change()
        detach(net)
        with gate.change():  # as documented: the first load is not beside passes
            load_adapter_state_dict(net, state)

    detaching = in_threads(calls // 2, serve, change_and_detach)
    kept = in_threads(calls - calls // 2, serve, change)
    return tuple(map(sum, zip(detaching, kept, strict=True)))


def fits_beside_serving(calls):
    """Fits while other threads run the model on other rows: the rows of the fit only."""
    net, x = model(), 9 * torch.randn(5, 8)
    wanted = fit(net)
    with torch.no_grad():
        answer = net(x)

    def serve():
        with torch.no_grad():
            assert torch.allclose(net(x), answer)

    return in_threads(calls, lambda: equal(fit(net), wanted), serve, threads=4)


KINDS = (overlapping_fits, serving_beside_changes, fits_beside_serving)


def main(calls):
    """Run all kinds; return the number of wrong calls."""
    total = 0
    for kind in KINDS:
        start = time.monotonic()
        tried, wrong = kind(calls)
        seconds = time.monotonic() - start
        print(f"{kind.__name__}: {tried:,} calls, {wrong} wrong, {seconds:.0f} s", flush=True)
        total += wrong
    return total


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000))
