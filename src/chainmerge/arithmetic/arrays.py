# SPDX-License-Identifier: Apache-2.0
"""Array types, by element type."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

U8Array: TypeAlias = "npt.NDArray[np.uint8]"
U32Array: TypeAlias = "npt.NDArray[np.uint32]"
U64Array: TypeAlias = "npt.NDArray[np.uint64]"
I32Array: TypeAlias = "npt.NDArray[np.int32]"
I64Array: TypeAlias = "npt.NDArray[np.int64]"
IndexArray: TypeAlias = "npt.NDArray[np.intp]"
BoolArray: TypeAlias = "npt.NDArray[np.bool_]"
