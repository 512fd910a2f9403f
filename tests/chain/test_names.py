# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from chainmerge.chain.errors import BackingNameUnusable, RemoteBackingName
from chainmerge.chain.names import (
    backing_path,
    possible_backing_paths,
    protocol_of,
    without_detours,
)
from tests.support import qemu


@given(name=st.text("ab.:/ é", min_size=1, max_size=12))
@example(name="./a:b")
@example(name="/a:b")
@example(name="a/b:c")
@example(name="../../a")
@example(name=":")
def test_plain_names_mean_what_they_mean_to_qemu(name: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        image = Path(scratch) / "top.qcow2"
        qemu.qemu_img(
            "create",
            "-q",
            "-u",
            "-f",
            "qcow2",
            f"-obacking_file={name},backing_fmt=raw",
            image,
            "512",
        )
        full = qemu.info(image)["full-backing-filename"]
    if protocol_of(name) is None:
        assert backing_path(image, name) == Path(full)
    else:
        assert full == name
        with pytest.raises(RemoteBackingName) as caught:
            backing_path(image, name)
        assert caught.value.protocol == name.partition(":")[0]


IMAGE = Path("/images/top.qcow2")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("file:/images/base", "/images/base"),
        ("file:///images/base", "///images/base"),
        ("./json:{}", "/images/json:{}"),
        ("sub/../base", "/images/sub/../base"),
    ],
)
def test_local_names(name: str, path: str) -> None:
    assert backing_path(IMAGE, name) == Path(path)


def test_a_name_that_is_not_utf8_keeps_its_bytes() -> None:
    stored = b"b\xffse".decode("utf-8", "surrogateescape")
    assert os.fsencode(backing_path(IMAGE, stored)) == b"/images/b\xffse"


@pytest.mark.parametrize("name", ["", "base\0junk", "file:base", "file:"])
def test_names_that_say_nothing_definite(name: str) -> None:
    with pytest.raises(BackingNameUnusable) as caught:
        backing_path(IMAGE, name)
    assert caught.value.sentence.isprintable()


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("base", "/images/base"),
        ("file:base", "/images/base"),
        ("host_device:/dev/vg/base", "/dev/vg/base"),
        ("json:{'driver':'qcow2'}", None),
        ('json:{"driver":"qcow2","file":{"driver":"file","filename":"base"}}', "/images/base"),
        ('json:{"file.driver":"file","file.filename":"/b/base"}', "/b/base"),
        ('json:{"x":[{"filename":"file:/b/base"}]}', "/b/base"),
        ("json:" + "[" * 1000, None),
        ('json:{"filename":"a\\u0000b"}', None),
        ('json:{"filename":"\\ud800"}', None),
    ],
)
def test_where_a_name_could_lead(name: str, path: str | None) -> None:
    possible = possible_backing_paths(IMAGE, name)
    assert possible == () if path is None else Path(path) in possible


def test_detours_are_left_out_and_no_others(tmp_path: Path) -> None:
    golden, vm = tmp_path / "golden", tmp_path / "vm"
    for directory in (golden / "deep", vm):
        directory.mkdir(parents=True)
    (vm / "link").symlink_to(golden / "deep")
    (vm / "file").touch()
    for written, shortest in {
        "vm/../golden/a": "golden/a",
        "vm/./link/a": "vm/link/a",
        "golden/deep/../../vm/../golden/a": "golden/a",
        # To another place than to vm, to none, and to none.
        "vm/link/../a": "vm/link/../a",
        "vm/none/../a": "vm/none/../a",
        "vm/file/../a": "vm/file/../a",
        "vm/link/../deep/../a": "vm/link/../a",
        "vm/link/../../vm/../a": "vm/link/../../a",
    }.items():
        assert without_detours(tmp_path / written) == tmp_path / shortest
    assert without_detours(Path("/../../a")) == Path("/a")


@given(st.lists(st.sampled_from(["a", "link", "..", "none"]), max_size=6))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_shortest_spelling_goes_the_same_way(tmp_path: Path, parts: list[str]) -> None:
    inside = tmp_path / "a" / "a" / "a"
    inside.mkdir(parents=True, exist_ok=True)
    for place in (tmp_path, tmp_path / "a"):
        if not (place / "link").is_symlink():
            (place / "link").symlink_to(inside)
    path = tmp_path.joinpath(*parts)
    shortest = without_detours(path)
    assert len(shortest.parts) <= len(path.parts)
    assert shortest.exists() == path.exists()
    if path.exists():
        assert shortest.samefile(path)
