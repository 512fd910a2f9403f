# SPDX-License-Identifier: Apache-2.0
"""Whose configuration is obeyed. Needs root, to make files of others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from chainmerge.cli.errors import ConfigurationUnreadable, ConfigurationUntrusted
from chainmerge.cli.trusted_files import read_trusted
from tests.support.cli import chainmerge
from tests.support.images import MIB
from tests.support.loopdev import mounted
from tests.support.qemu import create

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chainmerge.errors import ChainmergeError

SOMEBODY: Final = 1234
ELSE: Final = 1235
WORDS: Final = b"[scan]\nold-days = 3\n"


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory that belongs to root, on a way that everybody can go."""
    with mounted("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/srv"):
        place = Path("/srv/home")
        place.mkdir()
        yield place


def file_in(directory: Path, *, owner: int = 0, mode: int = 0o644) -> Path:
    path = directory / "config.toml"
    path.write_bytes(WORDS)
    path.chmod(mode)
    os.chown(path, owner, owner)
    return path


def as_user(user: int, path: Path) -> bytes | ChainmergeError:
    """What *user* gets of a file."""
    os.seteuid(user)
    try:
        return read_trusted(str(path))
    except (ConfigurationUntrusted, ConfigurationUnreadable) as error:
        return error
    finally:
        os.seteuid(0)


def test_who_obeys_whom(home: Path) -> None:
    roots = file_in(home)
    assert as_user(0, roots) == as_user(SOMEBODY, roots) == WORDS
    place = home / "somebody"
    place.mkdir()
    os.chown(place, SOMEBODY, SOMEBODY)
    own = file_in(place, owner=SOMEBODY, mode=0o600)
    assert as_user(SOMEBODY, own) == WORDS
    by_root = as_user(0, own)
    assert isinstance(by_root, ConfigurationUntrusted)
    assert f"belongs to the user with the number {SOMEBODY}" in by_root.sentence
    own.chmod(0o644)
    assert isinstance(as_user(ELSE, own), ConfigurationUntrusted)
    given = as_user(0, file_in(home, owner=SOMEBODY))
    assert isinstance(given, ConfigurationUntrusted)
    assert f"it belongs to the user with the number {SOMEBODY}" in given.sentence


def test_root_obeys_nobody_in_whose_directory_its_file_lies(home: Path) -> None:
    os.chown(home, SOMEBODY, SOMEBODY)
    error = as_user(0, file_in(home))
    assert isinstance(error, ConfigurationUntrusted)
    assert f"{home} belongs to the user with the number {SOMEBODY}" in error.sentence


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_others_may_not_write_to_it(home: Path, mode: int) -> None:
    error = as_user(0, file_in(home, mode=mode))
    assert isinstance(error, ConfigurationUntrusted)
    assert "other users can write to it" in error.sentence


@pytest.mark.parametrize(("mode", "obeyed"), [(0o775, False), (0o777, False), (0o1777, True)])
def test_others_may_not_replace_it(home: Path, mode: int, obeyed: bool) -> None:
    below = home / "below"
    below.mkdir()
    home.chmod(mode)
    assert (as_user(0, file_in(below)) == WORDS) is obeyed


def test_a_link_is_judged_by_what_it_leads_to(home: Path) -> None:
    (home / "mine").mkdir()
    (home / "theirs").mkdir()
    os.chown(home / "theirs", SOMEBODY, SOMEBODY)
    link = home / "mine" / "link"
    link.symlink_to(file_in(home / "theirs", owner=SOMEBODY))
    assert isinstance(as_user(0, link), ConfigurationUntrusted)
    link.unlink()
    link.symlink_to(file_in(home))
    assert as_user(0, link) == WORDS


def _directory(path: Path) -> None:
    path.mkdir()


def _pipe(path: Path) -> None:
    os.mkfifo(path, 0o644)


def _too_large(path: Path) -> None:
    path.write_bytes(b"#" * (MIB + 1))


def _loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [_directory, _pipe, _too_large, _loop, lambda _: None])
def test_what_is_not_a_file_to_read(home: Path, make: Callable[[Path], None]) -> None:
    path = home / "config.toml"
    make(path)
    assert isinstance(as_user(0, path), ConfigurationUnreadable)


def test_one_that_may_not_be_read_is_not_passed_over(home: Path) -> None:
    assert isinstance(as_user(SOMEBODY, file_in(home, mode=0o600)), ConfigurationUnreadable)


def test_a_command_refuses_before_it_looks_at_images(home: Path, tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", MIB)
    place = home / "chainmerge"
    place.mkdir()
    file_in(place, mode=0o666)
    ran = chainmerge("info", "--json", image, XDG_CONFIG_HOME=str(home))
    assert (ran.status, ran.json["code"]) == (3, "configuration-untrusted")
    assert chainmerge("--no-config", "info", image, XDG_CONFIG_HOME=str(home)).status == 0
    assert chainmerge("status", tmp_path, XDG_CONFIG_HOME=str(home)).status == 0
