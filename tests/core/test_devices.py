"""Transfers of an update between host and device, on devices that every machine has."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from ipa_core import RandomizedSVD, _array
from ipa_core._array import transfer, validation

ROWS = 512
CONVERSIONS = ("__array__", "__bool__", "__float__", "__int__", "__index__", "__complex__",
               "__dlpack__", "__buffer__", "to_device")  # fmt: skip


def rows(count, features=200, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, features)) / np.arange(1, features + 1)).astype("float32")


def weights_of(kind):
    """Return weights of a kind, on the host."""
    rng = np.random.default_rng(1)
    return {
        "none": None,
        "floats": rng.random(ROWS).astype("float32"),
        "mask": rng.random(ROWS) < 0.5,
        "ones": np.ones(ROWS, dtype=bool),
        "floats and zeros": (rng.random(ROWS) * (rng.random(ROWS) < 0.5)).astype("float32"),
    }[kind]


class Transfers:
    """Count of the arrays that go from a strict device to the host, and back."""

    def __init__(self, monkeypatch, strict):
        from array_api_strict._array_object import Array

        self.reads = self.uploads = 0
        for name in CONVERSIONS:
            if hasattr(Array, name):
                monkeypatch.setattr(Array, name, self._counted(getattr(Array, name)))
        asarray = strict.asarray

        def upload(values, *args, **kwargs):
            self.uploads += isinstance(values, np.ndarray)
            return asarray(values, *args, **kwargs)

        monkeypatch.setattr(strict, "asarray", upload)

    def _counted(self, conversion):
        def convert(array, *args, **kwargs):
            self.reads += 1
            return conversion(array, *args, **kwargs)

        return convert


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("kind", ["none", "floats", "mask", "ones", "floats and zeros"])
@pytest.mark.parametrize("features", [30, 200])
def test_host_transfers_of_a_batch(device_xp, monkeypatch, features, kind, place):
    """The host waits once for the norms, and once for weights that are not there yet."""
    strict = pytest.importorskip("array_api_strict")
    learner = RandomizedSVD(4).update(device_xp.asarray(rows(22_000, features)))
    weights = weights_of(kind)
    if place == "device" and weights is not None:
        weights = device_xp.asarray(weights)
    batches = [device_xp.asarray(rows(ROWS, features, seed)) for seed in range(3)]
    transfers = Transfers(monkeypatch, strict)
    for batch in batches:
        transfers.reads = transfers.uploads = 0
        pending = learner.begin_update(batch, weights)
        in_first_half = transfers.reads
        pending.finish()
        on_device = place == "device" and weights is not None
        assert in_first_half == on_device
        assert transfers.reads == 1 + on_device
        # Uploads, for which the host does not wait: of places, and of weights other than ones.
        assert transfers.uploads == ("mask" in kind or "zeros" in kind) + ("floats" in kind)


def test_implicit_transfers_are_counted(device_xp, monkeypatch):
    strict = pytest.importorskip("array_api_strict")
    x = device_xp.asarray(rows(4))
    transfers = Transfers(monkeypatch, strict)
    assert float(strict.sum(x)) != 0 and bool(strict.any(x != 0))
    _array.on_host(x)
    assert transfers.reads == 3
    strict.asarray(np.ones(3, dtype="float32"), device=device_xp.device)
    assert transfers.uploads == 1


def on_meta(value):
    """Return a learner's attribute with its tensors on the meta device."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: on_meta(v) for name, v in fields.items()})
    if isinstance(value, tuple):
        return tuple(map(on_meta, value))
    return value.to("meta") if hasattr(value, "to") else value


@pytest.mark.parametrize("kind", ["none", "floats", "mask", "floats and zeros"])
@pytest.mark.parametrize("seen", [0, 3000])
def test_first_half_of_an_update_asks_for_nothing(factory, monkeypatch, seen, kind):
    """torch's meta device has no values: whatever asks for one raises."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(
        validation, "_unsupported_form", lambda array: None
    )  # it refuses the device
    learner = factory(3)
    if seen:
        learner = copy.copy(learner.update(torch.as_tensor(rows(seen))))
        learner.__dict__ = {name: on_meta(value) for name, value in vars(learner).items()}
    weights = weights_of(kind)
    batch = torch.empty(ROWS, 200, device="meta")
    pending = learner.begin_update(batch, None if weights is None else torch.as_tensor(weights))
    assert pending.batch.x.is_meta and all(product.seen.is_meta for product in pending.products)
    if isinstance(learner, RandomizedSVD) and seen and not learner.center:
        assert pending.products
    with pytest.raises(NotImplementedError, match="no data"):
        pending.finish()


def test_weights_on_a_device_are_asked_for(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(validation, "_unsupported_form", lambda array: None)
    batch, weights = torch.empty(ROWS, 200, device="meta"), torch.ones(ROWS, device="meta")
    with pytest.raises(NotImplementedError, match="no data"):
        RandomizedSVD(3).begin_update(batch, weights)


def test_accelerators_of_torch_with_streams(monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("torch.accelerator")
    for kind, answers in (("cuda", ["cuda"]), ("xpu", ["xpu"]), ("mps", []), (None, [])):
        device = None if kind is None else torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda device=device: device)
        kinds = ("cpu", "cuda", "xpu", "mps", "meta")
        assert [k for k in kinds if transfer._has_streams(torch.device(k))] == answers


def test_an_accelerator_is_waited_for_by_an_event(monkeypatch):
    torch = pytest.importorskip("torch")
    events, empty = [], torch.empty
    event = SimpleNamespace(synchronize=lambda: events.append("waited"))
    stream = SimpleNamespace(record_event=lambda: events.append("recorded") or event)
    accelerator = SimpleNamespace(current_stream=lambda device: events.append(device) or stream)
    monkeypatch.setattr(transfer, "_has_streams", lambda device: True)
    monkeypatch.setattr(transfer, "_accelerator", lambda: accelerator)

    def pinned(*shape, pin_memory=False, **kwargs):
        events.append("pinned" if pin_memory else "pageable")
        return empty(*shape, **kwargs)

    monkeypatch.setattr(torch, "empty", pinned)
    read = _array.to_host_async(torch.arange(3.0))
    assert events == ["pinned", torch.device("cpu"), "recorded"]
    assert read().tolist() == [0.0, 1.0, 2.0]
    assert events[-1] == "waited"


def test_dtypes_of_a_device_without_a_hash():
    """Devices of CuPy cannot be keys of a dictionary."""

    class Device:
        __hash__ = None

    info = np.__array_namespace_info__()
    dtypes = SimpleNamespace(dtypes=lambda device, kind: info.dtypes(kind=kind))
    xp = SimpleNamespace(
        __name__="library", float32=np.float32, __array_namespace_info__=lambda: dtypes
    )
    assert _array.wide_dtype(xp, Device()) == np.float64
