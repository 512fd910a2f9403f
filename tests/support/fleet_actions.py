# SPDX-License-Identifier: Apache-2.0
"""Images on which each action of a fleet has something to do, and what is to become of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tests.support.damage import leak_clusters
from tests.support.fleet import Host, are_merged
from tests.support.qemu import bitmap_names, check
from tests.support.qemu import run as run_tool

if TYPE_CHECKING:
    from pathlib import Path


STALE: Final = "before"


def overlay_on(image: Path, top: Path) -> Path:
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(image), str(top))
    return top


def chain_with_stale_bitmap(host: Host, name: str) -> Path:
    """A chain whose base has a bitmap that its top has not."""
    top = host.chain(name)
    run_tool("qemu-img", "bitmap", "--add", str(top.with_suffix(".base")), STALE)
    return top


@dataclass(frozen=True)
class WorkOfEachAction:
    """Images of a host that its jobs are for; what their names begin with tells sets apart."""

    host: Host
    prefix: str = ""

    def make(self) -> None:
        host, prefix = self.host, self.prefix
        for name in ("left", "right"):
            host.chain(prefix + name)
        overlay_on(host.chain(f"{prefix}thin"), self.image("thin.leaf"))
        leak_clusters(host.chain(f"{prefix}leaking"), 3)
        chain_with_stale_bitmap(host, f"{prefix}pruned")

    def image(self, name: str) -> Path:
        return self.host.images / (self.prefix + name)

    def planned(self, *of_merges: str) -> dict[str, dict[str, Any]]:
        """A plan of each action that needs no virtual machine, by its name."""
        planned = self.host.planned
        thin_out = ("--action", "thin-out", "--keep-last", "0", self.image("thin.leaf"))
        disks = (self.image("left.top"), self.image("right.top"))
        return {
            "merge": planned(*of_merges, "--together", *disks),
            "thin-out": planned(*of_merges, *thin_out),
            "prune": planned("--action", "prune", self.image("pruned.top")),
            "repair": planned("--action", "repair", self.image("leaking.top")),
        }

    def require_done(self) -> None:
        """Assert that all of it is done."""
        assert are_merged([self.image(f"{name}.top") for name in ("left", "right")])
        left = sorted(path.name for path in self.host.images.glob(f"{self.prefix}thin.*"))
        assert left == [f"{self.prefix}thin.leaf"], "the leaf took in what was below it"
        run_tool("qemu-io", "-r", "-c", "read -q -P 2 512K 1M", str(self.image("thin.leaf")))
        run_tool("qemu-io", "-r", "-c", "read -q -P 1 0 512K", str(self.image("thin.leaf")))
        assert bitmap_names(self.image("pruned.base")) == {}
        check(self.image("leaking.top"))
