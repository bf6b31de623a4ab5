"""The quality tool at toy sizes: what it writes, and facts that its numbers must show."""

import json

import pytest
import torch

from runtime.cli import run_command
from tools import attention_quality
from tools.attention_quality import Inputs, covered_mass, drawn_inputs, lowest, measure, orders


def test_writes_points_and_a_plot(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(attention_quality, "ROUNDS", (1, 4))
    monkeypatch.setattr(attention_quality, "CLUSTERS", (2, 4))
    arguments = ["--out", str(tmp_path / "quality"), "--q-length", "64", "--k-length", "16", "--seeds", "1"]
    assert run_command(attention_quality.main, arguments) == 0
    record = json.loads((tmp_path / "quality.json").read_text())
    points = [dict(zip(record["columns"], row, strict=True)) for row in record["points"]]
    assert {point["inputs"] for point in points} == {"gaussian", "32 clouds"}
    assert {(point["num_hashes"], point["num_clusters"]) for point in points} == {(1, 2), (4, 2), (1, 4), (4, 4)}
    assert all(0 < point["covered"] <= 1 and point["error"] > 0 for point in points)
    assert (tmp_path / "quality.png").stat().st_size > 10_000


def test_a_union_of_everything_is_exact():
    """Two opposite halves a round, in all pairings: every query meets every key."""
    q, k, v = (torch.randn(1, 1, 8, 4) for _ in "qkv")
    inputs = Inputs("toy", q, k, v, 1.0)
    tokens = torch.arange(8)
    q_order = torch.stack([tokens, tokens.roll(4)])[:, None, None]
    k_order = tokens.expand(2, 1, 1, -1)
    assert covered_mass(inputs, q_order, k_order, 2) == pytest.approx(1.0)
    assert covered_mass(inputs, q_order[:1], k_order[:1], 2) < 1.0


def test_a_union_and_a_tree_are_nearer_to_dense():
    inputs = drawn_inputs(512, 128)[1]
    multiset, union = measure(inputs, "xbox+", "e2lsh", 8, 8, seeds=2)
    tree = measure(inputs, "none", "rp-tree", 8, 8, seeds=2)[1]
    assert union.error < multiset.error and union.compute == multiset.compute == 1.0
    assert tree.error < 0.6 * union.error and tree.covered > union.covered


def test_orders_are_drawn_by_seed():
    inputs = drawn_inputs(64, 32)[0]
    first, again, other = (orders(inputs, "none", "rp-tree", 2, 4, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_lowest_keeps_what_no_cheaper_point_beats():
    def point(compute, error):
        return attention_quality.Point("", "", "", "", 1, 1, compute, 1.0, error)

    assert lowest([point(2, 0.3), point(1, 0.5), point(1, 0.4), point(3, 0.35)]) == [(1, 0.4), (2, 0.3)]
