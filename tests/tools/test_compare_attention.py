"""Sample sets under two mechanisms: distances with known answers, and the commands, down to recorded networks."""

import json

import pytest
import torch
from golden_support import GOLDEN_DIR, TOLERANCES, load
from small_gan import save_gan

from attention import SpatialAttention
from biggan.checkpoints import load_generator
from biggan.conversion import infer_generator
from biggan.generator import Generator
from runtime.cli import run_command
from tools import compare_attention, convert_biggan, memory_quality
from tools.memory_quality import Point, best_by_memory
from tools.sample_sets import Pixels, SampleSet, score_share

CLUSTERS = ["--attention.num-hashes", "2", "--attention.q-cluster-size", "64", "--attention.k-cluster-size", "16"]
RECORDING = GOLDEN_DIR / "gan_cond64_G.npz"


def random_images(count, seed):
    return torch.randint(256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_distances_with_known_answers():
    images, network = random_images(200, 0), Pixels()
    base = SampleSet(images, network)
    itself = base.distances(SampleSet(images.clone(), network))
    assert itself["relative_error"] == itself["grey_levels"] == 0 and itself["fd"] < 1e-6
    darker = base.distances(SampleSet(images // 2, network))
    unrelated = base.distances(SampleSet(random_images(200, 1), network))
    assert unrelated["relative_error"] == pytest.approx(2**0.5, rel=0.01)
    assert unrelated["grey_levels"] == pytest.approx(256 / 3, rel=0.01)  # of two uniform numbers below 256
    assert darker["grey_levels"] == pytest.approx(64, rel=0.01)
    # 192 means of four uniform colours move by a quarter, and their deviations halve.
    assert darker["fd"] == pytest.approx(192 * (0.25**2 + 1 / 12 / 4 / 4), rel=0.03)


def test_score_share(tmp_path):
    generator, _ = load_generator(save_gan(tmp_path / "gan.pt", "smyrf", resolutions=(16, 32)))
    # Layer 16: 2 rounds of 16 of 64 keys; layer 32, with sixteen times the scores: 2 of 16 of 256.
    assert score_share(generator) == pytest.approx((32 * 256 + 32 * 1024) / (64 * 256 + 256 * 1024))
    assert score_share(load_generator(save_gan(tmp_path / "dense.pt"))[0]) == 1.0


def test_one_cluster_is_dense(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    command = ["--checkpoint", str(save_gan(tmp_path / "gan.pt")), "--num", "4", "--device", "cpu"]
    command += ["--out", str(tmp_path / "compare.png"), "--json", str(tmp_path / "c.json"), "--attention", "smyrf"]
    sizes = ["--attention.q-cluster-size", "256", "--attention.k-cluster-size", "64"]
    assert run_command(compare_attention.main, [*command, "--attention.num-hashes", "1", *sizes]) == 0
    record = json.loads((tmp_path / "c.json").read_text())
    assert record["score_share"] == 1.0 and record["distances"]["grey_levels"] < 0.01
    assert record["unrelated dense samples"]["grey_levels"] > 0.1
    assert "100% of dense attention's scores" in capsys.readouterr().out
    assert run_command(compare_attention.main, [*command, *CLUSTERS]) == 0
    assert json.loads((tmp_path / "c.json").read_text())["distances"]["grey_levels"] > 0.01


@pytest.mark.skipif(not RECORDING.is_file(), reason="no recordings of the original")
def test_a_recorded_network_converted_and_exchanged(tmp_path):
    """The original's tensors as a G_ema.pth: converted, dense attention makes the recorded images, and SMYRF others."""
    pytest.importorskip("matplotlib")
    data = load(RECORDING)
    state = {key.removeprefix("sd/"): torch.from_numpy(data[key]) for key in data if key.startswith("sd/")}
    (tmp_path / "weights").mkdir()
    torch.save(state, tmp_path / "weights" / "G_ema.pth")
    converted = tmp_path / "converted.pt"
    assert run_command(convert_biggan.main, [str(tmp_path / "weights"), str(converted)]) == 0
    generator, config = load_generator(converted)
    assert config.attention.name == "dense"
    with torch.no_grad():
        images = generator(torch.from_numpy(data["z"]), torch.from_numpy(data["y"]))
    recorded = torch.from_numpy(data["out_eval_dense"])
    torch.testing.assert_close(images, recorded, atol=TOLERANCES["gan_outputs"], rtol=0)
    command = ["--checkpoint", str(converted), "--num", "4", "--device", "cpu", "--attention", "smyrf", *CLUSTERS]
    command += ["--out", str(tmp_path / "c.png"), "--json", str(tmp_path / "c.json")]
    assert run_command(compare_attention.main, command) == 0
    record = json.loads((tmp_path / "c.json").read_text())
    assert 0 < record["distances"]["relative_error"] < record["unrelated dense samples"]["relative_error"]


def test_the_published_architecture_is_recognised():
    """BigGAN-PyTorch's 128x128 network of width 96 by shapes alone; its log counts 70,433,988 parameters."""
    options = {"resolution": 128, "channels": 96, "dim_z": 120, "num_classes": 1000, "shared_dim": 128}
    options |= {"hierarchical": True, "attention_resolutions": (64,)}
    with torch.device("meta"):
        generator = Generator(**options, attention="dense")
    assert infer_generator(generator.state_dict()) == options
    assert sum(parameter.numel() for parameter in generator.parameters()) == 70_433_988
    assert sum(isinstance(module, SpatialAttention) for module in generator.modules()) == 1


def test_memory_quality(tmp_path):
    pytest.importorskip("matplotlib")
    gan = str(save_gan(tmp_path / "gan.pt"))
    command = ["--checkpoint", gan, "--num", "12", "--rounds", "1", "2", "--clusters", "1", "4"]
    assert run_command(memory_quality.main, [*command, "--device", "cpu", "--out", str(tmp_path / "q")]) == 0
    record = json.loads((tmp_path / "q.json").read_text())
    points = {(p["merge"], p["num_hashes"], p["num_clusters"]): p for p in record["points"]}
    assert {key: p["memory"] for key, p in points.items()} == {
        ("multiset", 1, 1): 1.0,
        ("multiset", 1, 4): 0.25,
        ("multiset", 2, 4): 0.5,
        ("union", 2, 4): 0.5,
    }
    assert points["multiset", 1, 1]["relative_error"] < 0.01 < points["multiset", 1, 4]["relative_error"]
    assert {path.name for path in tmp_path.glob("*.png")} == {"q.png", "q-images.png"}


def test_best_by_memory():
    def point(memory, error):
        return Point("union", 1, 1, memory, error, 0.0, 0.0, 0.0)

    assert best_by_memory([point(0.5, 0.3), point(1.0, 0.1), point(0.5, 0.2)]) == [1, 2]


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        (compare_attention, ["GAN"], "--attention smyrf"),
        (compare_attention, ["GAN", "--attention", "smyrf"], "needs num_hashes"),
        (compare_attention, ["GAN", "--attention", "smyrf", *CLUSTERS, "--num", "1"], "at least 2"),
        (compare_attention, ["GAN", "--attention", "smyrf", *CLUSTERS, "--features", "vgg"], "unknown feature network"),
        (compare_attention, ["PLAIN", "--attention", "smyrf", *CLUSTERS], "no attention"),
        (compare_attention, [__file__], "test_compare_attention.py"),
        (memory_quality, ["PLAIN"], "no attention"),
        (memory_quality, ["GAN", "--clusters", "3"], "64 keys, which it must divide"),
        (memory_quality, ["GAN", "--rounds", "0"], "at least 1"),
        (memory_quality, ["nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, capsys, tool, arguments, message):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    if arguments[0] in ("GAN", "PLAIN"):
        save_gan(tmp_path / arguments[0], resolutions=(16,) if arguments[0] == "GAN" else ())
    command = ["--checkpoint", *arguments, "--out", "x.png"]
    assert run_command(tool.main, command if "--num" in command else [*command, "--num", "4"]) == 2
    assert message in capsys.readouterr().err
