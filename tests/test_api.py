# SPDX-License-Identifier: Apache-2.0
"""Public functions raise errors of ours only, whatever they are given."""

from __future__ import annotations

import asyncio
import inspect
import math
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs

import chainmerge
from chainmerge import api, live
from chainmerge.documents.merge import MergeOutcome
from chainmerge.errors import ChainmergeError, ExitCode
from chainmerge.options import (
    Access,
    LiveOptions,
    MergeOptions,
    OptionUnusable,
    ScanOptions,
)
from tests.support.qemu import content, create, qemu_io

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
RECORDS = (Access, MergeOptions, LiveOptions, ScanOptions)
FUNCTIONS = {
    **{name: getattr(api, name) for name in api.__all__},
    **{f"live.{name}": getattr(live, name) for name in ("merge", "plan", "resume", "status")},
}
# Values of every type, and what is at the edges of each.
ODD = st.one_of(
    st.sampled_from(
        ["", "nonsense", "a\0b", "\udc80", "\ud800", "x" * 5000, "/", "/dev/null", ".", "-", b"\0"]
    ),
    st.sampled_from([0, -1, 1, 2**63, 2**200, math.nan, math.inf, -0.5, True, None, 1j]),
    st.sampled_from([(), ("a\0",), [""], {}, {"": ""}, {"a": "\0"}, {1: 2}, object, Path("\0")]),
    st.text(max_size=20),
    st.integers(),
    st.floats(),
)


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("odd")
    create(directory / "base.qcow2", MIB)
    return create(directory / "top.qcow2", backing="base.qcow2")


@pytest.mark.parametrize("record", RECORDS)
def test_options_are_values(record: type[Any]) -> None:
    options = record(verify="metadata") if "verify" in record.__struct_fields__ else record()
    assert options == structs.replace(options)
    assert record(**structs.asdict(options)) == options
    assert structs.replace(options, **structs.asdict(record())) == record()
    with pytest.raises(AttributeError):
        options.anything = 1
    with pytest.raises(TypeError):
        structs.replace(options, anything=1)


def test_a_changed_copy_is_checked_like_a_new_record() -> None:
    with pytest.raises(OptionUnusable):
        structs.replace(MergeOptions(), bandwidth=0)


def test_reports_are_values(overlay: Path) -> None:
    plan = chainmerge.plan(overlay)
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert structs.replace(plan, warnings=()).warnings == ()
    assert msgspec.to_builtins(plan)["top"] == str(overlay)
    with pytest.raises(AttributeError):
        plan.top = "another"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("record", "field"),
    [(record, name) for record in RECORDS for name in record.__struct_fields__],
)
@given(value=ODD)
def test_options_are_usable_or_refused(record: type[Any], field: str, value: object) -> None:
    refusal = None
    try:
        record(**{field: value})
    except OptionUnusable as error:
        refusal = error
    if refusal is not None:
        assert refusal.exit_code is ExitCode.USAGE
        assert field in refusal.sentence
        assert refusal.sentence.isprintable()


@pytest.mark.parametrize(
    ("record", "field", "value"),
    [
        (MergeOptions, "bandwidth", 0),
        (MergeOptions, "bandwidth", -1),
        (MergeOptions, "bandwidth", 1.5),
        (MergeOptions, "bandwidth", True),
        (MergeOptions, "size_limit", 0),
        (MergeOptions, "engine", "nonsense"),
        (MergeOptions, "verify", None),
        (MergeOptions, "delete", 1),
        (MergeOptions, "drop_snapshots", "no"),
        (MergeOptions, "despite_newer_base", "no"),
        (MergeOptions, "reclaim", 1),
        (MergeOptions, "leave", -1),
        (MergeOptions, "leave", "1G"),
        (Access, "sole_user", "no"),
        (Access, "activate", None),
        (MergeOptions, "key_files", {"*": "a\0b"}),
        (Access, "lock_wait", math.nan),
        (Access, "lock_wait", math.inf),
        (Access, "lock_wait", -1),
        (Access, "search", "/images"),
        (Access, "active", "a\0b"),
        (Access, "formats", {"a\0b": "raw"}),
        (LiveOptions, "deadline", math.nan),
        (ScanOptions, "hidden", 0),
        (ScanOptions, "length_info", 0),
        (ScanOptions, "old_days", 1.5),
        (ScanOptions, "free_warning", 101),
        (ScanOptions, "check", "yes"),
        (LiveOptions, "bandwidth", 0),
        (LiveOptions, "on_stall", "explode"),
    ],
)
def test_what_makes_no_sense_is_no_option(record: type[Any], field: str, value: object) -> None:
    with pytest.raises(OptionUnusable, match=field):
        record(**{field: value})


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_errors_are_ours(
    name: str, data: st.DataObject, overlay: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but Python's own complaint about a call that lacks an argument, or has one more."""
    monkeypatch.chdir(overlay.parent)
    function: Callable[..., object] = FUNCTIONS[name]
    given_ = {}
    for parameter in inspect.signature(function).parameters.values():
        # What is called back, and a VM, are code and not values.
        if parameter.name in {"on_progress", "should_stop", "vm"}:
            continue
        # What writes, writes nowhere: no image is ever named.
        given_[parameter.name] = data.draw(ODD, label=parameter.name)
    arguments = {"vm": None} if name.startswith("live") else {}
    sentence = "it was done"
    try:
        function(**arguments, **given_)
    except ChainmergeError as error:
        sentence = error.sentence
    except AttributeError:
        # There is no VM to speak to.
        assert name.startswith("live")
    assert sentence


@pytest.mark.parametrize("name", ["plan", "merge", "measure", "inspect", "check_image", "repair"])
def test_a_path_that_no_file_has(name: str) -> None:
    with pytest.raises(OptionUnusable):
        getattr(chainmerge, name)("a\0b")


def _written(directory: Path) -> Path:
    create(directory / "base.qcow2", 8 * MIB)
    top = create(directory / "top.qcow2", backing="base.qcow2")
    qemu_io(top, "write -P 7 1M 2M")
    return top


@pytest.mark.parametrize("engine", ["native", "qemu"])
def test_merges_from_within_an_event_loop(tmp_path: Path, engine: Any) -> None:
    top = _written(tmp_path)
    expected = content(top)

    async def handler() -> MergeOutcome:
        return chainmerge.merge(top, options=MergeOptions(engine=engine)).outcome

    assert asyncio.run(handler()) is MergeOutcome.MERGED
    assert content(tmp_path / "base.qcow2") == expected
