"""Damaged copies of files, each a function of (file, seed): what disks, networks and hands do to them, and worse."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

_EXTREMES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 60000, 1 << 20]


def mutate(data: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    """One to three changes, of which about a third hit the first 64 bytes or the last 128, where headers are."""
    for _ in range(rng.integers(1, 4)):
        data = _MUTATIONS[rng.integers(len(_MUTATIONS))](data, others, rng)
    return data


def mutated_copies(files: Sequence[bytes], seed: int, numbers: Iterable[int]) -> Iterator[tuple[int, int, bytes]]:
    """(number, which file, damaged copy), the files taken in turn."""
    for number in numbers:
        which = number % len(files)
        yield number, which, mutate(files[which], files, np.random.default_rng([seed, number]))


def _place(data: bytes, rng: np.random.Generator) -> int:
    region = rng.integers(6)
    if region == 0:
        return int(rng.integers(min(64, len(data) + 1)))
    if region == 1:
        return max(0, len(data) - 1 - int(rng.integers(128)))
    return int(rng.integers(len(data) + 1))


def _run(data: bytes, rng: np.random.Generator) -> tuple[int, int]:
    start = _place(data, rng)
    return start, min(len(data), start + int(2 ** rng.uniform(0, 9)))


def _flip_bits(data: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        place = _place(data, rng)
        if place < len(changed):
            changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _overwrite_with_zeros(data: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    start, end = _run(data, rng)
    return data[:start] + bytes(end - start) + data[end:]


def _overwrite_with_noise(data: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    start, end = _run(data, rng)
    return data[:start] + rng.bytes(end - start) + data[end:]


def _truncate(data: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    return data[: _place(data, rng)]


def _insert(data: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    place = _place(data, rng)
    return data[:place] + rng.bytes(int(2 ** rng.uniform(0, 9))) + data[place:]


def _delete(data: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    start, end = _run(data, rng)
    return data[:start] + data[end:]


def _repeat(data: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    start, end = _run(data, rng)
    return data[:end] + data[start:end] * int(rng.integers(1, 9)) + data[end:]


def _splice(data: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    other = others[rng.integers(len(others))]
    return data[: _place(data, rng)] + other[_place(other, rng) :]


def _set_number(data: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    """An extreme number in two, four or eight bytes, of either order: lengths, sizes and offsets."""
    width, order = int(2 ** rng.integers(1, 4)), ("little", "big")[rng.integers(2)]
    number = _EXTREMES[rng.integers(len(_EXTREMES))] % (1 << (8 * width))
    place = _place(data, rng)
    return data[:place] + number.to_bytes(width, order) + data[place + width :]


def _inside_zip(data: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    """A change within a member of a zip, which then has the right checksum and place; or a member twice, or none."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info, archive.read(info)) for info in archive.infolist()]
    except Exception:  # no zip, or no sound one any more
        return _flip_bits(data, others, rng)
    if not members:
        return data
    chosen, action = int(rng.integers(len(members))), rng.integers(6)
    if rng.integers(2):  # the small members hold the structure
        chosen = int(np.argsort([len(content) for _, content in members])[rng.integers(min(4, len(members)))])
    info, content = members[chosen]
    if action == 0:
        members.append((info, content[::-1]))
    elif action == 1:
        members.pop(chosen)
    else:
        members[chosen] = info, _PLAIN[rng.integers(len(_PLAIN))](content, others, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for info, content in members:
            fresh = zipfile.ZipInfo(info.filename.replace("\0", "0"), info.date_time)
            fresh.compress_type = info.compress_type
            archive.writestr(fresh, content)
    return out.getvalue()


_PLAIN = [
    *(_flip_bits, _flip_bits, _set_number, _set_number, _overwrite_with_zeros, _overwrite_with_noise),
    *(_truncate, _insert, _delete, _repeat, _splice),
]
_MUTATIONS = [*_PLAIN, _inside_zip, _inside_zip]
