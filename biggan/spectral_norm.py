"""Spectral normalisation: layers whose weight is divided by an estimate of its largest singular value.

The weight is read as a matrix W (out, in). One step of power iteration from the stored left vector u gives

    v = normalize(u W),   u' = normalize(v Wᵀ),   sigma = v Wᵀ u'ᵀ,   and the layer uses W / sigma.

The gradient flows through W and sigma with u' and v held constant. Every forward in training stores u' in the buffer
`u0` and sigma in `sv0`; in evaluation the step is taken, but nothing is stored.

Source: Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks", arXiv:1802.05957, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biggan.layers import conv2d


class SpectralNorm:
    """Adds `u0` (1, out), `sv0` (1,) and `normalized_weight()` to a layer that has a `weight` (out, ...)."""

    def init_spectral_norm(self, eps: float) -> None:
        """Registers the buffers. `eps` is the least norm that a vector is divided by."""
        self.spectral_eps = eps
        # Of unit length from the start: compiled code may read it in the backward pass after the forward has stored u',
        # which for a matrix of one row is the same vector then.
        self.register_buffer("u0", F.normalize(torch.randn(1, self.weight.shape[0])))
        self.register_buffer("sv0", torch.ones(1))

    def normalized_weight(self) -> Tensor:
        """The weight divided by its estimated largest singular value, in its own shape and dtype."""
        # Autocast would run these products in bfloat16, and the error of sigma would scale the whole layer.
        with torch.autocast(self.weight.device.type, enabled=False):
            with torch.no_grad():
                matrix = _rows(self.weight, _is_channels_last(self.weight))  # (out, in)
                v = self._unit(self.u0 @ matrix)  # (1, in)
                projected = v @ matrix.T  # (1, out)
                u = self._unit(projected)
                sigma = (projected @ u.T).view(1)
                if self.training:
                    self.u0.copy_(u)
                    self.sv0.copy_(sigma)
            return DivideBySigma.apply(self.weight, u, v, sigma)

    def _unit(self, x: Tensor) -> Tensor:
        return x / torch.linalg.vector_norm(x).clamp_min(self.spectral_eps)


class DivideBySigma(torch.autograd.Function):
    """W / sigma for sigma = v Wᵀ uᵀ, with u and v held constant.

    The gradient for W is (G - <G, W> / sigma uᵀ v) / sigma, in two passes; autograd takes four times as long.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, u: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
        ctx.save_for_backward(weight, u, v, sigma)
        return weight / sigma

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, u, v, sigma = ctx.saved_tensors
        channels_last = _is_channels_last(weight)
        matrix, grad = _rows(weight, channels_last), _rows(grad, channels_last)
        if torch.is_grad_enabled():  # on the way to a second derivative
            sigma = (v @ matrix.T @ u.T).view(1)
        along = torch.dot(grad.flatten(), matrix.flatten()) / sigma  # (1,)
        grad = torch.addcmul(grad, u.T, v * along, value=-1) / sigma
        if channels_last:
            grad = grad.unflatten(1, (*weight.shape[2:], -1)).permute(0, 3, 1, 2)
        return grad.view(weight.shape), None, None, None


def _is_channels_last(weight: Tensor) -> bool:
    return weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)


def _rows(weight: Tensor, channels_last: bool) -> Tensor:
    """A weight as a matrix (out, in * height * width), columns in the order of memory: nothing is copied.

    Singular values do not depend on that order.
    """
    return (weight.permute(0, 2, 3, 1) if channels_last else weight).flatten(1)


class SpectralConv2d(SpectralNorm, nn.Conv2d):
    """`nn.Conv2d` with spectral normalisation over (out, in * height * width).

    Args:
        convolve: what takes (x, weight, bias) in place of the plain convolution, such as one that resamples too.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        bias: bool = True,
        eps: float = 1e-6,
        convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None,
    ):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        self.convolve = convolve or partial(conv2d, padding=self.padding[0])
        self.init_spectral_norm(eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.normalized_weight(), self.bias)


class SpectralLinear(SpectralNorm, nn.Linear):
    """`nn.Linear` with spectral normalisation."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, eps: float = 1e-6):
        super().__init__(in_features, out_features, bias=bias)
        self.init_spectral_norm(eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalized_weight(), self.bias)


class SpectralEmbedding(SpectralNorm, nn.Embedding):
    """`nn.Embedding` with spectral normalisation; its rows are the matrix's outputs."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, eps: float = 1e-6):
        super().__init__(num_embeddings, embedding_dim)
        self.init_spectral_norm(eps)

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.normalized_weight())
