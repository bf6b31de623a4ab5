"""The FID-Inception network against torchvision's, the resize rules against torch's, and loading from bad files."""

import hashlib
import socket
import urllib.error
from email.message import Message
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from inception_standin import standin_state
from torchvision.models.inception import Inception3

from biggan.metrics import inception_weights
from biggan.metrics.inception import FIDInception
from biggan.metrics.inception_weights import FILE_NAMES, WEIGHTS_URL, hash_weights, load_inception
from biggan.metrics.resize import normalise, resize
from runtime.errors import UserError


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "standin.pth"
    torch.save(standin_state(), path)
    return path


@pytest.fixture(scope="module")
def network(weights_file: Path) -> FIDInception:
    return load_inception(weights_file)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of torch.hub, and no weights named by the environment."""
    monkeypatch.delenv("INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def random_images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_half_pixel_rule_is_torchs_bilinear_interpolation() -> None:
    for height, width in [(64, 48), (512, 299), (299, 300), (1, 2)]:
        images = random_images(2, 3, height, width)
        expected = F.interpolate(images.double(), (299, 299), mode="bilinear", align_corners=False)
        torch.testing.assert_close(resize(images, 299, "pytorch-fid").double(), expected, atol=1e-4, rtol=0)


def test_tensorflow_rule_reads_at_multiples_of_the_scale() -> None:
    """Doubling: even pixels are the input's, odd ones the mean of two neighbours, the last one repeats the edge."""
    row = torch.tensor([[0.0, 10.0, 40.0]]).view(1, 1, 1, 3).expand(1, 1, 3, 3)
    expected = torch.tensor([0.0, 5.0, 10.0, 25.0, 40.0, 40.0])
    assert torch.equal(resize(row, 6, "tensorflow")[0, 0, 2], expected)


def test_sizes_that_fit_are_not_resampled() -> None:
    images = random_images(1, 3, 299, 299)
    for rule in ("pytorch-fid", "tensorflow"):
        assert torch.equal(resize(images, 299, rule), images.float())


def test_ranges() -> None:
    ends = torch.tensor([0.0, 255.0])
    assert normalise(ends, "pytorch-fid").tolist() == [-1, 1]
    assert normalise(ends, "tensorflow").tolist() == [-1, 127 / 128]


def test_unknown_rule_lists_the_rules(network: FIDInception) -> None:
    with pytest.raises(ValueError, match="pytorch-fid, tensorflow"):
        network(random_images(1, 3, 8, 8), "bicubic")


def test_layers_before_the_first_pooling_difference_equal_torchvisions(network: FIDInception) -> None:
    """Folded batch norms against torchvision's unfolded network, up to the first block, where the pools part."""
    reference = Inception3(num_classes=1008, aux_logits=False, init_weights=False).eval()
    reference.load_state_dict(standin_state())
    entered = {}
    for name, model in {"ours": network, "torchvision": reference}.items():
        handle = model.Mixed_5b.register_forward_pre_hook(
            lambda _, inputs, name=name: entered.update({name: inputs[0]})
        )
        images = random_images(1, 3, 299, 299)
        with torch.no_grad():
            model(images if name == "ours" else normalise(images.float(), "pytorch-fid"))
        handle.remove()
    torch.testing.assert_close(entered["ours"], entered["torchvision"], atol=1e-5, rtol=1e-5)


def test_features_of_an_image_do_not_depend_on_its_batch(network: FIDInception) -> None:
    images = random_images(3, 3, 32, 32)
    features = network(images)
    assert features.shape == (3, 2048) and features.dtype == torch.float32 and not features.requires_grad
    torch.testing.assert_close(network(images[1:2]), features[1:2], atol=1e-5, rtol=1e-5)
    assert network.logits(features).shape == (3, 1008)
    torch.testing.assert_close(
        network.logits(features) - network.logits(features, bias=False), network.fc.bias.expand(3, -1)
    )


def test_no_tf32_inside_and_what_was_allowed_afterwards(network: FIDInception) -> None:
    def precisions() -> tuple[str, str]:
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision

    before, seen = precisions(), []
    handle = network.Conv2d_1a_3x3.register_forward_pre_hook(lambda *_: seen.append(precisions()))
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        network(random_images(1, 3, 8, 8))
        assert precisions() == ("tf32", before[1])
    finally:
        torch.backends.cuda.matmul.fp32_precision = before[0]
        handle.remove()
    assert seen == [("ieee", "ieee")]


def test_other_images_raise(network: FIDInception) -> None:
    for images in (torch.zeros(1, 3, 8, 8), random_images(1, 1, 8, 8), random_images(3, 8, 8)):
        with pytest.raises(ValueError, match="uint8 images"):
            network(images)


def test_weights_hash_depends_on_every_value(network: FIDInception) -> None:
    assert network.weights_hash == hash_weights(standin_state())
    changed = dict(standin_state())
    changed["fc.bias"] = changed["fc.bias"] + 1e-3
    assert hash_weights(changed) != network.weights_hash


def test_counters_of_batches_may_lack(tmp_path: Path, network: FIDInception) -> None:
    path = tmp_path / "old.pth"
    torch.save({k: v for k, v in standin_state().items() if not k.endswith("num_batches_tracked")}, path)
    assert torch.equal(load_inception(path).fc.weight, network.fc.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("fc.bias"), "fc.bias\n.expected .1008,., found none"),
        (lambda state: state.update({"AuxLogits.fc.bias": torch.zeros(9)}), "AuxLogits.fc.bias\n.expected none"),
        (lambda state: state.update({"fc.bias": torch.zeros(1000)}), "found .1000,"),
        (lambda state: state.update({"fc.bias": 3}), "no dictionary of tensors"),
    ],
)
def test_other_weights_are_refused(tmp_path: Path, change, message: str) -> None:
    state = dict(standin_state())
    change(state)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match=message):
        load_inception(tmp_path / "other.pth")


class Malicious:
    def __reduce__(self):
        return (print, ("code of a pickle ran",))


def test_unreadable_files_are_refused(tmp_path: Path, weights_file: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match="No such file"):
        load_inception(tmp_path / "missing.pth")
    with pytest.raises(UserError, match="cannot read"):
        load_inception(tmp_path)
    (tmp_path / "cut.pth").write_bytes(weights_file.read_bytes()[:100_000])
    (tmp_path / "text.pth").write_text("<html>404</html>")
    (tmp_path / "empty.pth").touch()
    torch.save({"fc.bias": Malicious()}, tmp_path / "code.pth")
    for name in ("cut.pth", "text.pth", "empty.pth", "code.pth"):
        with pytest.raises(UserError, match=f"{name} is (damaged|refused).* Fetch https"):
            load_inception(tmp_path / name)
    assert "code of a pickle ran" not in capsys.readouterr().out


def test_weights_named_by_the_environment(weights_file: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INCEPTION_WEIGHTS", str(weights_file))
    assert load_inception().weights_hash == hash_weights(standin_state())


@pytest.mark.parametrize("name", FILE_NAMES)
def test_cached_file_is_taken_if_its_checksum_is_right(
    name: str, weights_file: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.mkdir(parents=True)
    (hub / name).symlink_to(weights_file)
    with pytest.raises(UserError, match=f"{name} is damaged .its checksum"):
        load_inception()
    checksum = hashlib.sha256(weights_file.read_bytes()).hexdigest()
    monkeypatch.setattr(inception_weights, "SHA256", checksum)
    assert load_inception().weights_hash == hash_weights(standin_state())


def test_without_a_network_the_message_says_what_to_do(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_args, **_kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    timeout = socket.getdefaulttimeout()
    with pytest.raises(UserError) as caught:
        load_inception()
    for part in ("no route to host", WEIGHTS_URL, str(hub), "--inception-weights PATH"):
        assert part in str(caught.value)
    assert socket.getdefaulttimeout() == timeout
    assert list(hub.iterdir()) == []


def test_download_is_verified(hub: Path, weights_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception_weights, "WEIGHTS_URL", weights_file.as_uri())
    with pytest.raises(UserError, match="invalid hash value"):
        load_inception()
    assert list(hub.iterdir()) == []
    checksum = hashlib.sha256(weights_file.read_bytes()).hexdigest()
    monkeypatch.setattr(inception_weights, "SHA256", checksum)
    assert load_inception().weights_hash == hash_weights(standin_state())
    assert [path.name for path in hub.iterdir()] == [FILE_NAMES[0]]


class Interrupted:
    """A connection that gives some bytes and then breaks off."""

    def __init__(self, error: BaseException) -> None:
        self.given, self.error = False, error

    def info(self) -> Message:
        return Message()

    def read(self, size: int) -> bytes:
        if self.given:
            raise self.error
        self.given = True
        return bytes(100)


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), TimeoutError("timed out"), KeyboardInterrupt()])
def test_an_interrupted_download_leaves_nothing(hub: Path, monkeypatch: pytest.MonkeyPatch, error) -> None:
    monkeypatch.setattr(torch.hub, "urlopen", lambda *_args, **_options: Interrupted(error))
    with pytest.raises((UserError, KeyboardInterrupt)):
        load_inception()
    assert list(hub.iterdir()) == []


def test_the_download_is_encrypted_and_wholly_hashed() -> None:
    assert WEIGHTS_URL.startswith("https://") and len(inception_weights.SHA256) == 64
    assert all(inception_weights.SHA256[:8] in name for name in FILE_NAMES)
