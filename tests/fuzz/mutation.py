# SPDX-License-Identifier: Apache-2.0
"""What a case does to an image: written down, so that it can be shown and done again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from tests.fuzz.anatomy import Anatomy, Target

EVIL_NAMES: Final = (
    b"/etc/passwd",
    b"../outside",
    b"json:{}",
    b"nbd://localhost/x",
    b"top",
    b"base",
    b".",
    b"/dev/zero",
    b"/proc/self/mem",
    b"\x1b[2J",
    b"\xff\xfe",
)
_FLAGS: Final = (0, 1 << 63, 1 << 62, 3 << 62, 1)


def mutate(content: bytes, anatomy: Anatomy, chance: random.Random) -> tuple[bytes, list[str]]:
    """A damaged copy of a sound image, and what was done, in words."""
    image = bytearray(content)
    said: list[str] = []
    for _ in range(chance.choices((1, 2, 3, 4, 12), (50, 20, 10, 10, 10))[0]):
        change = chance.choices(tuple(_CHANGES), tuple(_CHANGES.values()))[0]
        said.append(change(image, anatomy, chance))
    return bytes(image), said


def _aim(anatomy: Anatomy, chance: random.Random) -> Target:
    """A target of any kind, each as likely, however many targets it has."""
    return chance.choice(anatomy.targets[chance.choice(sorted(anatomy.targets))])


def _put(image: bytearray, target: Target, value: int) -> str:
    width = target.width
    value &= (1 << 8 * width) - 1
    image[target.offset : target.offset + width] = value.to_bytes(width)
    return f"{target.kind} at {target.offset:#x} = {value:#x}"


def _get(image: bytearray, target: Target) -> int:
    return int.from_bytes(image[target.offset : target.offset + target.width])


def _telling_number(image: bytearray, anatomy: Anatomy, chance: random.Random) -> str:
    """A number at the edge of something."""
    target = _aim(anatomy, chance)
    bits = 8 * target.width
    edge = 1 << chance.randrange(bits)
    value = chance.choice(
        (0, 1, edge, edge - 1, edge + 1, (1 << bits) - 1, (1 << bits) - edge, chance.randrange(40))
    )
    return _put(image, target, value)


def _place(image: bytearray, anatomy: Anatomy, chance: random.Random) -> str:
    """An offset that leads somewhere: to another table, to the end of the file, to itself."""
    target = _aim(anatomy, chance)
    cluster = anatomy.cluster_size
    clusters = anatomy.size // cluster
    places = (
        chance.choice(anatomy.landmarks),
        chance.choice(anatomy.landmarks) + chance.choice((8, 512, cluster, -cluster)),
        target.offset // cluster * cluster,
        anatomy.size // cluster * cluster,
        (clusters + chance.randrange(4)) * cluster,
        chance.randrange(clusters + 1) * cluster,
        chance.randrange(anatomy.size),
        (1 << chance.randrange(9, 63)) // cluster * cluster,
    )
    return _put(image, target, chance.choice(places) | chance.choice(_FLAGS))


def _small_step(image: bytearray, anatomy: Anatomy, chance: random.Random) -> str:
    """A bit turned, or a number a little off."""
    target = _aim(anatomy, chance)
    value = _get(image, target)
    step = chance.choice((1, -1, 8, 512, anatomy.cluster_size, -anatomy.cluster_size))
    bit = 1 << chance.randrange(8 * target.width)
    return _put(image, target, chance.choice((value ^ bit, value + step)))


def _another_of_its_kind(image: bytearray, anatomy: Anatomy, chance: random.Random) -> str:
    target = _aim(anatomy, chance)
    other = chance.choice(anatomy.targets[target.kind])
    return _put(image, target, _get(image, other))


def _noise(image: bytearray, anatomy: Anatomy, chance: random.Random) -> str:
    target = _aim(anatomy, chance)
    length = chance.choice((1, 8, 64, 512))
    data = chance.choice((chance.randbytes(length), bytes(length), b"\xff" * length))
    end = min(target.offset + length, len(image))
    image[target.offset : end] = data[: end - target.offset]
    return f"{length} bytes of noise on {target.kind} at {target.offset:#x}"


def _cluster_over_another(image: bytearray, anatomy: Anatomy, chance: random.Random) -> str:
    cluster = anatomy.cluster_size
    source, target = (chance.choice(anatomy.landmarks) // cluster * cluster for _ in range(2))
    data = image[source : source + cluster]
    image[target : target + len(data)] = data
    return f"the cluster at {source:#x} over the one at {target:#x}"


def _another_length(image: bytearray, anatomy: Anatomy, chance: random.Random) -> str:
    place = _aim(anatomy, chance).offset
    end = chance.choice(
        (
            place,
            place + chance.randrange(-9, 9),
            chance.randrange(len(image) + 1),
            len(image) + chance.choice((1, 512, anatomy.cluster_size)),
        )
    )
    end = max(0, end)
    image[end:] = bytes(max(0, end - len(image)))
    return f"{end} bytes long"


def _evil_name(image: bytearray, anatomy: Anatomy, chance: random.Random) -> str:
    offset = int.from_bytes(image[8:16])
    name = chance.choice(EVIL_NAMES)
    if not 0 < offset < anatomy.cluster_size - len(name) or offset + len(name) > len(image):
        return _telling_number(image, anatomy, chance)
    image[offset : offset + len(name)] = name
    image[16:20] = len(name).to_bytes(4)
    return f"named {name!r} as its backing file"


_CHANGES: Final[dict[Callable[[bytearray, Anatomy, random.Random], str], int]] = {
    _telling_number: 24,
    _place: 24,
    _small_step: 20,
    _another_of_its_kind: 10,
    _noise: 8,
    _cluster_over_another: 5,
    _another_length: 5,
    _evil_name: 2,
}
