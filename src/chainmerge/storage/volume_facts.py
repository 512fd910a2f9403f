# SPDX-License-Identifier: Apache-2.0
"""A volume as it was at one moment: how large it is, may become, and what that takes.

Planning goes on from it without I/O. All sizes are in bytes.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from chainmerge.arithmetic.rounding import divide_up
from chainmerge.storage.thin import NOTHING_LACKS, PoolShortage, ThinPool
from chainmerge.storage.volume_errors import (
    CannotGrow,
    DeviceTooSmall,
    FileLimitReached,
    FileSystemFull,
    ThinPoolFull,
    VolumeGroupFull,
    VolumeNotExtensible,
)

if TYPE_CHECKING:
    from collections.abc import Mapping


class VolumeKind(StrEnum):
    """What sort of storage it is."""

    FILE = "file"
    BLOCK = "block"
    LVM = "lvm"


class Growth(Struct, frozen=True):
    """What becomes of a volume that is to hold *required* bytes.

    Attributes:
        required: bytes that are to fit.
        size_after: the volume's size once they do. A file gets there as it is written to.
        missing: bytes that cannot be had; 0 where it can be done.
    """

    required: int
    size_after: int
    missing: int


class VolumeFacts(Struct, frozen=True):
    """A volume as it was at one moment.

    Attributes:
        path: the volume.
        kind: what it is.
        size: bytes that it has.
        capacity_limit: bytes that it can have at most; None if no limit is known.
        free_bytes: bytes by which the file system would let it grow, an estimate: others write
            too, and metadata takes its share. None for what does not lie on a file system. Of a
            thin volume what its pool has left, and could be given.
        growth_unit: sizes change by multiples of it.
        reserved: bytes of ``free_bytes`` that are the file's already, behind its end.
        pool: what it takes space from that it does not have yet; volumes of one pool compete
            for it. Empty if it has all it will ever have.
        thin: the pool of a thin volume.
        extends_pool: whether that may be extended.
        unit_cost: bytes of the volume group that one *growth_unit* takes, copies and parity
            included; 0 where it is what it gives.
        fixed_type: the type of a logical volume that lvextend does not make larger; else empty.
    """

    path: str
    kind: VolumeKind
    size: int
    capacity_limit: int | None
    free_bytes: int | None
    growth_unit: int
    pool: str = ""
    reserved: int = 0
    thin: ThinPool | None = None
    extends_pool: bool = False
    unit_cost: int = 0
    fixed_type: str = ""

    @property
    def takes_as_written(self) -> bool:
        """Whether it takes space from its pool as it is written to, and not as it grows."""
        return self.kind is VolumeKind.FILE or self.thin is not None

    def pool_extension(self, allocates: int | None) -> PoolShortage:
        """By how much the pool of a thin volume is extended beforehand; *allocates* as in growth.

        None of it for another volume, or where it may not be.
        """
        if self.thin is None or not self.extends_pool:
            return NOTHING_LACKS
        return self.thin.extension(allocates or 0)

    def beside(self, claims: Mapping[str, int]) -> VolumeFacts:
        """The same, with what others are going to take from its pool (bytes) left out."""
        taken = claims.get(self.pool, 0) if self.pool else 0
        if not taken:
            return self
        free, limit = self.free_bytes, self.capacity_limit
        if self.thin is not None:
            return replace(self, thin=self.thin.beside(taken))
        if self.kind is VolumeKind.LVM and limit is not None:
            limit = max(self.size, limit - taken)
        return replace(
            self,
            free_bytes=None if free is None else max(0, free - taken),
            capacity_limit=limit,
        )

    def claim(self, required: int, allocates: int | None = None) -> dict[str, int]:
        """What it takes from its pool to hold *required* bytes; *allocates* as in growth."""
        growth = max(0, self.growth(required).size_after - self.size)
        if self.unit_cost:
            growth = growth // self.growth_unit * self.unit_cost
        if self.takes_as_written and allocates is not None:
            growth = allocates
        return {self.pool: growth} if self.pool and growth else {}

    def growth(self, required: int, allocates: int | None = None) -> Growth:
        """What it takes to hold *required* bytes.

        Args:
            required: bytes.
            allocates: bytes that the file system has to give a file for it, holes that are
                written to included, or a pool a thin volume; None for what lies behind its end.
        """
        units = max(divide_up(required - self.size, self.growth_unit), 0)
        return Growth(
            required,
            self.size + units * self.growth_unit,
            max(self._over_limit(required), self._over_free_space(required, allocates)),
        )

    def refusal(self, required: int, allocates: int | None = None) -> CannotGrow | None:
        """The error that says why it cannot hold *required* bytes; None if it can.

        *allocates* as in :meth:`growth`.
        """
        missing = self.growth(required, allocates).missing
        if not missing:
            return None
        if self.thin is not None:
            return self._pool_refusal(required, allocates or 0)
        error: type[CannotGrow]
        match self.kind:
            case VolumeKind.FILE if self._over_free_space(required, allocates) == missing:
                error = FileSystemFull
            case VolumeKind.FILE:
                error = FileLimitReached
            case VolumeKind.BLOCK:
                error = DeviceTooSmall
            case VolumeKind.LVM if self.fixed_type:
                facts = (self.path, self.kind.value, self.size, required, self.size, missing)
                return VolumeNotExtensible(*facts, self.fixed_type)
            case VolumeKind.LVM:
                error = VolumeGroupFull
        return error(self.path, self.kind.value, self.size, required, self.capacity_limit, missing)

    def _pool_refusal(self, required: int, allocates: int) -> CannotGrow:
        pool = self.thin
        assert pool is not None
        return ThinPoolFull(
            self.path,
            self.kind.value,
            self.size,
            required,
            self.capacity_limit,
            self._over_pool(allocates),
            pool.name,
            allocates,
            pool.free,
            pool.metadata_free,
            pool.remedy(allocates),
        )

    def _over_pool(self, allocates: int) -> int:
        """Bytes of data and of metadata that the pool of a thin volume cannot give."""
        assert self.thin is not None
        if not self.extends_pool:
            return self.thin.lacks(allocates).total
        return max(0, self.thin.extension(allocates).of_group - self.thin.vg_free)

    def _over_limit(self, required: int) -> int:
        if self.capacity_limit is None or required <= self.size:
            return 0
        return max(required - self.capacity_limit, 0)

    def _over_free_space(self, required: int, allocates: int | None) -> int:
        if self.thin is not None:
            return self._over_pool(allocates or 0)
        if self.free_bytes is None:
            return 0
        if allocates is None:
            return max(required - self.size - self.free_bytes, 0) if required > self.size else 0
        # What is reserved already is not among that.
        return max(allocates - max(self.free_bytes - self.reserved, 0), 0)
