"""The attention maps of chosen pixels: the right query, the right keys, and weights that are those of the mechanism."""

import pytest
import torch
from small_gan import save_gan

from attention import SmyrfAttention, dense_attention
from biggan.checkpoints import load_generator
from runtime.cli import run_command
from runtime.errors import UserError
from tools import visualize_attention
from tools.attention_layers import Layer, recorded
from tools.visualize_attention import dense_twin, parse_pixels, pixel_maps


def test_a_pixel_looks_at_the_key_that_matches_it():
    """8x8 queries, 4x4 keys: key j is the unit vector j, and the query of a pixel asks for one key."""
    k = torch.eye(16)[None, None]
    wanted = torch.randint(16, (64,), generator=torch.Generator().manual_seed(0))
    q = 50 * torch.eye(16)[wanted][None, None]
    layer = dense_twin(Layer("", torch.nn.Identity(), q, k, 8, None, torch.nn.Identity()))
    pixels = [(0, 0), (31, 5), (12, 30)]
    maps = pixel_maps(layer, pixels, 32)
    for (column, row), weights in zip(pixels, maps, strict=True):
        key = wanted[(row // 4) * 8 + column // 4].item()
        assert weights[key // 4, key % 4] > 0.99


@pytest.mark.parametrize("name", ["dense", "smyrf"])
def test_maps_are_what_the_mechanism_weighs_its_values_by(name, tmp_path):
    generator, _ = load_generator(save_gan(tmp_path / "gan.pt", name))
    block = generator.blocks[1].attention
    calls = []
    block.attention.register_forward_hook(lambda module, inputs, out: calls.append((*inputs, out)))
    if name == "smyrf":
        block.attention.projections = torch.randn(block.attention.projection_shape(256, 64, block.theta.out_channels))
    with torch.no_grad(), recorded({"layer": (block.attention, 16)}) as layers:
        generator(torch.randn(2, generator.dim_z), torch.zeros(2, dtype=torch.int64))
    block.attention.projections = None
    q, k, v, out = calls[0]
    weights = layers[0].map()
    assert weights.shape == (2, 1, 256, 64)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 1, 256), atol=1e-5, rtol=0)
    torch.testing.assert_close(weights @ v, out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layers[0].map(torch.tensor([200, 3])), weights[:, :, [200, 3]])
    if name == "smyrf":
        assert isinstance(layers[0].mechanism, SmyrfAttention)
        torch.testing.assert_close(dense_twin(layers[0]).map() @ v, dense_attention(q, k, v, 1.0), atol=1e-5, rtol=1e-5)


def test_pixels():
    assert parse_pixels(["3,17", "0,0"], 32) == [(3, 17), (0, 0)]
    assert all(0 <= x < 32 for pixel in parse_pixels(None, 32) for x in pixel)
    for text, message in (
        ("32,0", "numbered from 0"),
        ("-1,0", "numbered from 0"),
        ("3", "COLUMN,ROW"),
        ("a,b", "a,b"),
    ):
        with pytest.raises(UserError, match=message):
            parse_pixels([text], 32)


def test_picture_and_mistakes(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    gan, out = str(save_gan(tmp_path / "gan.pt", "smyrf")), tmp_path / "maps.png"
    command = ["--checkpoint", gan, "--out", str(out)]
    assert run_command(visualize_attention.main, [*command, "--pixels", "3,17", "30,2"]) == 0
    assert Image.open(out).size[0] > Image.open(out).size[1] > 400  # three columns, two rows
    for more, message in (
        (["--pixels", "3,32"], "32 columns and rows"),
        (["--attention", "hrr"], "these can: dense"),
        (["--attention", "densee"], "densee"),
        (["--layer", "64"], "attention is at 16"),
    ):
        assert run_command(visualize_attention.main, [*command, *more]) == 2
        assert message in capsys.readouterr().err
