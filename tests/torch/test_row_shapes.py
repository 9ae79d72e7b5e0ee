"""Row weights beside inputs of another shape: positions first, square, or of none that fits."""

import warnings

import pytest
import torch
from torch import nn

from ipa_core import ExactCovariance
from ipa_torch import OnlineLearning, attach, fit_projectors, store_activations

from .models import angle


class Encoder(nn.Module):
    """Two layers over (positions, batch, features), or over (batch, positions, features)."""

    def __init__(self, positions_first):
        super().__init__()
        self.positions_first = positions_first
        self.first, self.second, self.pooler = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x, attention_mask=None):
        if self.positions_first:
            x = x.transpose(0, 1).contiguous()
        x = self.second(torch.relu(self.first(x)))
        return self.pooler(x[0] if self.positions_first else x[:, 0])


def batch(size, positions, lengths=None):
    lengths = torch.tensor(lengths or [max(1, positions - i // 2) for i in range(size)])
    mask = (torch.arange(positions) < lengths[:, None]).long()
    return {"x": torch.randn(size, positions, 6), "attention_mask": mask}


def transposed(batch):
    return batch["attention_mask"].T


def fit(model, batches, **options):
    return fit_projectors(model, batches, 2, learner=ExactCovariance, progress=False, **options)


@pytest.fixture
def strict():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_positions_first_are_named_with_the_cure():
    message = (
        r"rows of shape \(3, 5\), .* got \(5, 3\) in layers 'first', 'second': all of these rows "
        r"count, also padding; .* let row_weights return the weights transposed"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        projectors = fit(Encoder(True), [batch(3, 5), batch(3, 4)])
    assert len([w for w in caught if "rows of shape" in str(w.message)]) == 1
    assert projectors["first"].samples == 15 + 12


@pytest.mark.usefixtures("strict")
def test_the_cure_gives_the_projector_of_the_other_layout():
    batches = [batch(3, 5), batch(4, 4), batch(2, 1)]
    usual, model = Encoder(False), Encoder(True)
    model.load_state_dict(usual.state_dict())
    expected, actual = fit(usual, batches), fit(model, batches, row_weights=transposed)
    for name in ("first", "second"):
        assert actual[name].samples == expected[name].samples
        assert angle(actual[name], expected[name]) < 1e-3


def test_square_masks_are_ambiguous_until_a_batch_tells():
    message = r"got only \(4, 4\) for layers 'first', 'second': taken as \(batch, positions\)"
    for positions_first in (False, True):
        with pytest.warns(UserWarning, match=message):
            fit(Encoder(positions_first), [batch(4, 4), batch(4, 4)])
    with pytest.warns(UserWarning, match=r"got \(3, 4\) in layers 'first', 'second'"):
        fit(Encoder(True), [batch(4, 4), batch(4, 3)])


@pytest.mark.usefixtures("strict")
def test_no_word_where_nothing_is_ambiguous():
    fit(Encoder(False), [batch(4, 4), batch(4, 3)])
    fit(Encoder(False), [batch(4, 4, [4] * 4)])  # no padding: the same in both layouts
    fit(Encoder(True), [batch(3, 5, [5] * 3)])
    fit(Encoder(True), [batch(3, 5)], row_weights=None)
    fit(Encoder(False), [batch(3, 3), batch(2, 3)], row_weights=lambda b: b["attention_mask"])


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("shape", [(1, 5), (5, 1)])
def test_axes_of_length_one_keep_the_order_of_rows(shape):
    size, positions = shape
    data = batch(size, positions, [3] if size == 1 else None)
    if size > 1:
        data["attention_mask"][3:] = 0
    for positions_first in (False, True):
        projectors = fit(Encoder(positions_first), [data], targets=["first", "second"])
        assert projectors["first"].samples == 3


def test_many_layers_are_counted():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))

        def forward(self, x, attention_mask):
            x = x.transpose(0, 1).contiguous()
            for layer in self.layers:
                x = torch.relu(layer(x))

    with pytest.warns(UserWarning, match=r"layers 'layers.0', 'layers.1', 'layers.2' and 2 more"):
        fit(Deep(), [batch(3, 5)])


def test_stored_and_online_rows_too(tmp_path):
    with pytest.warns(UserWarning, match="the weights transposed"):
        store_activations(Encoder(True), [batch(3, 5)], tmp_path, progress=False)
    model = Encoder(True)
    attach(model, fit(model, [batch(3, 5)], row_weights=transposed))
    model.train()
    with pytest.warns(UserWarning, match=r"in layers 'first', 'second': .*transposed"):
        with OnlineLearning(model):
            model(**batch(3, 5))
    with pytest.warns(UserWarning, match=r"got only \(4, 4\)"):
        with OnlineLearning(model):
            model(**batch(4, 4))
