"""Resampling, spectral norm, batch norm and residual blocks against their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from biggan.batch_norm import BatchNorm, ConditionalBatchNorm
from biggan.blocks import DiscriminatorBlock, GeneratorBlock
from biggan.layers import (
    CPU_CHANNELS_DOWN,
    CPU_CHANNELS_UP,
    CPU_CHANNELS_WIDE,
    Mean2x2,
    WideConv2d,
    conv2d,
    conv_after_upsample,
    conv_before_downsample,
    initialize_orthogonal,
    upsample2x,
)
from biggan.spectral_norm import DivideBySigma, SpectralConv2d, SpectralEmbedding, SpectralLinear
from biggan.standing_statistics import standing_statistics

MEMORY_FORMATS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])


def random_layers():
    torch.manual_seed(0)
    return [SpectralConv2d(3, 5, 3), SpectralLinear(7, 4), SpectralEmbedding(6, 4)]


@MEMORY_FORMATS
def test_upsampling_is_nearest_and_keeps_the_memory_format(memory_format):
    x = torch.randn(2, 3, 5, 4).to(memory_format=memory_format)
    out = upsample2x(x)
    torch.testing.assert_close(out, F.interpolate(x, scale_factor=2, mode="nearest"), rtol=0, atol=0)
    assert out.is_contiguous(memory_format=memory_format)


def test_spectral_norm_converges_to_the_largest_singular_value():
    for layer in random_layers():
        for _ in range(200):
            weight = layer.normalized_weight()
        largest = torch.linalg.svdvals(layer.weight.detach().flatten(1))[0]
        torch.testing.assert_close(layer.sv0, largest.reshape(1), rtol=1e-4, atol=0)
        torch.testing.assert_close(weight.detach(), layer.weight.detach() / largest, rtol=1e-4, atol=1e-6)


def test_spectral_norm_takes_one_step_and_stores_it_only_in_training():
    for layer in random_layers():
        matrix, before = layer.weight.detach().flatten(1), layer.u0.clone()
        v = before @ matrix
        v = v / v.norm()
        u = v @ matrix.T
        sigma = u.norm()

        weight = layer.eval().normalized_weight()
        torch.testing.assert_close(weight.detach(), layer.weight.detach() / sigma)
        assert torch.equal(layer.u0, before) and torch.equal(layer.sv0, torch.ones(1))

        torch.testing.assert_close(layer.train().normalized_weight(), weight)
        torch.testing.assert_close(layer.u0, u / sigma)
        torch.testing.assert_close(layer.sv0, sigma.reshape(1))


def test_gradient_of_spectral_norm_holds_the_singular_vectors_constant():
    layer = SpectralLinear(7, 4).double().eval()
    matrix = layer.weight.detach()
    v = F.normalize(layer.u0 @ matrix)
    u = F.normalize(v @ matrix.T)
    sigma = (u @ matrix @ v.T).squeeze()
    upstream = torch.randn_like(matrix)
    layer.normalized_weight().backward(upstream)
    expected = (upstream - (upstream * matrix).sum() / sigma * u.T @ v) / sigma
    torch.testing.assert_close(layer.weight.grad, expected)


@MEMORY_FORMATS
def test_gradients_of_division_by_sigma(memory_format):
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 2, 2, dtype=torch.float64).to(memory_format=memory_format)
    u, v = F.normalize(torch.randn(1, 4).double()), F.normalize(torch.randn(1, 12).double())
    upstream = torch.randn_like(weight)

    def sigma(weight):
        rows = weight.permute(0, 2, 3, 1).flatten(1) if weight.stride(1) == 1 else weight.flatten(1)
        return (v @ rows.T @ u.T).view(1)

    results = []
    for divide in (lambda w: DivideBySigma.apply(w, u, v, sigma(weight)), lambda w: w / sigma(w)):
        leaf = weight.clone().requires_grad_()
        out = divide(leaf)
        (grad,) = torch.autograd.grad(out, leaf, upstream, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), leaf)
        results.append((out, grad, second))
    assert results[0][1].stride() == weight.stride()
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_spectral_norm_ignores_autocast():
    layer = SpectralLinear(300, 200).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = layer.normalized_weight()
    assert torch.equal(weight, layer.normalized_weight())


@MEMORY_FORMATS
def test_batch_norm_uses_the_batch_in_training_and_stored_statistics_else(memory_format):
    torch.manual_seed(0)
    norm = BatchNorm(3).double()
    norm.gain.data, norm.bias.data = torch.randn(2, 3, dtype=torch.float64)
    x = (torch.randn(4, 3, 5, 5, dtype=torch.float64) * 3 + 1).to(memory_format=memory_format)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)

    def expected(mean, var):
        mean, var, gain, bias = (t.view(1, 3, 1, 1) for t in (mean, var, norm.gain.detach(), norm.bias.detach()))
        return gain * (x - mean) / (var + 1e-5).sqrt() + bias

    out = norm(x).detach()
    torch.testing.assert_close(out, expected(mean, var))
    assert out.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(norm.stored_mean, 0.1 * mean)
    torch.testing.assert_close(norm.stored_var, 0.9 + 0.1 * var * 100 / 99)
    stored = norm.stored_mean.clone()
    torch.testing.assert_close(norm.eval()(x).detach(), expected(norm.stored_mean, norm.stored_var))
    assert torch.equal(norm.stored_mean, stored)


def test_conditional_batch_norm_scales_each_sample_by_its_condition():
    norm = ConditionalBatchNorm(3, lambda channels: nn.Embedding(2, channels))
    x, y = torch.randn(4, 3, 5, 5), torch.tensor([0, 1, 1, 0])
    normalized = F.batch_norm(x, None, None, training=True)
    expected = normalized * (1 + norm.gain.weight[y])[:, :, None, None] + norm.bias.weight[y][:, :, None, None]
    torch.testing.assert_close(norm(x, y), expected)


def plain_conv(layer, x):
    return F.conv2d(x, layer.normalized_weight(), layer.bias, padding=1)


@pytest.mark.parametrize("size", [(1, 1), (3, 6)])
@pytest.mark.parametrize("channels", [(4, 5), (CPU_CHANNELS_UP, CPU_CHANNELS_DOWN), (CPU_CHANNELS_WIDE,) * 2])
def test_convolutions_that_resample(size, channels):
    torch.manual_seed(0)
    x = torch.randn(2, channels[0], *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(*reversed(channels), 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(channels[1], dtype=torch.float64, requires_grad=True)
    up = conv_after_upsample(x, weight, bias), F.conv2d(upsample2x(x), weight, bias, padding=1)
    wide = F.pad(x, (0, size[1], 0, size[0]))  # an even size
    down = conv_before_downsample(wide, weight, bias), F.avg_pool2d(F.conv2d(wide, weight, bias, padding=1), 2)
    for fast, plain in (up, down):
        torch.testing.assert_close(fast, plain)
        grad = torch.randn_like(plain)
        for ours, expected in zip(
            torch.autograd.grad(fast, (x, weight, bias), grad),
            torch.autograd.grad(plain, (x, weight, bias), grad),
            strict=True,
        ):
            torch.testing.assert_close(ours, expected)


@MEMORY_FORMATS
@pytest.mark.parametrize("kernel, stride, padding", [(1, 1, 0), (3, 1, 1), (3, 2, 0), (3, 2, 1), (5, 3, 2)])
@pytest.mark.parametrize("size", [(1, 1), (4, 7), (5, 2)])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_wide_convolutions(transposed, size, kernel, stride, padding, memory_format):
    if min(size) + 2 * padding < kernel:
        size = 2 * kernel, kernel
    torch.manual_seed(0)
    shapes = (2, 3, *size), (3, 4, kernel, kernel) if transposed else (4, 3, kernel, kernel), (4,)
    convolve = F.conv_transpose2d if transposed else F.conv2d
    leaves = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    leaves = [x.to(memory_format=memory_format) if x.dim() == 4 else x for x in leaves]
    leaves = [x.requires_grad_() for x in leaves]
    results = []
    for out in (WideConv2d.apply(*leaves, stride, padding, transposed), convolve(*leaves, stride, padding)):
        upstream = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape)
        grads = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
        only_weight = torch.autograd.grad(out, leaves[1], upstream, retain_graph=True)
        twice = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        results.append([out, *grads, *only_weight, *torch.autograd.grad(sum(x.sin().sum() for x in twice), leaves)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_convolutions_under_autocast(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, CPU_CHANNELS_WIDE, 4, 4, requires_grad=True)
    weight = torch.randn(CPU_CHANNELS_WIDE, CPU_CHANNELS_WIDE, 3, 3, requires_grad=True)
    results = []
    for convolve in (conv2d, F.conv2d):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            out = convolve(x, weight, None, padding=1)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), (x, weight))])
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype is expected.dtype
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=0.1)


@pytest.mark.parametrize("padding", [0, 1])
def test_derivatives_of_means_of_squares(padding):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Mean2x2.apply(x, padding), x)
    assert torch.autograd.gradgradcheck(lambda x: Mean2x2.apply(x, padding), x)


def test_generator_block_is_its_formula():
    torch.manual_seed(0)
    block = GeneratorBlock(4, 6, lambda channels: nn.Embedding(3, channels)).double().eval()
    x, y = torch.randn(2, 4, 5, 5, dtype=torch.float64), torch.tensor([0, 2])
    h = plain_conv(block.conv1, F.interpolate(F.relu(block.bn1(x, y)), scale_factor=2))
    h = block.conv2(F.relu(block.bn2(h, y)))
    torch.testing.assert_close(block(x, y), h + block.shortcut(F.interpolate(x, scale_factor=2)))


@pytest.mark.parametrize("preactivation", [True, False])
def test_discriminator_block_is_its_formula(preactivation):
    torch.manual_seed(0)
    block = DiscriminatorBlock(4, 6, preactivation=preactivation, downsample=True).double().eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    before = x.clone()
    h = plain_conv(block.conv2, F.relu(block.conv1(F.relu(x) if preactivation else x)))
    shortcut = F.avg_pool2d(block.shortcut(x), 2) if preactivation else block.shortcut(F.avg_pool2d(x, 2))
    torch.testing.assert_close(block(x), F.avg_pool2d(h, 2) + shortcut)
    assert torch.equal(x, before)


def test_discriminator_block_of_equal_shapes_has_no_shortcut_weights():
    block = DiscriminatorBlock(4, 4, preactivation=True, downsample=False)
    assert not list(block.shortcut.parameters())
    assert block(torch.randn(1, 4, 6, 6)).shape == (1, 4, 6, 6)


def test_orthogonal_initialisation():
    layers = nn.Sequential(*random_layers())
    initialize_orthogonal(layers)
    for layer in layers:
        matrix = layer.weight.detach().flatten(1)
        gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)


class Normalized(nn.Module):
    """The least thing that has the generator's call and a batch norm that holds a spectrally normalised layer."""

    def __init__(self):
        super().__init__()
        self.bn = ConditionalBatchNorm(3, lambda channels: SpectralLinear(2, channels))

    def forward(self, z, y):
        return self.bn(z, y)


def test_standing_statistics_are_the_averages_over_the_batches():
    torch.manual_seed(0)
    model = Normalized()
    model(torch.randn(4, 3, 2, 2), torch.randn(4, 2))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    batches = [(torch.randn(4, 3, 2, 2) * scale, torch.randn(4, 2)) for scale in (1, 2, 3)]
    model.eval()
    model.bn.gain.train()
    modes = [module.training for module in model.modules()]
    standing_statistics(model, batches)
    assert [module.training for module in model.modules()] == modes
    assert model.bn.momentum == 0.1
    means = torch.stack([z.mean((0, 2, 3)) for z, _ in batches])
    variances = torch.stack([z.var((0, 2, 3)) for z, _ in batches])
    torch.testing.assert_close(model.bn.stored_mean, means.mean(0))
    torch.testing.assert_close(model.bn.stored_var, variances.mean(0))
    for name, buffer in model.named_buffers():
        if "stored" not in name:
            assert torch.equal(buffer, before[name]), name


def test_standing_statistics_of_nothing_raise():
    with pytest.raises(ValueError, match="at least one batch"):
        standing_statistics(Normalized(), [])
