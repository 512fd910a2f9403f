# SPDX-License-Identifier: Apache-2.0
"""A request that was recorded, and the command that asks for it again, as click reads it."""

from __future__ import annotations

import os
import shlex
import subprocess
from typing import TYPE_CHECKING, Any, Self, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainmerge import api, live
from chainmerge.cli.live import live as live_group
from chainmerge.cli.main import cli
from chainmerge.options import (
    ANY_IMAGE,
    Access,
    DataChoice,
    DirectionChoice,
    EngineChoice,
    LiveOptions,
    MergeOptions,
    Retention,
    StallChoice,
    VerifyLevel,
    VolumeChoice,
)
from chainmerge.records.files import decoded, encoded
from chainmerge.records.request import (
    SPELLINGS,
    RecordedRequest,
    access_of,
    command_of,
    joint_address,
    lasting_name,
    live_command_of,
    options_of,
    recorded,
    recorded_thinning,
    resume_command_of,
    shell_line,
)

if TYPE_CHECKING:
    from pathlib import Path

    import click

# What no option says twice is in it: an equals sign in the name of a key file would.
CHARACTERS = st.characters(exclude_characters="\0=", exclude_categories=())
NAMES = st.text(CHARACTERS, min_size=1, max_size=12).map(
    lambda text: os.fsdecode(os.fsencode(text.encode("utf-8", "ignore").decode()))
)
PATHS = NAMES.map(lambda name: lasting_name(f"/images/{name}"))
SIZES = st.one_of(st.none(), st.integers(1, 2**63 - 1))
SECONDS = st.floats(0, 86400, allow_nan=False)
KEYS = st.one_of(PATHS, st.just(ANY_IMAGE))

ACCESS = st.builds(
    Access,
    formats=st.dictionaries(PATHS, st.sampled_from(("raw", "qcow2", "luks")), max_size=2),
    allow_backing=st.lists(PATHS, max_size=2).map(tuple),
    allow_data_file=st.lists(PATHS, max_size=2).map(tuple),
    search=st.lists(PATHS, max_size=2).map(tuple),
    active=st.one_of(st.none(), PATHS),
    lock_wait=SECONDS,
    # Would look for volumes to activate.
    activate=st.just(False),
    sole_user=st.booleans(),
    lock_command=st.sampled_from((None, "lock-volumes --site 'in the cellar'", "/usr/sbin/lockit")),
)
OPTIONS = st.builds(
    MergeOptions,
    verify=st.sampled_from(get_args(VerifyLevel)),
    delete=st.booleans(),
    keep_name=st.booleans(),
    drop_bitmaps=st.booleans(),
    drop_snapshots=st.booleans(),
    despite_newer_base=st.booleans(),
    reclaim=st.booleans(),
    engine=st.sampled_from(get_args(EngineChoice)),
    direction=st.sampled_from(get_args(DirectionChoice)),
    data=st.sampled_from(get_args(DataChoice)),
    detect_zeroes=st.booleans(),
    bandwidth=SIZES,
    size_limit=SIZES,
    volume=st.sampled_from(get_args(VolumeChoice)),
    extend_pool=st.booleans(),
    shrink=st.booleans(),
    leave=SIZES,
    discard=st.booleans(),
    key_files=st.dictionaries(KEYS, PATHS, max_size=2),
    history=st.booleans(),
)
LIVE_OPTIONS = st.builds(
    LiveOptions,
    verify=st.sampled_from(get_args(VerifyLevel)),
    delete=st.booleans(),
    drop_bitmaps=st.booleans(),
    direction=st.sampled_from(get_args(DirectionChoice)),
    bandwidth=SIZES,
    deadline=st.one_of(st.none(), SECONDS),
    on_stall=st.sampled_from(get_args(StallChoice)),
    size_limit=SIZES,
    volume=st.sampled_from(get_args(VolumeChoice)),
    extend_pool=st.booleans(),
    history=st.booleans(),
)
RETENTION = st.builds(
    Retention,
    keep_last=st.integers(0, 10**6),
    keep_within=st.one_of(st.none(), st.integers(0, 10**9)),
    keep=st.lists(NAMES.filter(bool), max_size=3).map(tuple),
    keep_checkpoints=st.booleans(),
)
ADDRESSES = st.one_of(
    st.tuples(st.just("--qmp"), PATHS, st.sampled_from(("--device", "--node")), NAMES),
    st.tuples(st.just("--domain"), NAMES, st.just("--disk"), NAMES),
)
TOPS = st.lists(PATHS, min_size=1, max_size=3, unique=True)


def words_of(command: str | None) -> list[str]:
    """The words of a command as a shell takes them apart."""
    assert command is not None
    program, *words = _words(command)
    assert program == "chainmerge"
    return words


def _words(command: str) -> list[str]:
    if "$'" not in command:
        return shlex.split(command)
    script = f"printf '%s\\0' {command}"
    out = subprocess.run(["bash", "-c", os.fsencode(script)], check=True, capture_output=True)
    return [os.fsdecode(word) for word in out.stdout.split(b"\0")[:-1]]


def asked_again(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> tuple[Any, ...]:
    """What the API is asked for by a command, read by click's own command."""
    asked: list[tuple[Any, ...]] = []

    class Asked(Exception):
        pass

    def ask(*arguments: Any, lock_command: Any = None, **_more: Any) -> None:
        asked.append(arguments if lock_command is None else (*arguments, lock_command))
        raise Asked

    for owner, names in (
        (api, ("merge", "merge_disks", "thin_out")),
        (live, ("merge_disks", "resume")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, ask, raising=False)
    monkeypatch.setattr(live, "DomainDisk", _Disk)
    monkeypatch.setattr(live, "QmpMachine", _Machine)
    cli.main(words, prog_name="chainmerge", standalone_mode=False)
    (arguments,) = asked
    return arguments


class _Disk:
    def __init__(self, *place: Any, **more: Any) -> None:
        self.place = (*place, *more.values())

    def __enter__(self) -> tuple[Any, ...]:
        return self.place

    def __exit__(self, *_: object) -> None:
        pass


class _Machine:
    def __init__(self, socket: str, **_: Any) -> None:
        self.socket = socket

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def disk(self, device: str) -> _Disk:
        return _Disk(self.socket, device)

    def disk_on(self, node: str) -> _Disk:
        return _Disk(self.socket, node)


def through_a_file(request: RecordedRequest) -> RecordedRequest:
    return decoded(encoded(request), RecordedRequest)


@given(tops=TOPS, access=ACCESS, options=OPTIONS)
def test_a_merge_is_asked_for_again(tops: list[str], access: Access, options: MergeOptions) -> None:
    bases = [f"{top}-base" for top in tops]
    request = through_a_file(recorded(tops, bases, access, options))
    assert (access_of(request), options_of(request)) == (access, options)
    with pytest.MonkeyPatch.context() as patch:
        found = asked_again(patch, words_of(command_of(request)))
    if len(tops) == 1:
        assert found == (tops[0], bases[0], access, options)
    else:
        assert found == (tuple(tops), tuple(bases), access, options)


@given(leaf=PATHS, retention=RETENTION, access=ACCESS, options=OPTIONS)
def test_thinning_out_is_asked_for_again(
    leaf: str, retention: Retention, access: Access, options: MergeOptions
) -> None:
    request = through_a_file(recorded_thinning(leaf, retention, access, options))
    with pytest.MonkeyPatch.context() as patch:
        found = asked_again(patch, words_of(command_of(request)))
    assert found == (leaf, retention, access, options)


def test_rules_that_are_not_known_here_give_no_command() -> None:
    request = recorded_thinning("/a", Retention(keep_last=1), Access(), MergeOptions())
    assert command_of(request) == "chainmerge thin-out --keep-last 1 -- /a"
    for unknown in ({"keep_first": 1}, {"keep_checkpoints": True}, {"keep_last": -1}):
        assert command_of(msgspec.structs.replace(request, retention=unknown)) is None


def test_parts_of_a_second_are_no_other_rule() -> None:
    half, whole = (
        recorded_thinning("/a", Retention(keep_within=age), Access(), MergeOptions())
        for age in (59.5, 60)
    )
    assert half.retention == whole.retention
    assert command_of(half) == "chainmerge thin-out --keep-within 1m -- /a"


@given(top=PATHS, access=ACCESS, options=LIVE_OPTIONS, address=ADDRESSES)
def test_a_live_merge_is_carried_on_and_asked_for_again_cold(
    top: str, access: Access, options: LiveOptions, address: tuple[str, ...]
) -> None:
    base = f"{top}-base"
    request = through_a_file(recorded([top], [base], access, options, address))
    place = address[1::2]
    with pytest.MonkeyPatch.context() as patch:
        disk, pace, *locking = asked_again(patch, words_of(resume_command_of(request)))
    assert locking == ([] if access.lock_command is None else [access.lock_command])
    assert set(place) <= set(disk)
    for name in ("bandwidth", "deadline", "on_stall", "volume"):
        assert getattr(pace, name) == getattr(options, name)
    with pytest.MonkeyPatch.context() as patch:
        cold = asked_again(patch, words_of(command_of(request)))
    assert cold[:3] == (top, base, access)
    for name in MergeOptions.__struct_fields__:
        default = getattr(MergeOptions(), name)
        assert getattr(cold[3], name) == getattr(options, name, default)


@given(tops=TOPS, access=ACCESS, options=LIVE_OPTIONS, vm=NAMES, data=st.data())
def test_a_live_merge_of_several_disks_is_asked_for_again(
    tops: list[str], access: Access, options: LiveOptions, vm: str, data: st.DataObject
) -> None:
    tops = [*tops, "/images/another"]
    names = data.draw(st.lists(NAMES, min_size=len(tops), max_size=len(tops), unique=True))
    vm_option, disk_option = data.draw(
        st.sampled_from((("--qmp", "--device"), ("--domain", "--disk")))
    )
    vm = lasting_name(vm) if vm_option == "--qmp" else vm
    bases = [f"{top}-base" for top in tops]
    address = joint_address([(vm_option, vm, disk_option, name) for name in names])
    request = through_a_file(recorded(tops, bases, access, options, address))
    with pytest.MonkeyPatch.context() as patch:
        disks, *rest = asked_again(patch, words_of(live_command_of(request)))
    assert [disk[:2] for disk in disks] == [(vm, name) for name in names]
    assert rest[:4] == [tuple(tops), tuple(bases), access, options]


@pytest.mark.parametrize("kind", [Access, MergeOptions, LiveOptions, Retention])
def test_every_field_has_a_spelling(kind: Any) -> None:
    assert set(kind.__struct_fields__) <= SPELLINGS.keys()


def test_every_spelling_is_an_option_of_a_command() -> None:
    merge = cli.get_command(None, "merge")  # type: ignore[arg-type]
    assert merge is not None
    live_merge, resume = live_group.commands["merge"], live_group.commands["resume"]
    merging = {*MergeOptions.__struct_fields__, *Access.__struct_fields__}
    assert {SPELLINGS[name].option for name in merging} <= options_in(merge)
    living = {*LiveOptions.__struct_fields__, *Access.__struct_fields__}
    assert {SPELLINGS[name].option for name in living} <= options_in(live_merge)
    resumable = options_in(resume)
    pace = {name for name in LiveOptions.__struct_fields__ if SPELLINGS[name].option in resumable}
    assert pace == {"bandwidth", "deadline", "history", "on_stall", "volume"}
    thinning = cli.get_command(None, "thin-out")  # type: ignore[arg-type]
    assert thinning is not None
    retaining = {*Retention.__struct_fields__, *merging}
    assert {SPELLINGS[name].option for name in retaining} <= options_in(thinning)


def options_in(command: click.Command) -> set[str]:
    return {
        option
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }


def test_volumes_are_activated_again() -> None:
    request = recorded(["/a"], ["/b"], Access(activate=True), MergeOptions())
    assert command_of(request) == "chainmerge merge --activate --base /b -- /a"


def test_paths_lead_there_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    access = Access(formats={"b": "raw"}, allow_backing=("d",), active="leaf")
    options = MergeOptions(key_files={"a": "key", ANY_IMAGE: "any"})
    request = recorded(["a"], ["b"], access, options)
    names = [f"{tmp_path}/{name}" for name in ("a", "b", "d", "leaf", "key", "any")]
    top, base, allowed, leaf, key, any_key = names
    assert (request.tops, request.bases) == ([top], [base])
    assert access_of(request) == Access(
        formats={base: "raw"}, allow_backing=(allowed,), active=leaf
    )
    assert options_of(request) == MergeOptions(key_files={top: key, ANY_IMAGE: any_key})
    live_request = recorded(["a"], ["b"], Access(), LiveOptions(), ("--qmp", "s", "--node", "n"))
    assert live_request.address == ["--qmp", f"{tmp_path}/s", "--node", "n"]


def test_what_a_later_version_asks_for_has_no_command() -> None:
    request = recorded(["/a"], ["/b"], Access(), MergeOptions(delete=True))
    later = msgspec.structs.replace(request, options={**request.options, "anew": True})
    assert command_of(later) is None
    assert options_of(later) is None
    wrong = msgspec.structs.replace(request, options={"engine": "no such"})
    assert command_of(wrong) is None


@given(st.lists(st.text(CHARACTERS).map(lambda text: text.encode("utf-8", "ignore").decode())))
def test_a_shell_takes_the_line_apart_again(words: list[str]) -> None:
    line = shell_line(["word", *words])
    assert line.isprintable()
    assert _words(line) == ["word", *words]
