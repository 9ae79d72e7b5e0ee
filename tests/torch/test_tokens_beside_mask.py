"""Masks of models with tokens beside those of the mask: registers, prompts, query tokens."""

import warnings

import pytest
import torch
from torch import nn

from ipa_core import ExactCovariance
from ipa_torch import OnlineLearning, attach, attention_mask, fit_projectors, store_activations

MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
ROWS = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


class WithTokens(nn.Module):
    """Tokens in front of, behind, or in place of those of the batch."""

    def __init__(self, where, count=3):
        super().__init__()
        torch.manual_seed(0)
        self.where, self.tokens = where, nn.Parameter(torch.randn(2, count, 8))
        self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x, attention_mask=None):
        x = self.before(x)
        parts = {
            "front": [self.tokens, x],
            "behind": [x, self.tokens],
            "queries": [self.tokens],
            "strided": [x[:, ::2]],
            "pooled": [x.mean(1, keepdim=True)],
            "same": [x],
        }[self.where]
        return self.after(torch.cat(parts, 1))


def batch(padding=0.0):
    rows = ROWS.clone()
    rows[1, 4:] = padding
    return {"x": rows, "attention_mask": MASK}


def fit(model, **options):
    return fit_projectors(
        model, [batch()], 2, learner=ExactCovariance, progress=False, **options
    )  # fmt: skip


@pytest.mark.parametrize("where", ["front", "behind", "queries", "strided"])
def test_rows_that_no_mask_fits_are_reported(where):
    shape = {"front": 9, "behind": 9, "queries": 3, "strided": 3}[where]
    message = (
        rf"rows of shape \(2, 6\), .* got \(2, {shape}\) in layers .*: all of these rows count"
    )
    with pytest.warns(UserWarning, match=message):
        learned = fit(WithTokens(where))
    assert learned["before"].samples == 10 and learned["after"].samples == 2 * shape


@pytest.mark.parametrize("where", ["front", "behind", "queries", "strided", "pooled", "same"])
def test_list_of_masks_fits_each_shape(where):
    ones = torch.ones(2, 3)
    second = {
        "front": torch.cat([ones, MASK], 1),
        "behind": torch.cat([MASK, ones], 1),
        "queries": ones,
        "strided": MASK[:, ::2],
        "pooled": torch.ones(2, 1),
        "same": MASK,
    }[where]

    def weights(batch):
        return [batch["attention_mask"], second]

    model, seen = WithTokens(where), []
    model.after.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    learned = fit(model, row_weights=weights)
    rows = seen[0][second.bool()]
    assert learned["after"].samples == len(rows)
    wanted = torch.linalg.svdvals(rows.double())[:2].square() / len(rows)
    torch.testing.assert_close(learned["after"].energies.double(), wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("where", ["pooled", "same"])
def test_no_report_without_a_cause(where):
    fit(WithTokens(where))
    full = {"x": ROWS, "attention_mask": torch.ones(2, 6)}
    fit_projectors(WithTokens("front"), [full], 2, progress=False)
    fit_projectors(WithTokens("front"), [batch()], 2, row_weights=None, progress=False)


def test_reported_once_and_by_stores_and_online_learning_too(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit_projectors(WithTokens("front"), [batch()] * 3, 2, progress=False)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="all of these rows count"):
        store_activations(WithTokens("front"), [batch()], tmp_path, progress=False)
    model = WithTokens("front")
    attach(model, fit_projectors(model, [batch()], 2, row_weights=None, progress=False))
    with pytest.warns(UserWarning, match="all"), OnlineLearning(model, row_weights=attention_mask):
        model(**batch())
