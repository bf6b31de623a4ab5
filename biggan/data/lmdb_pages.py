"""Where the values of an LMDB lie in its file.

LMDB's own library maps the file and follows its page numbers unchecked: of files with a few changed bytes, one in some
hundred ends the process by SIGBUS, and a file that was cut short does so too. This walks the tree of pages by plain
reads, every number checked. It reads version 1 of the format, 64 bits, little-endian, and its unnamed database.

    page    number u64, pad u16, flags u16, lower u16, upper u16; (lower - 16) / 2 places of nodes, u16
    meta    page, magic u32, version u32, address u64, map size u64, two databases, last page u64, transaction u64
    database page size (of the first) u32, flags u16, depth u16, 3 counts of pages u64, entries u64, root u64
    node    low u16, high u16, flags u16, key size u16, key, value
            in a branch low, high and flags are the number of the page below; in a leaf low and high are the size of the
            value, which follows the key, or, with flag 1, is on pages of its own, whose number follows the key

Source: https://github.com/LMDB/lmdb, libraries/liblmdb/mdb.c, "struct MDB_page", "MDB_meta", "MDB_db", "MDB_node".
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MAGIC = b"\xde\xc0\xef\xbe"
MAGIC_AT = 16
_HEADER = struct.Struct("<QHHHH")
_META = struct.Struct("<4sIQQ IHH5Q IHH5Q QQ")
_NODE = struct.Struct("<HHHH")
_BRANCH, _LEAF = 1, 2
_ON_OWN_PAGES, _ORDINARY = 1, 0
_EMPTY = (1 << 64) - 1
_MAX_DEPTH = 32


class DamagedPages(Exception):
    """Pages that are no LMDB; the text says which."""


def lmdb_values(path: Path) -> Iterator[tuple[bytes, int, int]]:
    """Key, place and size of each value, in the order of the keys; values that are databases are passed over.

    Raises:
        DamagedPages: pages that contradict each other or the size of the file.
    """
    with path.open("rb") as file:
        page_size, entries, root = _newest_meta(file)
        found = 0
        for entry in _walk(file, page_size, root) if root != _EMPTY else ():
            found += 1
            if entry is not None:
                yield entry
        if found != entries:
            raise DamagedPages(f"{found:,} keys where there should be {entries:,}")


def lmdb_entries(path: Path) -> int:
    """How many keys it says to have.

    Raises:
        DamagedPages: as above.
    """
    with path.open("rb") as file:
        return _newest_meta(file)[1]


def _newest_meta(file: BinaryIO) -> tuple[int, int, int]:
    """Page size, number of entries and root page; of two metas the one of the later transaction."""
    metas = [_meta(file, 0)]
    if metas[0]:
        metas.append(_meta(file, metas[0][1]))
    valid = [meta for meta in metas if meta]
    if not valid:
        raise DamagedPages("no meta page")
    _, page_size, entries, root = max(valid)
    return page_size, entries, root


def _meta(file: BinaryIO, place: int) -> tuple[int, int, int, int] | None:
    file.seek(place + _HEADER.size)
    data = file.read(_META.size)
    if len(data) < _META.size:
        return None
    fields = _META.unpack(data)
    page_size, entries, root, transaction = fields[4], fields[18], fields[19], fields[21]
    if fields[:2] != (MAGIC, 1) or page_size not in (1 << bits for bits in range(8, 17)):
        return None
    return transaction, page_size, entries, root


def _walk(file: BinaryIO, page_size: int, root: int) -> Iterator[tuple[bytes, int, int] | None]:
    """The nodes of all leaves, from left to right."""
    waiting, seen, size = [(root, 1)], set(), file.seek(0, os.SEEK_END)
    while waiting:
        number, depth = waiting.pop()
        if number in seen or depth > _MAX_DEPTH:
            raise DamagedPages(f"page {number} is reached twice")
        seen.add(number)
        if (number + 1) * page_size > size:
            raise DamagedPages(f"page {number} is missing")
        file.seek(number * page_size)
        page = file.read(page_size)
        own_number, _, flags, lower, upper = _HEADER.unpack_from(page)
        if own_number != number or flags & 3 not in (_BRANCH, _LEAF) or not _HEADER.size <= lower <= upper <= page_size:
            raise DamagedPages(f"page {number} is none")
        places = struct.unpack_from(f"<{(lower - _HEADER.size) // 2}H", page, _HEADER.size)
        if flags & 3 == _BRANCH:
            waiting += [(_below(page, place), depth + 1) for place in reversed(places)]
        else:
            for place in places:
                yield _leaf(page, place, number, page_size)


def _node(page: bytes, place: int) -> tuple[int, int, int, int]:
    if place + _NODE.size > len(page):
        raise DamagedPages(f"a node at {place}")
    return _NODE.unpack_from(page, place)


def _below(page: bytes, place: int) -> int:
    low, high, flags, _ = _node(page, place)
    return low | high << 16 | flags << 32


def _leaf(page: bytes, place: int, number: int, page_size: int) -> tuple[bytes, int, int] | None:
    low, high, flags, key_size = _node(page, place)
    start, size = place + _NODE.size + key_size, low | high << 16
    key = page[place + _NODE.size : start]
    if start + (8 if flags == _ON_OWN_PAGES else size) > len(page):
        raise DamagedPages(f"a value on page {number}")
    if flags == _ON_OWN_PAGES:
        (first,) = struct.unpack_from("<Q", page, start)
        return key, first * page_size + _HEADER.size, size
    return (key, number * page_size + start, size) if flags == _ORDINARY else None
