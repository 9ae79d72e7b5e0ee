"""CUDA graphs of a training step, for each padded length."""

from collections.abc import Callable, Iterable

import torch


def captured(step: Callable[[int], None], lengths: Iterable[int]) -> dict[int, Callable[[], None]]:
    """Run a step for each length, then capture it; return the replays by length.

    Warm-up and capture share a stream: the gradients of leaves are accumulated on the stream of
    their first use. The graphs share their memory, since a step leaves nothing in it.

    Parameters
    ----------
    step : callable
        Takes a length. All that it keeps must be in tensors made before.
    lengths : iterable of int
    """
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    ordered = sorted(lengths, reverse=True)  # the largest first: the others fit in its memory
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for length in ordered:
            step(length)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    replays = {}
    for length in ordered:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            step(length)
        replays[length] = graph.replay
    torch.cuda.synchronize()
    return replays
