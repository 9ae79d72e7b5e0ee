"""Scale s of the adapter term B s P x."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from ipa_core import Projector
from ipa_core.settings import number
from ipa_torch._float64 import in_float64
from ipa_torch.layer_projectors import as_tensor

Scaling: TypeAlias = float | Literal["energy"]

#: Share of the energy that LoRA's random A keeps, times features / rank: its entries are uniform
#: within +-1 / sqrt(features), with a variance of 1 / (3 features).
LORA_SHARE = 1 / 3


def resolve_scale(projector: Projector, scaling: Scaling, layer_scaling: float = 1.0) -> float:
    r"""Return the scale s of a layer.

    Parameters
    ----------
    projector : Projector
        P, with the second moments of the layer's inputs.
    scaling : "energy" or float
        ``"energy"``: see `energy_scale`. A number: the layer computes
        :math:`W x + \lambda B P x` with exactly this lambda.
    layer_scaling : float, default 1
        Factor that the layer applies to B s P x itself, such as PEFT's alpha / r. A number is
        divided by it; the energy is set beside it.

    Raises
    ------
    SettingError
        If ``scaling`` is neither "energy" nor a positive finite number.

    Examples
    --------
    >>> import numpy as np
    >>> from ipa_core import fit_projector
    >>> from ipa_torch.extension import resolve_scale
    >>> isotropic = fit_projector(np.eye(4), rank=2)
    >>> round(resolve_scale(isotropic, "energy"), 4) == round((1 / 3) ** 0.5, 4)
    True
    >>> resolve_scale(isotropic, 0.25, layer_scaling=2.0)
    0.125
    """
    check_scaling(scaling)
    return energy_scale(projector) if _is_energy(scaling) else float(scaling) / layer_scaling


def check_scaling(scaling: Scaling) -> None:
    """Validate a scaling.

    Raises
    ------
    SettingError
        If it is neither "energy" nor a positive finite number.
    """
    if not _is_energy(scaling):
        form = "'energy' or a positive finite number"
        number("scaling", scaling, form=form, valid=lambda value: 0 < value < math.inf)


def _is_energy(scaling: Scaling) -> bool:
    return isinstance(scaling, str) and scaling == "energy"


def energy_scale(projector: Projector) -> float:
    r"""Return the scale that gives s P x the energy which LoRA's random A would give it.

    .. math:: s = \sqrt{\tfrac13 \tfrac rd \, E|x|^2 / E|Px|^2}

    with second moments about the origin, so that learning rates carry over between models.

    Examples
    --------
    >>> import torch
    >>> from ipa_core import fit_projector
    >>> from ipa_torch.extension import energy_scale
    >>> x = torch.randn(1000, 48, generator=torch.Generator().manual_seed(0))
    >>> round(energy_scale(fit_projector(x, rank=48)), 3)
    0.577
    """
    mean = in_float64(as_tensor(projector.mean))
    components = in_float64(as_tensor(projector.components))
    total = projector.total_energy + float(mean @ mean)
    kept = float(in_float64(as_tensor(projector.energies)).sum())
    kept += float((components @ mean).square().sum())
    share = kept / total if total > 0 and kept > 0 else 1.0
    return math.sqrt(LORA_SHARE * projector.rank / projector.features / share)
