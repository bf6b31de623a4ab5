"""The cluster pictures: the right tokens get the right colours, by a computation of its own."""

import numpy as np
import pytest
import torch
from small_gan import save_gan

from attention import SmyrfAttention
from attention.smyrf.clusters import cluster_orders
from biggan.data import draw_face
from runtime.cli import run_command
from tools import visualize_clusters
from tools.attention_layers import Layer
from tools.visualize_clusters import cluster_colours, cluster_labels, find_clusters, membership, paint


def labels_by_counting(values, cluster_size):
    """A token's cluster: how many tokens have a smaller hash value, over the cluster size."""
    return np.array([np.sum(values < value) // cluster_size for value in values])


def test_labels_are_of_the_tokens_and_not_of_the_ranks():
    torch.manual_seed(0)
    q, k, projections = torch.randn(1, 1, 64, 6), torch.randn(1, 1, 16, 6), torch.randn(8, 3)
    q_order, k_order = cluster_orders(q, k, projections, 16, 4)
    # XBOX+ (Daras et al. 2020, Eq. 1), in float64: a coordinate each for q and k that makes all norms equal.
    q64, k64, directions = q[0, 0].double().numpy(), k[0, 0].double().numpy(), projections.double().numpy()
    bound = np.square(q64).sum(1).max() + np.square(k64).sum(1).max()
    for x, order, size, last in ((q64, q_order, 16, 7), (k64, k_order, 4, 6)):
        hashed = x @ directions[:6] + np.sqrt(bound - np.square(x).sum(1))[:, None] * directions[last]
        expected = np.stack([labels_by_counting(hashed[:, r], size) for r in range(3)])
        found = cluster_labels(order[:, 0, 0], size).numpy()
        np.testing.assert_array_equal(found, expected)
        assert (order[:, 0, 0].numpy() // size != expected).mean() > 0.3  # what labelling the order itself would give


def test_each_pixel_gets_the_colour_of_its_token():
    image = torch.full((3, 8, 8), 255, dtype=torch.uint8)
    labels = torch.arange(16) % 3
    painted = paint(image, labels, 3)
    assert painted.shape == (8, 8, 3)
    colours = cluster_colours(3)
    for row in range(8):
        for column in range(8):
            token = (row // 2) * 4 + column // 2
            np.testing.assert_allclose(painted[row, column], 0.35 + 0.65 * colours[token % 3])


def test_membership_shows_who_meets():
    q_labels, k_labels = torch.tensor([0, 1, 1, 0]), torch.tensor([1, 0])
    matrix = membership(q_labels, k_labels, 2)
    assert (matrix[[0, 1, 2, 3], [0, 1, 1, 0]] == 1).all()  # white
    np.testing.assert_array_equal(matrix[[0, 3], [1, 1]], cluster_colours(2)[[0, 0]])
    np.testing.assert_array_equal(matrix[[1, 2], [0, 0]], cluster_colours(2)[[1, 1]])


def test_a_layer_of_smyrf_shows_the_clusters_that_it_used():
    torch.manual_seed(0)
    q, k, v, directions = (
        torch.randn(1, 1, 64, 6),
        torch.randn(1, 1, 16, 6),
        torch.randn(1, 1, 16, 4),
        torch.randn(8, 1),
    )
    smyrf = SmyrfAttention(1, 16, 4)
    layer = Layer("", smyrf, q, k, 8, directions, smyrf)
    q_labels, k_labels, num_clusters = find_clusters(layer, {}, seed=0)
    assert num_clusters == 4
    met = q_labels[0][:, None] == k_labels[0][None, :]
    weights = torch.softmax((q[0, 0] @ k[0, 0].T / 6**0.5).masked_fill(~met, -torch.inf), dim=-1)
    torch.testing.assert_close(weights @ v[0, 0], smyrf(q, k, v, projections=directions)[0, 0], atol=1e-5, rtol=1e-5)
    other = find_clusters(layer, {"num_hashes": 3, "hashing": "rp-tree"}, seed=0)[0]
    assert other.shape == (3, 64) and (torch.bincount(other[0]) == 16).all()


@pytest.mark.parametrize("source", ["demo", "generated", "image"])
def test_pictures(tmp_path, source):
    pytest.importorskip("matplotlib")
    from PIL import Image

    out, face = tmp_path / "new" / "clusters.png", tmp_path / "face.png"
    Image.fromarray(draw_face(1).transpose(1, 2, 0)).save(face)
    arguments = ["--demo"] if source == "demo" else ["--checkpoint", str(save_gan(tmp_path / "gan.pt", "smyrf"))]
    arguments += ["--image", str(face)] if source == "image" else []
    assert run_command(visualize_clusters.main, [*arguments, "--out", str(out)]) == 0
    assert min(Image.open(out).size) > 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.png"], "one of the arguments --checkpoint --demo is required"),
        (["--demo", "--out", "x.jpg"], "must end in .png"),
        (["--demo", "--out", "x.png", "--image", "nowhere.png"], "nowhere.png: No such file"),
        (["--demo", "--out", "x.png", "--image", __file__], "not an image"),
        (["--demo", "--out", "x.png", "--attention.num-hash", "3"], "num_hash"),
        (["--demo", "--out", "x.png", "--attention.q-cluster-size", "100"], "numbers must be equal"),
        (["--demo", "--out", "x.png", "--sed", "3"], "did you mean --seed"),
        (["--checkpoint", __file__, "--out", "x.png"], "test_visualize_clusters.py"),
        (["--checkpoint", "nowhere", "--out", "x.png"], "nowhere"),
        (["--checkpoint", "GAN", "--layer", "8", "--out", "x.png"], "--layer 8: attention is at 16"),
        (["--checkpoint", "GAN", "--class", "1", "--out", "x.png"], "classes 0 to 0"),
        (["--checkpoint", "PLAIN", "--out", "x.png"], "has no attention"),
    ],
)
def test_mistakes_are_named(tmp_path, arguments, message, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    if "GAN" in arguments:
        save_gan(tmp_path / "GAN")
    if "PLAIN" in arguments:
        save_gan(tmp_path / "PLAIN", resolutions=())
    assert run_command(visualize_clusters.main, arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
