# SPDX-License-Identifier: Apache-2.0
"""Situations in which images are found, and what a scan must say of each: that, and no more."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import chainmerge
from chainmerge import DefinedDisk, MergeOptions
from tests.inventory.findings.building import (
    DISK,
    age,
    base_is_older_than,
    chain,
    copied,
    lose_directory,
    lose_refcounts,
    small,
    touch_upwards,
    undeclare,
)
from tests.inventory.findings.situations import situation
from tests.support import damage, surgery
from tests.support.images import MIB, TIB
from tests.support.qemu import create, qemu_img, qemu_io

if TYPE_CHECKING:
    from pathlib import Path

_DIRTY, _CORRUPT = 1, 2


# Nothing is wrong


@situation()
def nothing_at_all(home: Path) -> None:
    (home / "notes.txt").write_text("no image")


@situation()
def one_image(home: Path) -> None:
    chain(home, "disk", 1)


@situation()
def a_chain_of_three(home: Path) -> None:
    chain(home, "disk", 3)


@situation(options=small(check=True))
def a_checked_chain(home: Path) -> None:
    chain(home, "disk", 3)


@situation()
def a_raw_base(home: Path) -> None:
    base = create(home / "disk.img", DISK, fmt="raw")
    qemu_io(base, "write -P 1 0 1M", fmt="raw")
    create(home / "over.qcow2", backing=base, backing_format="raw")


@situation()
def linked_clones(home: Path) -> None:
    golden = chain(home, "golden", 2)[-1]
    for number in range(3):
        create(home / f"clone{number}.qcow2", backing=golden)


@situation(options=small(old_days=5))
def an_old_template(home: Path) -> None:
    linked_clones(home)
    for image, days in (("golden0.qcow2", 101), ("golden1.qcow2", 100)):
        age(home / image, days)


@situation()
def a_larger_overlay(home: Path) -> None:
    base = create(home / "base.qcow2", DISK)
    create(home / "over.qcow2", 2 * DISK, backing=base)


@situation()
def an_internal_snapshot(home: Path) -> None:
    top = chain(home, "disk", 2)[-1]
    qemu_img("snapshot", "-c", "before", top)


@situation()
def old_version(home: Path) -> None:
    chain(home, "disk", 2, compat="0.10")


@situation()
def extended_entries(home: Path) -> None:
    chain(home, "disk", 2, extended_l2="on", cluster_size=64 << 10)


@situation()
def compressed_data(home: Path) -> None:
    base = chain(home, "disk", 1)[0]
    packed = home / "packed.qcow2"
    qemu_img("convert", "-c", "-O", "qcow2", base, packed)
    base.unlink()
    create(home / "over.qcow2", backing=packed)


@situation()
def below_other_directories(home: Path) -> None:
    (home / "a").mkdir()
    (home / "b").mkdir()
    create(home / "a" / "base.qcow2", DISK)
    create(home / "b" / "over.qcow2", backing="../a/base.qcow2")


@situation()
def a_link_to_an_image(home: Path) -> None:
    top = chain(home, "disk", 2)[-1]
    (home / "current.qcow2").symlink_to(top.name)


@situation()
def a_link_in_the_chain(home: Path) -> None:
    base = chain(home, "disk", 1)[0]
    (home / "base.qcow2").symlink_to(base.name)
    create(home / "over.qcow2", backing="base.qcow2")


@situation()
def a_name_with_a_protocol(home: Path) -> None:
    base = chain(home, "disk", 1)[0]
    create(home / "over.qcow2", backing=f"file:{base}")


@situation()
def a_checkpoint_in_all_images(home: Path) -> None:
    for image in chain(home, "disk", 3):
        qemu_img("bitmap", "--add", image, "daily")


@situation()
def a_checkpoint_of_the_overlay(home: Path) -> None:
    qemu_img("bitmap", "--add", chain(home, "disk", 2)[-1], "daily")


@situation()
def a_tombstone(home: Path) -> None:
    base, _ = chain(home, "disk", 2)
    qemu_img("bitmap", "--add", "--disable", base, "gone")
    touch_upwards(home)


@situation()
def after_a_merge(home: Path) -> None:
    images = chain(home, "disk", 3)
    chainmerge.merge(images[1], images[0], options=MergeOptions(delete=True))


@situation()
def after_a_merge_that_kept_the_name(home: Path) -> None:
    images = chain(home, "disk", 3)
    chainmerge.merge(images[2], images[0], options=MergeOptions(delete=True, keep_name=True))


@situation()
def data_in_another_file(home: Path) -> None:
    base = create(home / "disk.qcow2", DISK, data_file=str(home / "disk.raw"))
    qemu_io(base, "write -P 1 0 1M")
    create(home / "over.qcow2", backing=base)


@situation()
def encrypted_data(home: Path) -> None:
    secret = ("--object", "secret,id=key,data=secret", "-o", "encrypt.format=luks")
    key = ("-o", "encrypt.key-secret=key,encrypt.iter-time=10")
    qemu_img("create", "-q", "-f", "qcow2", *secret, *key, home / "disk.qcow2", str(DISK))


@situation()
def two_disks(home: Path) -> None:
    chain(home, "system", 2)
    chain(home, "data", 3)


@situation(domains=lambda home: (DefinedDisk("vm", "vda", str(home / "disk1.qcow2"), False),))
def a_disk_of_a_domain(home: Path) -> None:
    chain(home, "disk", 2)


# Chains that should be merged


@situation(("long-chain", "disk3.qcow2"), options=small(length_info=4))
def a_long_chain(home: Path) -> None:
    chain(home, "disk", 4)


@situation(("long-chain", "a3.qcow2"), ("long-chain", "b4.qcow2"), options=small(length_warning=4))
def two_long_chains(home: Path) -> None:
    chain(home, "a", 4)
    chain(home, "b", 5)
    chain(home, "c", 3)


@situation(("long-chain", "disk25.qcow2"))
def longer_than_libvirt_starts(home: Path) -> None:
    chain(home, "disk", 26)


@situation(("old-overlay", "disk1.qcow2"))
def an_overlay_of_last_year(home: Path) -> None:
    base, _ = chain(home, "disk", 2)
    age(base, 365)


@situation(("old-overlay", "disk2.qcow2"), options=small(old_days=5))
def the_oldest_of_several(home: Path) -> None:
    golden, first, _, _ = chain(home, "disk", 4)
    age(first, 6)
    age(golden, 10)
    create(home / "clone.qcow2", backing=golden)


@situation(("hidden-bytes", "disk2.qcow2"), options=small(hidden=2 * MIB))
def hidden_data(home: Path) -> None:
    chain(home, "disk", 3)


@situation(("hidden-bytes", "clone1.qcow2"), options=small(hidden=1))
def hidden_data_above_a_branch(home: Path) -> None:
    base = create(home / "golden.qcow2", DISK)
    first = create(home / "clone0.qcow2", backing=base)
    qemu_io(first, "write -P 3 0 1M")
    qemu_io(create(home / "clone1.qcow2", backing=first), "write -P 4 0 64k")
    qemu_io(create(home / "other.qcow2", backing=base), "write -P 5 0 1M")


# Chains that do not hold together


@situation(("backing-file-missing", "disk1.qcow2"), ("orphan", "disk2.qcow2"))
def a_lost_root(home: Path) -> None:
    chain(home, "disk", 3)[0].unlink()


@situation(("backing-file-missing", "disk1.qcow2"))
def a_lost_base(home: Path) -> None:
    chain(home, "disk", 2)[0].unlink()


@situation(
    ("backing-file-missing", "disk1.qcow2"), ("orphan", "x.qcow2"), ("orphan", "disk3.qcow2")
)
def two_leaves_above_a_lost_root(home: Path) -> None:
    images = chain(home, "disk", 4)
    create(home / "x.qcow2", backing=images[1])
    images[0].unlink()


@situation(("backing-cycle", "disk0.qcow2"))
def an_image_on_itself(home: Path) -> None:
    image = chain(home, "disk", 1)[0]
    qemu_img("rebase", "-u", "-b", image.name, "-F", "qcow2", image)


@situation(("backing-cycle", "disk0.qcow2"), ("orphan", "disk2.qcow2"))
def a_loop_of_two(home: Path) -> None:
    low, high, _ = chain(home, "disk", 3)
    qemu_img("rebase", "-u", "-b", high.name, "-F", "qcow2", low)
    touch_upwards(home)


@situation(("backing-file-outside", "over.qcow2"))
def a_base_elsewhere(home: Path) -> None:
    place = home.parent / "elsewhere"
    place.mkdir()
    create(home / "over.qcow2", backing=create(place / "base.qcow2", DISK))


@situation(("backing-file-outside", "over.qcow2"))
def a_link_to_elsewhere(home: Path) -> None:
    place = home.parent / "elsewhere"
    place.mkdir()
    (home / "base").symlink_to(create(place / "base.qcow2", DISK))
    create(home / "over.qcow2", backing=home / "base")
    (home / "base").rename(home / "other")
    (home / "other").rename(home / "base")


@situation(("backing-name-json", "a.qcow2"), ("backing-name-json", "b.qcow2"))
def described_in_json(home: Path) -> None:
    base = chain(home, "disk", 1)[0]
    described = f'json:{{"driver":"qcow2","file.driver":"file","file.filename":"{base}"}}'
    for name in ("a", "b"):
        create(home / f"{name}.qcow2", DISK)
        qemu_img("rebase", "-u", "-b", described, "-F", "qcow2", home / f"{name}.qcow2")


@situation(("backing-name-remote", "a.qcow2"), ("backing-name-remote", "b.qcow2"))
def on_other_hosts(home: Path) -> None:
    for name in ("a", "b"):
        create(home / f"{name}.qcow2", DISK)
        address = f"nbd://host/{name}"
        qemu_img("rebase", "-u", "-b", address, "-F", "qcow2", home / f"{name}.qcow2")


@situation(("backing-name-unusable", "a.qcow2"), ("backing-name-unusable", "b.qcow2"))
def names_that_mean_nothing(home: Path) -> None:
    for name in ("a", "b"):
        create(home / f"{name}.qcow2", DISK)
        qemu_img("rebase", "-u", "-b", "file:x", "-F", "qcow2", home / f"{name}.qcow2")


@situation(("format-not-declared", "disk1.qcow2"), ("format-not-declared", "disk2.qcow2"))
def formats_that_nobody_declares(home: Path) -> None:
    for image in chain(home, "disk", 3)[1:]:
        undeclare(image)


@situation(("backing-format-missing", "a.qcow2"), ("backing-format-missing", "b.qcow2"))
def raw_bases_that_nobody_declares(home: Path) -> None:
    base = create(home / "disk.img", DISK, fmt="raw")
    for name in ("a", "b"):
        undeclare(create(home / f"{name}.qcow2", backing=base, backing_format="raw"))


@situation(("wrong-format", "disk1.qcow2"))
def a_base_that_is_something_else(home: Path) -> None:
    base, top = chain(home, "disk", 2)
    base.write_bytes(bytes(MIB))
    os.utime(top)


@situation(("wrong-format", "disk1.qcow2"), ("wrong-format", "clone.qcow2"))
def two_overlays_on_something_else(home: Path) -> None:
    base, top = chain(home, "disk", 2)
    clone = create(home / "clone.qcow2", backing=base)
    qemu_img("convert", "-O", "raw", base, home / "raw")
    (home / "raw").replace(base)
    base_is_older_than(base, top, clone)


@situation(("qcow-read-as-raw", "over.qcow2"))
def tables_as_a_disk(home: Path) -> None:
    base = create(home / "base.qcow2", DISK)
    create(home / "over.qcow2", DISK, backing=base, backing_format="raw")


@situation(("qcow-read-as-raw", "a.qcow2"), ("qcow-read-as-raw", "b.qcow2"))
def tables_as_two_disks(home: Path) -> None:
    base = create(home / "base.img", DISK)
    for name in ("a", "b"):
        create(home / f"{name}.qcow2", DISK, backing=base, backing_format="raw")


@situation(("base-larger", "over.qcow2"))
def a_smaller_overlay(home: Path) -> None:
    base = create(home / "base.qcow2", DISK)
    create(home / "over.qcow2", DISK // 2, backing=base)


@situation(("base-larger", "disk1.qcow2"))
def a_base_that_has_grown(home: Path) -> None:
    base, top = chain(home, "disk", 2)
    qemu_img("resize", "-f", "qcow2", base, str(2 * DISK))
    os.utime(top)


@situation(("base-written-later", "disk1.qcow2"))
def a_base_that_was_used_alone(home: Path) -> None:
    base, _ = chain(home, "disk", 2)
    qemu_io(base, "write -P 9 0 64k")


@situation(("base-written-later", "a.qcow2"), ("base-written-later", "b.qcow2"))
def a_template_that_was_used(home: Path) -> None:
    base = chain(home, "golden", 1)[0]
    for name in ("a", "b"):
        create(home / f"{name}.qcow2", backing=base)
    qemu_io(base, "write -P 9 0 64k")


@situation(("base-written-later", "disk2.qcow2"))
def an_image_in_between_that_was_written(home: Path) -> None:
    _, middle, _ = chain(home, "disk", 3)
    qemu_io(middle, "write -P 9 0 64k")


@situation(("base-created-later", "disk1.qcow2"))
def a_restored_base(home: Path) -> None:
    copied(chain(home, "disk", 2)[0])


@situation(("base-created-later", "a.qcow2"), ("base-created-later", "b.qcow2"))
def a_restored_template(home: Path) -> None:
    base = chain(home, "golden", 1)[0]
    for name in ("a", "b"):
        create(home / f"{name}.qcow2", backing=base)
    copied(base)


# Damage


@situation(("bad-header", "disk0.qcow2"))
def a_header_that_is_none(home: Path) -> None:
    surgery.CLUSTER_BITS.put(chain(home, "disk", 1)[0], 99)


@situation(("bad-header", "disk1.qcow2"), ("orphan", "disk2.qcow2"))
def a_damaged_image_in_between(home: Path) -> None:
    _, middle, _ = chain(home, "disk", 3)
    surgery.REFCOUNT_ORDER.put(middle, 7)
    touch_upwards(home)


@situation(("not-qcow2", "disk0.qcow2"))
def a_cut_off_image(home: Path) -> None:
    os.truncate(chain(home, "disk", 1)[0], 60)


@situation(("bad-offset", "disk0.qcow2"))
def a_table_outside_the_file(home: Path) -> None:
    surgery.L1_OFFSET.put(chain(home, "disk", 1)[0], 1 << 40)


@situation(("corrupt-bit", "disk0.qcow2"), ("dirty-bit", "other0.qcow2"))
def marks_in_headers(home: Path) -> None:
    surgery.INCOMPATIBLE.put(chain(home, "disk", 1)[0], _CORRUPT)
    surgery.INCOMPATIBLE.put(chain(home, "other", 1)[0], _DIRTY)


@situation(("corrupt-bit", "disk1.qcow2"), ("dirty-bit", "disk1.qcow2"))
def both_marks(home: Path) -> None:
    surgery.INCOMPATIBLE.put(chain(home, "disk", 2)[1], _CORRUPT | _DIRTY)


@situation(("corruption", "disk0.qcow2"), options=small(check=True))
def lost_refcounts(home: Path) -> None:
    lose_refcounts(chain(home, "disk", 1)[0])


@situation(("corruption", "disk1.qcow2"), options=small(check=True))
def lost_refcounts_of_an_overlay(home: Path) -> None:
    lose_refcounts(chain(home, "disk", 2)[1])


@situation()
def lost_refcounts_that_nobody_looks_at(home: Path) -> None:
    lose_refcounts(chain(home, "disk", 1)[0])


@situation(("leaked-clusters", "disk0.qcow2"), options=small(check=True))
def leaks(home: Path) -> None:
    damage.leak_clusters(chain(home, "disk", 1)[0], 5)


@situation(("leaked-clusters", "disk1.qcow2"), options=small(check=True))
def leaks_of_an_overlay(home: Path) -> None:
    damage.leak_clusters(chain(home, "disk", 2)[1], 1)


@situation(("bad-offset", "disk1.qcow2"))
def a_table_that_leads_nowhere(home: Path) -> None:
    _, top = chain(home, "disk", 2)
    surgery.put_bytes(top, surgery.L1_OFFSET.get(top), (1 << 63 | 0x30200).to_bytes(8))


@situation(("bad-offset", "disk0.qcow2"))
def a_lower_table_that_leads_nowhere(home: Path) -> None:
    low, _, _ = chain(home, "disk", 3)
    surgery.put_bytes(low, surgery.L1_OFFSET.get(low), (1 << 63 | 0x30200).to_bytes(8))
    touch_upwards(home)


# Checkpoints


@situation(("broken-bitmap", "disk0.qcow2"))
def a_bitmap_in_use(home: Path) -> None:
    image = chain(home, "disk", 1)[0]
    qemu_img("bitmap", "--add", image, "daily")
    damage.mark_in_use(image, "daily")


@situation(("broken-bitmap", "disk0.qcow2"), ("unusable-checkpoint", "disk1.qcow2"))
def a_program_that_knows_no_bitmaps(home: Path) -> None:
    base, top = chain(home, "disk", 2)
    for image in (base, top):
        qemu_img("bitmap", "--add", image, "daily")
    damage.forget_autoclear(base)
    touch_upwards(home)


@situation(("broken-bitmap-directory", "disk0.qcow2"))
def a_lost_directory_of_bitmaps(home: Path) -> None:
    lose_directory(chain(home, "disk", 1)[0])


@situation(("broken-bitmap-directory", "disk1.qcow2"))
def a_lost_directory_of_an_overlay(home: Path) -> None:
    lose_directory(chain(home, "disk", 2)[1])


@situation(("unusable-bitmap", "disk0.qcow2"))
def a_stale_bitmap(home: Path) -> None:
    base, _ = chain(home, "disk", 2)
    qemu_img("bitmap", "--add", base, "stale")
    touch_upwards(home)


@situation(("unusable-bitmap", "disk1.qcow2"))
def a_disabled_bitmap_with_bits(home: Path) -> None:
    _, top = chain(home, "disk", 2)
    qemu_img("bitmap", "--add", top, "old")
    qemu_io(top, "write -P 7 0 64k")
    qemu_img("bitmap", "--disable", top, "old")


@situation(("unusable-checkpoint", "disk2.qcow2"))
def a_gap(home: Path) -> None:
    base, _, top = chain(home, "disk", 3)
    for image in (base, top):
        qemu_img("bitmap", "--add", image, "daily")
    touch_upwards(home)


@situation(("unusable-checkpoint", "a.qcow2"))
def a_gap_in_one_branch(home: Path) -> None:
    base = chain(home, "disk", 1)[0]
    qemu_img("bitmap", "--add", base, "daily")
    middle = create(home / "m.qcow2", backing=base)
    qemu_img("bitmap", "--add", create(home / "a.qcow2", backing=middle), "daily")
    qemu_img("bitmap", "--add", create(home / "b.qcow2", backing=base), "daily")


# Room


@situation(("file-system-filling", "disk0.qcow2"), options=small(free_warning=100))
def a_disk_larger_than_its_file_system(home: Path) -> None:
    create(home / "disk0.qcow2", 60 * TIB, cluster_size=2 * MIB)


@situation(
    ("file-system-filling", "b.qcow2"),
    options=small(free_warning=100, free_critical=100),
)
def disks_larger_than_their_file_system(home: Path) -> None:
    create(home / "a.qcow2", 30 * TIB, cluster_size=2 * MIB)
    create(home / "b.qcow2", 60 * TIB, cluster_size=2 * MIB)


# Users


@situation(("interrupted-merge", "disk0.qcow2"))
def a_merge_that_was_not_finished(home: Path) -> None:
    base, _ = chain(home, "disk", 2)
    (home / f".{base.name}.chainmerge-journal").write_bytes(b"not a journal")


@situation(("interrupted-merge", "disk0.qcow2"))
def a_merge_that_left_bitmaps(home: Path) -> None:
    base, _ = chain(home, "disk", 2)
    (home / f".{base.name}.chainmerge-saved").write_bytes(b"nor this")


@situation(
    ("unused-image", "other0.qcow2"),
    domains=lambda home: (DefinedDisk("vm", "vda", str(home / "disk1.qcow2"), True),),
)
def an_image_of_no_domain(home: Path) -> None:
    chain(home, "disk", 2)
    chain(home, "other", 1)


@situation(
    ("unused-image", "disk2.qcow2"),
    domains=lambda home: (DefinedDisk("vm", "vda", str(home / "disk1.qcow2"), False),),
)
def an_overlay_of_no_domain(home: Path) -> None:
    chain(home, "disk", 3)
