"""Every mechanism at shapes, masks and options that hypothesis draws: a finite result of the right shape, or a reason.

What holds for all lengths and fillings is drawn too: padding, order of the tokens, order of the hash rounds.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import available_attention, get_mechanism, hrr_attention, smyrf_attention
from tests.attention.test_every_mechanism import DIM, HEADS, make_function, make_layer, run
from tests.mechanisms import OPTIONS
from tests.tolerance import assert_close

NUMBERS = [12, pytest.param(200, marks=pytest.mark.slow)]
NAMES = list(available_attention())
MASKED = [name for name in NAMES if get_mechanism(name).masks is True]
EQUIVARIANT = ["dense", "hrr", "linear", "luna", "performer"]  # no windows, blocks, landmarks or positions


def cases(number):
    return settings(max_examples=number, deadline=None, derandomize=True)


def draw_tokens(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_mask(seed, kind, batch, num_tokens):
    """bool (B, N): nothing, some tokens, or of the last row all."""
    mask = torch.rand(batch, num_tokens, generator=torch.Generator().manual_seed(seed)) < (0.4 if kind else 0.0)
    if kind == "row":
        mask[-1] = True
    return mask


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_finite_result_or_a_reason(name, number):
    mechanism = get_mechanism(name)

    @given(
        batch=st.integers(1, 3),
        num_queries=st.integers(1, 40),
        extra_keys=st.sampled_from([0, 0, 0, 5]),
        value_dim=st.sampled_from([4, 4, 4, 7]),
        mask=st.sampled_from([None, "", "some", "row"]),
        options=st.fixed_dictionaries({key: st.integers(0, 9) for key in OPTIONS[name]}),
        seed=st.integers(0, 99),
    )
    @cases(number)
    def check(batch, num_queries, extra_keys, value_dim, mask, options, seed):
        num_keys = num_queries if mechanism.layer else num_queries + extra_keys
        padding = None if mask is None else draw_mask(seed, mask, batch, num_keys)
        try:
            if mechanism.layer:
                x, shape = draw_tokens(seed, batch, num_queries, DIM), (batch, num_queries, DIM)
                out = run(make_layer(name, **options), x, padding)
            else:
                dim, shape = DIM // HEADS, (batch, HEADS, num_queries, value_dim)
                q, k = (
                    draw_tokens(seed, batch, HEADS, num_queries, dim),
                    draw_tokens(seed + 1, batch, HEADS, num_keys, dim),
                )
                v = draw_tokens(seed + 2, batch, HEADS, num_keys, value_dim)
                out = run(make_function(name, **options), q, k, v, padding)
        except ValueError as error:
            assert len(str(error)) > 10 and "\n" not in str(error)
            return
        assert out.shape == shape
        real = torch.zeros(batch, num_queries, dtype=torch.bool)
        if padding is not None and num_keys == num_queries:
            real = padding
        hidden = real[..., None] if mechanism.layer else real[:, None, :, None]
        assert out.masked_fill(hidden, 0.0).isfinite().all()

    check()


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", MASKED)
def test_padding_never_changes_real_tokens(name, number):
    @given(num_tokens=st.integers(1, 30), num_padding=st.integers(1, 20), seed=st.integers(0, 99))
    @cases(number)
    def check(num_tokens, num_padding, seed):
        layer, x = make_layer(name), draw_tokens(seed, 2, num_tokens + num_padding, DIM)
        mask = (torch.arange(num_tokens + num_padding) >= num_tokens).expand(2, -1)
        assert_close(run(layer, x, mask)[:, :num_tokens], run(layer, x[:, :num_tokens]))

    check()


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", EQUIVARIANT)
def test_the_order_of_tokens_does_not_matter(name, number):
    @given(num_tokens=st.integers(1, 40), mask=st.sampled_from(["", "some", "row"]), seed=st.integers(0, 99))
    @cases(number)
    def check(num_tokens, mask, seed):
        layer, x = make_layer(name), draw_tokens(seed, 2, num_tokens, DIM)
        padding = draw_mask(seed, mask, 2, num_tokens)
        order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed))
        keep = ~padding[:, order, None]
        assert_close(run(layer, x[:, order], padding[:, order]) * keep, run(layer, x, padding)[:, order] * keep)

    check()


@pytest.mark.parametrize("number", NUMBERS)
def test_smyrf_depends_neither_on_the_order_of_tokens_nor_of_rounds(number):
    @given(
        num_tokens=st.integers(2, 60),
        cluster_size=st.integers(1, 30),
        num_hashes=st.integers(1, 4),
        seed=st.integers(0, 99),
        backend=st.sampled_from(["einsum", "flash"]),
    )
    @cases(number)
    def check(num_tokens, cluster_size, num_hashes, seed, backend):
        q, k, v = (draw_tokens(seed + i, 1, 2, num_tokens, 4) for i in range(3))
        projections = draw_tokens(seed, 6, num_hashes).float()
        order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed))
        whole = smyrf_attention(q, k, v, projections, cluster_size, cluster_size, backend=backend)
        shuffled = [x[:, :, order] for x in (q, k, v)]
        assert_close(
            smyrf_attention(*shuffled, projections, cluster_size, cluster_size, backend=backend), whole[:, :, order]
        )
        rounds = torch.randperm(num_hashes, generator=torch.Generator().manual_seed(seed))
        assert_close(
            smyrf_attention(q, k, v, projections[:, rounds], cluster_size, cluster_size, backend=backend), whole
        )

    check()


@pytest.mark.parametrize("number", NUMBERS)
def test_hrr_is_the_same_for_heads_and_rows_alone(number):
    @given(
        batch=st.integers(1, 3),
        heads=st.integers(1, 3),
        num_tokens=st.integers(1, 40),
        dim=st.integers(1, 17),
        seed=st.integers(0, 99),
    )
    @cases(number)
    def check(batch, heads, num_tokens, dim, seed):
        q, k, v = (draw_tokens(seed + i, batch, heads, num_tokens, dim) for i in range(3))
        out = hrr_attention(q, k, v)
        assert out.shape == v.shape and out.isfinite().all()
        one = hrr_attention(*(x[-1:, -1:] for x in (q, k, v)))
        assert_close(one, out[-1:, -1:])

    check()
