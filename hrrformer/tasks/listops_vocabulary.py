"""The 17 token ids of ListOps, in a fixed order, and the way from the text of a file to ids.

Parentheses only show the original's binary trees and are left out; `]` is called X, as in the original.
"""

from __future__ import annotations

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
FIRST_OPERATOR, END, FIRST_DIGIT = 2, 6, 7
VOCABULARY = ("<pad>", "<unknown>", *OPERATORS, "X", *"0123456789")

_IDS = {token: index for index, token in enumerate(VOCABULARY) if index > 1} | {"]": END}
_MARKS = {operator.encode(): bytes([0x80 + index]) for index, operator in enumerate(OPERATORS)}
_BYTES = {token.encode(): index for token, index in _IDS.items() if len(token) == 1 and token != "X"}
_BYTES |= {mark: FIRST_OPERATOR + index for index, mark in enumerate(_MARKS.values())}
_TABLE = bytes(_BYTES.get(bytes([byte]), 0) for byte in range(256))


def tokenise(text: bytes) -> bytes:
    """`( ( ( [MAX 3 ) 4 ) ] )` -> the ids of `[MAX 3 4 X`, one byte each.

    Raises:
        ValueError: a token that is not in the vocabulary; the message names it.
    """
    marked = text
    for operator, mark in _MARKS.items():
        marked = marked.replace(operator, mark)
    # Every token is one byte now. Where single spaces part them all, the whole string can be translated at once.
    if text.isascii() and marked[1::2].count(b" ") == len(marked) // 2:
        symbols = marked[::2].translate(_TABLE, b"()")
        if 0 not in symbols:
            return symbols
    tokens = [token for token in text.decode("ascii", "replace").split() if token not in "()"]
    unknown = next((token for token in tokens if token not in _IDS), None)
    if unknown is not None:
        raise ValueError(f"unknown token {unknown!r}; the vocabulary is {' '.join(VOCABULARY[2:6])} ] and digits")
    return bytes(_IDS[token] for token in tokens)
