"""Seam to the array libraries: the only room that names them."""

from ipa_core._array.autograd import detached
from ipa_core._array.conversion_hints import conversion_hint
from ipa_core._array.dtypes import (
    cast,
    dtype_name,
    half_dtype,
    half_matmul,
    state_dtype,
    wide_dtype,
    wider_dtype,
)
from ipa_core._array.host_numbers import (
    group_sums,
    host_concat,
    host_ones,
    ignore_overflow,
    rounded,
)
from ipa_core._array.inspection import describe, device, is_array
from ipa_core._array.masks import zero_rows, zero_where
from ipa_core._array.namespaces import as_namespace, namespace
from ipa_core._array.random_numbers import random_normal, random_signs
from ipa_core._array.row_norms import row_energies, squared_norms_async
from ipa_core._array.symmetric_eigen import leading_eigh
from ipa_core._array.transfer import (
    convert,
    from_numpy,
    host_values,
    index_array,
    on_host,
    to_host_async,
    to_numpy,
)
from ipa_core._array.types import Array, Device, DType, HostArray, HostMask, Namespace
from ipa_core._array.validation import check_array, check_home, check_materialized

__all__ = [
    "Array",
    "DType",
    "Device",
    "HostArray",
    "HostMask",
    "Namespace",
    "as_namespace",
    "cast",
    "check_array",
    "check_home",
    "check_materialized",
    "conversion_hint",
    "convert",
    "describe",
    "detached",
    "device",
    "dtype_name",
    "from_numpy",
    "group_sums",
    "half_dtype",
    "half_matmul",
    "host_concat",
    "host_ones",
    "host_values",
    "ignore_overflow",
    "index_array",
    "is_array",
    "leading_eigh",
    "namespace",
    "on_host",
    "random_normal",
    "random_signs",
    "rounded",
    "row_energies",
    "squared_norms_async",
    "state_dtype",
    "to_host_async",
    "to_numpy",
    "wide_dtype",
    "wider_dtype",
    "zero_rows",
    "zero_where",
]
