"""Scale s of A = s P."""

from __future__ import annotations

import math
from typing import Literal

from ipa_core import Projector, SettingError
from ipa_torch import energy_scale

Scaling = Literal["energy"] | float


def factor(projector: Projector, scaling: Scaling, layer_scaling: float) -> float:
    r"""Return the s of A = s P.

    Parameters
    ----------
    projector : Projector
        Its P, and the second moments of what it was learned from.
    scaling : "energy" or float
        ``"energy"``: :math:`s = \sqrt{\tfrac{1}{3} \tfrac{r}{d} E\|x\|^2 / E\|Px\|^2}`, with
        which A x has the energy that LoRA's own random A would give it; alpha keeps its meaning.
        A number: the layer computes :math:`W x + \lambda B P x` with exactly that lambda, whatever
        alpha is.
    layer_scaling : float
        What PEFT multiplies B A x by: alpha / r, or alpha / sqrt(r) with rsLoRA.

    Examples
    --------
    >>> import numpy as np
    >>> from ipa_core import fit_projector
    >>> isotropic = fit_projector(np.eye(4), rank=2)
    >>> round(factor(isotropic, "energy", layer_scaling=1.0), 4) == round((1 / 3) ** 0.5, 4)
    True
    >>> factor(isotropic, 0.25, layer_scaling=2.0)
    0.125
    """
    return energy_scale(projector) if scaling == "energy" else float(scaling) / layer_scaling


def check_scaling(scaling: Scaling) -> None:
    """Check that a scaling is one.

    Raises
    ------
    SettingError
        If it is neither ``"energy"`` nor a positive finite number.
    """
    if scaling == "energy":
        return
    if isinstance(scaling, str | bool) or not (math.isfinite(scaling) and scaling > 0):
        raise SettingError(
            f"expected scaling 'energy' or a positive finite number, got {scaling!r}"
        )
