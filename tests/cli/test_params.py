# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainmerge.cli.options import access_options, merge_options
from chainmerge.cli.params import PATH_FORMAT, SIZE
from chainmerge.options import Access, MergeOptions


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512", 512), ("64K", 65536), ("64KiB", 65536), ("1m", 1 << 20), ("2GB", 2 << 30)],
)
def test_sizes_are_read_as_qemu_writes_them(text: str, size: int) -> None:
    assert SIZE.convert(text, None, None) == size


@given(st.text().filter(lambda text: not text.strip().isascii() or not text[:1].isdigit()))
def test_what_is_no_size_is_refused_in_words(text: str) -> None:
    with pytest.raises(click.BadParameter) as refusal:
        SIZE.convert(text, None, None)
    assert repr(text) in refusal.value.format_message()


@given(st.from_regex(r"[0-9]{1,18}[KMGTPE]?", fullmatch=True))
def test_sizes_are_bounded(text: str) -> None:
    size = int(text.rstrip("KMGTPE")) << 10 * " KMGTPE".index(text[-1] if text[-1] > "9" else " ")
    if size < 2**63:
        assert SIZE.convert(text, None, None) == size
    else:
        with pytest.raises(click.BadParameter):
            SIZE.convert(text, None, None)


def test_a_size_of_a_million_digits_is_refused_at_once() -> None:
    with pytest.raises(click.BadParameter):
        SIZE.convert("9" * 1_000_000, None, None)


@pytest.mark.parametrize(
    ("text", "pair"),
    [("disk.img=raw", ("disk.img", "raw")), ("/a=b/disk=qcow2", ("/a=b/disk", "qcow2"))],
)
def test_formats_belong_to_the_path_before_the_last_equals_sign(
    text: str, pair: tuple[str, str]
) -> None:
    assert PATH_FORMAT.convert(text, None, None) == pair


@pytest.mark.parametrize("text", ["", "raw", "=raw", "disk=", "disk=r w", "disk=RAW\n"])
def test_what_names_no_format_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        PATH_FORMAT.convert(text, None, None)


def given_to_a_command(*arguments: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    @click.command()
    @merge_options
    @access_options
    def command(**objects: Any) -> None:
        seen.update(objects)

    command.main(list(arguments), standalone_mode=False)
    return seen


def test_without_options_the_api_decides() -> None:
    assert given_to_a_command() == {"access": Access(formats={}), "options": MergeOptions()}


def test_every_option_of_the_api_can_be_given() -> None:
    seen = given_to_a_command(
        *("--format", "a=raw", "--format", "b=qcow2", "--allow-backing", "/b"),
        *("--allow-data-file", "/d", "--search", "/s", "--search", "/t", "--active", "leaf"),
        *("--lock-wait", "0.5", "--sole-user", "--verify", "metadata", "--delete", "--keep-name"),
        *("--drop-bitmaps", "--drop-snapshots", "--engine", "qemu"),
        *("--bandwidth", "100M", "--size-limit", "1G"),
        *("--volume", "lvm", "--shrink", "--discard"),
    )
    assert seen["access"] == Access(
        {"a": "raw", "b": "qcow2"}, ("/b",), ("/d",), ("/s", "/t"), "leaf", 0.5, sole_user=True
    )
    assert seen["options"] == MergeOptions(
        "metadata",
        delete=True,
        keep_name=True,
        drop_bitmaps=True,
        drop_snapshots=True,
        engine="qemu",
        bandwidth=100 << 20,
        size_limit=1 << 30,
        volume="lvm",
        shrink=True,
        discard=True,
    )
