"""Files of the sequence tasks that hypothesis draws: readers give what was written, or the number of a line."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrrformer.packed import read_packed, write_packed
from hrrformer.tasks import get_task
from hrrformer.tasks.files import count_lines, lines
from hrrformer.tasks.listops_vocabulary import OPERATORS, VOCABULARY, tokenise
from runtime.errors import UserError

NUMBERS = [40, pytest.param(2000, marks=pytest.mark.slow)]
TREES = st.recursive(
    st.sampled_from("0123456789"),
    lambda inner: st.tuples(st.sampled_from(OPERATORS), st.lists(inner, min_size=1, max_size=5)).map(
        lambda tree: " ".join([tree[0], *tree[1], "]"])
    ),
    max_leaves=30,
)
CELL = st.binary(max_size=30).map(lambda data: re.sub(rb"[\t\r\n]", b" ", data))


def cases(number):
    return settings(max_examples=number, deadline=None, derandomize=True)


def read(task, folder, length=64):
    source = get_task(task).open(folder, length)
    return [example for split in source.sizes for example in source.read(split, 1)]


def write_all(folder, names, data):
    for name in names:
        (folder / name).write_bytes(data)


LISTOPS = ("basic_train.tsv", "basic_val.tsv", "basic_test.tsv")
RETRIEVAL = [f"new_aan_pairs.{split}.tsv" for split in ("train", "eval", "test")]


@pytest.mark.parametrize("number", NUMBERS)
def test_trees_of_listops(tmp_path, number):
    @given(st.lists(st.tuples(TREES, st.integers(0, 9), st.booleans()), min_size=1, max_size=5))
    @cases(number)
    def check(trees):
        rows = [(f"( {text} )" if brackets else text, value) for text, value, brackets in trees]
        write_all(tmp_path, LISTOPS, "".join(["Source\tTarget\n", *(f"{a}\t{b}\n" for a, b in rows)]).encode())
        found = read("listops", tmp_path, 10**6)
        expected = [[VOCABULARY.index("X" if word == "]" else word) for word in text.split()] for text, _, _ in trees]
        assert [list(inputs[0]) for inputs, _ in found] == expected * 3
        assert [label for _, label in found] == [value for _, value, _ in trees] * 3

    check()


@pytest.mark.parametrize("number", NUMBERS)
def test_any_text_is_tokens_or_a_token_that_is_named(number):
    pieces = st.sampled_from([*OPERATORS, "]", "(", ")", "0", "9", " ", "  ", "[", "X", "é"]) | st.text(max_size=3)

    @given(st.lists(pieces, max_size=30).map(" ".join))
    @cases(number)
    def check(text):
        try:
            found = tokenise(text.encode())
        except ValueError as error:
            assert "unknown token" in str(error)
        else:
            assert len(found) == len([word for word in text.split() if word not in "()"]) and set(found) <= {
                *range(2, 17)
            }

    check()


@pytest.mark.parametrize("number", NUMBERS)
def test_pairs_of_retrieval(tmp_path, number):
    @given(st.lists(st.tuples(st.integers(0, 1), CELL, CELL), min_size=1, max_size=5))
    @cases(number)
    def check(pairs):
        rows = [b"%d.0\tid\tid\t%b\t%b.\n" % pair for pair in pairs]
        write_all(tmp_path, RETRIEVAL, b"".join(rows))
        expected = [((one[:64], (other + b".")[:64]), label) for label, one, other in pairs]
        assert read("retrieval", tmp_path) == expected * 3

    check()


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(("task", "names"), [("listops", LISTOPS), ("retrieval", RETRIEVAL)])
def test_any_bytes_are_examples_or_the_number_of_a_line(tmp_path, task, names, number):
    parts = [b"Source\tTarget\n", b"[MAX 3 4 ]\t4\n", b"1.0\ta\tb\tc\td\n", b"\t", b"\n", b"\r\n", b"nan", b"\0"]

    @given(st.lists(st.sampled_from(parts) | st.binary(max_size=12), max_size=12).map(b"".join))
    @cases(number)
    def check(data):
        write_all(tmp_path, names, data)
        try:
            found = read(task, tmp_path)
        except UserError as error:
            assert re.search(r"\.tsv, line \d+: ", str(error)) and "\n" not in str(error)
        else:
            assert all(label in range(10) and all(len(text) <= 64 for text in inputs) for inputs, label in found)

    check()


@pytest.mark.parametrize("number", NUMBERS)
def test_lines_are_counted_as_they_are_read(tmp_path, number):
    @given(st.binary(max_size=60) | st.lists(st.sampled_from([b"a", b"\n", b"\r\n"]), max_size=20).map(b"".join))
    @cases(number)
    def check(data):
        (tmp_path / "a.tsv").write_bytes(data)
        found = list(lines(tmp_path / "a.tsv"))
        assert [number for number, _ in found] == list(range(1, len(found) + 1))
        assert len(found) - count_lines(tmp_path / "a.tsv") == int(bool(data) and not data.endswith(b"\n"))

    check()


@pytest.mark.parametrize("number", NUMBERS)
def test_packed_files_hold_what_was_written(tmp_path, number):
    path = tmp_path / "p.safetensors"
    examples = st.lists(st.tuples(st.tuples(st.binary(max_size=20)), st.integers(0, 1)), min_size=1, max_size=8)
    about = {"task": "t", "max_length": 20, "first_id": 1, "class_names": ("a", "b"), "source": "s", "fingerprint": "f"}

    @given(examples, st.none() | examples, st.data())
    @cases(number)
    def check(train, test, data):
        splits = {"train": train} | ({} if test is None else {"test": test})
        write_packed(path, splits, about)
        packed = read_packed(path)
        for name, wanted in splits.items():
            split = packed.splits[name]
            texts, start = [], 0
            for length in split.lengths[:, 0]:
                texts.append(split.symbols[start : start + length].tobytes())
                start += length
            assert texts == [inputs[0] for inputs, _ in wanted] and split.labels.tolist() == [b for _, b in wanted]
        path.write_bytes(path.read_bytes()[: data.draw(st.integers(0, path.stat().st_size - 1))])
        with pytest.raises(UserError, match="damaged or cut short"):
            read_packed(path)

    check()
