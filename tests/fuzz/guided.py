# SPDX-License-Identifier: Apache-2.0
"""``make fuzz-guided``: damaged images that lead into code to which no other one has led.

What looks at images is run in this process, and for some of them, on a copy, what writes to
them. atheris keeps the images that take a way through the program that is new. Whatever is no
error of ours is a finding: another exception, memory or time without bound (libFuzzer's
``-rss_limit_mb`` and ``-timeout``), a read of what is not there. The image of a finding is left
in the current directory; ``python -m tests.fuzz.guided FILE`` tries it again.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import atheris

with atheris.instrument_imports(include=["chainmerge"]):
    import chainmerge
    import chainmerge.bitmaps.editing
    import chainmerge.chain.information
    import chainmerge.merging.preparing
    import chainmerge.repairing.checking
    import chainmerge.repairing.mending
    from chainmerge.options import Access
    from chainmerge.records import files as state_files
    from chainmerge.storage.errors import OutOfMemory, SystemCallFailed

from tests.fuzz.anatomy import Anatomy, anatomy_of
from tests.fuzz.confined import watch_reads
from tests.fuzz.corpus import BREEDS, Chain, build, memory
from tests.fuzz.mutation import mutate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_LARGEST: Final = 512 << 10
# Of how many inputs one is written to: that takes ten times as long.
_WRITTEN_TO: Final = 8
_NO_WAITING: Final = Access(lock_wait=0)
_LIMITS: Final = ("-rss_limit_mb=8192", "-timeout=30", f"-max_len={_LARGEST}")

# Each with whether it is given the damaged image, or the top of the chain.
_LOOKING: Final = (
    (chainmerge.check_image, "image"),
    (chainmerge.plan_repair, "image"),
    (chainmerge.inspect, "chain"),
    (chainmerge.bitmaps_list, "chain"),
    (chainmerge.plan, "chain"),
)
_WRITING: Final = (
    (chainmerge.prune, "chain"),
    (chainmerge.repair, "image"),
    (chainmerge.merge, "chain"),
    (chainmerge.merge, "chain"),
)


@dataclass(frozen=True)
class Place:
    """Where in which chain an image stands that is damaged, and what it is when it is sound."""

    chain: Chain
    role: str
    sound: bytes
    anatomy: Anatomy


class Fuzzer:
    """The places, and what is done with an image in one of them.

    An input is the number of a place in its first byte, and then the image.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        chains = [build(directory / str(number), breed) for number, breed in enumerate(BREEDS)]
        self.places = [
            Place(chain, role, sound, anatomy_of(sound))
            for chain in chains
            for role in chain.qcow2_roles
            if len(sound := chain.image(role).read_bytes()) < _LARGEST
        ]

    def seeds(self) -> list[bytes]:
        return [bytes([number]) + place.sound for number, place in enumerate(self.places)]

    def try_out(self, given: bytes) -> None:
        """Run what looks at images, and perhaps what writes to them, on a chain with this one."""
        if not given:
            return
        place = self.places[given[0] % len(self.places)]
        place.chain.image(place.role).write_bytes(given[1:])
        try:
            _run(place.chain, place.role, _LOOKING)
            # An input has to take the same way each time.
            if zlib.crc32(given) % _WRITTEN_TO == 0:
                with tempfile.TemporaryDirectory(dir=self._directory) as scratch:
                    copy = Chain(Path(scratch) / "images", place.chain.breed)
                    shutil.copytree(place.chain.directory, copy.directory)
                    _run(copy, place.role, _WRITING)
        finally:
            place.chain.image(place.role).write_bytes(place.sound)

    def mutate(self, given: bytes, longest: int, seed: int) -> bytes:
        """Another input: where metadata is, or anywhere."""
        chance = random.Random(seed)
        if not given or chance.random() < 0.3:
            return bytes(atheris.Mutate(given, longest))
        place = self.places[given[0] % len(self.places)]
        image, _ = mutate(given[1:], place.anatomy, chance)
        return (given[:1] + image)[:longest]


def _run(chain: Chain, role: str, commands: Sequence[tuple[Callable[..., object], str]]) -> None:
    for command, of in commands:
        _civilly(command, chain.image("top" if of == "chain" else role))


def _civilly(command: Callable[..., object], path: Path) -> None:
    try:
        command(path, access=_NO_WAITING)
    except (OutOfMemory, SystemCallFailed):
        raise
    except chainmerge.ChainmergeError as error:
        if not (error.sentence and error.advice):
            raise AssertionError(path) from error


def _fail(what: str) -> None:
    raise AssertionError(what)


def main() -> None:
    """Run libFuzzer with the arguments that it is given."""
    with tempfile.TemporaryDirectory(prefix="chainmerge-guided-", dir=memory()) as scratch:
        directory = Path(scratch)
        state_files.STATE_DIRECTORY = directory / "state"  # type: ignore[misc]
        fuzzer = Fuzzer(directory)
        seeds = directory / "seeds"
        seeds.mkdir()
        for number, seed in enumerate(fuzzer.seeds()):
            (seeds / str(number)).write_bytes(seed)
        watch_reads(_fail)
        arguments = [sys.argv[0], *_LIMITS, *sys.argv[1:]]
        if not any(Path(argument).is_file() for argument in sys.argv[1:]):
            arguments.append(str(seeds))
        atheris.Setup(arguments, fuzzer.try_out, custom_mutator=fuzzer.mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
