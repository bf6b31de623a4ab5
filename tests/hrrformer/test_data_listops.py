"""ListOps: trees against a plain evaluation and the published procedure; files and their errors."""

import random
from itertools import islice
from statistics import median

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrrformer.data import open_task
from hrrformer.tasks import listops_trees
from hrrformer.tasks.listops_trees import generate_trees, symbols, text
from hrrformer.tasks.listops_vocabulary import VOCABULARY, tokenise
from runtime.errors import UserError


def evaluate(expression):
    """The value of an expression in the form of the files, by a stack."""
    stack = [[]]
    for token in expression.replace("(", "").replace(")", "").split():
        if token == "]":
            operator, *values = stack.pop()
            functions = {"[MIN": min, "[MAX": max, "[MED": lambda v: int(median(v)), "[SM": lambda v: sum(v) % 10}
            stack[-1].append(functions[operator](values))
        elif token.startswith("["):
            stack.append([token])
        else:
            stack[-1].append(int(token))
    (value,) = stack[0]
    return value


def nested(expression):
    """The tokens of an expression, after checking that its parentheses are those of left-leaning pairs."""
    tokens = expression.split()

    def pair(at):  # the place after the term that starts at `at`
        if tokens[at] != "(":
            assert tokens[at] not in ")]"
            return at + 1
        end = pair(at + 1)
        end = end + 1 if tokens[end] == "]" else pair(end)
        assert tokens[end] == ")"
        return end + 1

    assert pair(0) == len(tokens)
    return [token for token in tokens if token not in "()"]


def plain_size(depth=1):
    """Tokens of a random tree, by recursion."""
    if depth == 10 or random.random() > 0.25:
        return 1
    return 2 + sum(plain_size(depth + 1) for _ in range(random.randint(2, 10)))


def test_values_and_text_of_generated_trees():
    for codes, value in generate_trees(60, seed=0):
        expression = text(codes)
        assert evaluate(expression) == value
        assert 500 < len(codes) < 2000 and len(nested(expression)) == len(codes)
        assert tokenise(expression.encode()) == symbols(codes)


def test_lengths_are_distributed_as_the_recursive_procedure_says():
    random.seed(0)
    plain = [size for size in (plain_size() for _ in range(4096)) if 20 < size < 500]
    ours = [len(codes) for codes, _ in listops_trees._accepted(0, 20, 500, 0)]  # of 4096 candidates
    assert listops_trees._CANDIDATES == 4096 and abs(len(ours) - len(plain)) < 4 * (2 * len(plain)) ** 0.5
    assert abs(np.mean(ours) - np.mean(plain)) < 4 * np.std(plain) * (2 / len(plain)) ** 0.5


def test_arguments_operators_and_digits_are_uniform():
    codes = np.frombuffer(b"".join(codes for codes, _ in generate_trees(400, 1)), dtype=np.uint8)
    inner = codes[codes >= 16] - 16
    for values, count in ((codes[codes < 10], 10), (inner // 16, 4), (inner % 16 - 2, 9)):
        shares = np.bincount(values, minlength=count) / len(values)
        assert len(shares) == count and np.abs(shares * count - 1).max() < 0.1


def test_a_seed_gives_the_same_trees_whoever_computes_them():
    one = list(generate_trees(400, seed=5, workers=1))
    assert list(generate_trees(400, seed=5, workers=2)) == one
    assert list(islice(generate_trees(500, seed=5), 400)) == one
    assert len({codes for codes, _ in one}) == 400
    assert list(generate_trees(1, seed=6)) != one[:1]


def test_bounds_that_leave_too_few_trees():
    with pytest.raises(UserError, match="more than 1998 and fewer than 1999"):
        list(generate_trees(1, 0, 1998, 1999))
    with pytest.raises(UserError, match="the least length must be above 0"):
        list(generate_trees(1, 0, 0, 20))
    assert nested(text(next(generate_trees(1, 0, 1, 6))[0]))


def test_the_vocabulary_is_fixed():
    assert VOCABULARY[2:] == ("[MIN", "[MAX", "[MED", "[SM", "X", *"0123456789") and len(VOCABULARY) == 17
    expression = b"( ( ( [MAX 3 ) ( ( ( [SM 4 ) 9 ) ] ) ) ] )"
    assert [VOCABULARY[i] for i in tokenise(expression)] == ["[MAX", "3", "[SM", "4", "9", "X", "X"]
    assert tokenise(b"7") == bytes([VOCABULARY.index("7")])


@given(st.lists(st.sampled_from(["(", ")", "[MIN", "[MAX", "[MED", "[SM", "]", *"0123456789"]), min_size=1))
@settings(max_examples=200, deadline=None)
def test_whole_strings_are_read_as_token_by_token(tokens):
    expected = bytes(VOCABULARY.index("X" if token == "]" else token) for token in tokens if token not in "()")
    assert tokenise(" ".join(tokens).encode()) == tokenise("  ".join(tokens).encode()) == expected


@pytest.mark.parametrize("token", ["[AVG", "12", "[MAX3", "x", "\x02", "[M AX", "\x80", "]]", "3)"])
def test_an_unknown_token_is_named(token):
    with pytest.raises(ValueError, match="unknown token"):
        tokenise(f"( ( [MAX {token} ) ] )".encode("latin1"))


@pytest.fixture
def folder(tmp_path):
    """The three files, 40, 10 and 10 rows."""
    trees = generate_trees(60, 0, 5, 60)
    for name, count in (("train", 40), ("val", 10), ("test", 10)):
        rows = [f"{text(codes)}\t{value}\n" for codes, value in islice(trees, count)]
        labels = "".join(f"{digit}\t{digit}\n" for digit in range(10))  # each class once
        (tmp_path / f"basic_{name}.tsv").write_text("Source\tTarget\n" + labels + "".join(rows))
    return tmp_path


def test_files_become_tokens(folder, tmp_path):
    data = open_task("listops", str(folder), cache_dir=tmp_path / "cache", progress=False)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [50, 20, 20]
    codes, value = next(generate_trees(1, 0, 5, 60))
    assert data.train.rows([10], len(codes) + 1)[0].tolist() == [*symbols(codes), 0]
    assert data.train.labels[10] == value and data.vocab_size == 17
    assert data.test.lengths.max() < 60
    short = open_task("listops", str(folder), 10, tmp_path / "cache", progress=False)
    assert short.train.rows([10], 10)[0].tolist() == list(symbols(codes)[:10])


def test_the_folder_of_the_release_is_found(folder, tmp_path):
    release = tmp_path / "release" / "lra_release" / "listops-1000"
    release.mkdir(parents=True)
    for file in folder.glob("*.tsv"):
        file.rename(release / file.name)
    data = open_task("listops", str(tmp_path / "release"), cache_dir=tmp_path / "cache", progress=False)
    assert len(data.train) == 50


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            "( ( ( [MAX 3 ) 4 ) ] ) 4",
            r"basic_val.tsv, line 5: expected an expression, a tab and a digit, found '\( \( ",
        ),
        ("3\t10", "line 5: expected an expression, a tab and a digit"),
        ("3\t3\t3", "line 5: expected"),
        ("", "line 5: expected"),
        (" \t1", "line 5: expected"),
        ("( ( [AVG 3 ) ] )\t3", r"line 5: unknown token '\[AVG'; the vocabulary is \[MIN"),
    ],
)
def test_a_bad_row_is_named_by_its_line(folder, tmp_path, row, message):
    file = folder / "basic_val.tsv"
    rows = file.read_text().splitlines()
    rows[4] = row
    file.write_text("\n".join(rows) + "\n")
    with pytest.raises(UserError, match=message):
        open_task("listops", str(folder), cache_dir=tmp_path / "cache", progress=False)


def test_missing_files_and_headers(folder, tmp_path):
    (folder / "basic_test.tsv").write_text("3\t3\n")
    with pytest.raises(UserError, match="line 1: expected the header Source, tab, Target"):
        open_task("listops", str(folder), cache_dir=tmp_path / "cache", progress=False)
    (folder / "basic_test.tsv").unlink()
    with pytest.raises(UserError, match="has no basic_test.tsv. Needed: .*prepare_lra listops"):
        open_task("listops", str(folder), cache_dir=tmp_path / "cache")
    with pytest.raises(UserError, match="found no basic_train.tsv in .* nor in its folders listops-1000"):
        open_task("listops", str(tmp_path / ".."), cache_dir=tmp_path / "cache")
