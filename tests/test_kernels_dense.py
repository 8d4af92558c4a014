"""Matrix products and the updates fused with them: `kernels.cpu` against the truth (`operands`)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from operands import (
    LAYOUTS,
    Numbers,
    absolute,
    assert_same_kind,
    assert_within,
    few_examples,
    magnitudes,
    numbers,
    wide,
)

from kernels import cpu, reference
from kernels.cpu import matmul as matmul_module
from kernels.cpu import sparse
from kernels.cpu.matmul import BLOCK, COLUMNS, ROWS, matmul, matmul_transposed

# 1, just below and above a tile, around a cache block, and more than one block
lengths = st.sampled_from([1, 2, ROWS - 1, ROWS + 1, COLUMNS - 1, COLUMNS + 1, 70, BLOCK - 1, BLOCK, 530, 1029])


@few_examples
@given(numbers, lengths, lengths, lengths, magnitudes, magnitudes)
def test_dense(make, N, I, J, big_x, big_w):
    x, w, b = make(N, I, magnitude=big_x), make(I, J, magnitude=big_w), make(J)
    dy, w_back = make(N, J, magnitude=big_w), make(I, J, magnitude=big_x)
    products = {
        "dense_forward": (x, w, b),
        "dense_backward_input": (dy, w_back),
        "dense_backward_weights": (x, dy),
    }
    for name, operands in products.items():
        got, operation = getattr(cpu, name)(*operands), getattr(reference, name)
        if big_x * big_w > 1e38:
            with np.errstate(all="ignore"):
                assert_same_kind(got, operation(*operands), name)
        else:
            assert_within(got, operation(*wide(*operands)), operation(*absolute(*operands)), name)
    assert_within(cpu.dense_backward_bias(dy), *(reference.dense_backward_bias(*f(dy)) for f in (wide, absolute)))


@few_examples
@given(numbers, lengths, lengths, lengths, st.booleans())
def test_matmul(make, M, K, N, turn_a):
    """The left side in any layout; the right side is contiguous, or it is `matmul_transposed` that multiplies."""
    a, b = make(K, M).T if turn_a else make(M, K), np.ascontiguousarray(make(K, N))
    bias = make(N)
    (a_, b_, bias_), (abs_a, abs_b, abs_bias) = wide(a, b, bias), absolute(a, b, bias)
    assert_within(matmul(a, b), a_ @ b_, abs_a @ abs_b)
    assert_within(matmul(a, b, bias), a_ @ b_ + bias_, abs_a @ abs_b + abs_bias)
    a, b_t = np.ascontiguousarray(a), np.ascontiguousarray(b.T)
    assert_within(matmul_transposed(a, b_t), a_ @ b_, abs_a @ abs_b)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("M", "N"), [(1, 272), (2, 272), (3, 272), (4, 272), (5, 4112), (8, 4112)])
def test_a_few_rows(M, N, bias):
    """Their product, for which b is not packed, has the bits of the same rows among many."""
    make = Numbers(M)
    a, b, c = make(9, 1024), make(1024, N), make(N) if bias else None
    assert b.size >= 1 << 18
    np.testing.assert_array_equal(matmul(a[:M], b, c), matmul(a, b, c)[:M])


listed_lengths = st.sampled_from([1, 2, sparse.DEPTH - 1, sparse.DEPTH + 1, sparse.WIDTH, sparse.WIDTH + 1, 700])


@few_examples
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 0.7, 1.0]), *3 * [listed_lengths])
def test_products_from_lists(seed, zeros, M, K, N):
    """Forward and update are the dense products' own bits; the input's gradient is right where it is wanted."""
    make, some = Numbers(seed), Numbers(seed + 1, zeros=zeros)
    x, w, b, dy = some(M, K), make(K, N), make(N), make(M, N)
    np.testing.assert_array_equal(sparse.matmul(x, w, b), matmul(x, w, b))
    ours, dense = (w.copy(), make(K, N)), (w.copy(), np.empty_like(w))
    dense[1][...] = ours[1]
    sparse.matmul_update(x, dy, *ours, 0.1, 0.8)
    matmul_module.matmul_update(x.T, dy, *dense, 0.1, 0.8)
    for got, expected in zip(ours, dense, strict=True):
        np.testing.assert_array_equal(got, expected)
    w, dy = make(K, sparse.WIDTH * (N % 3)), make(M, sparse.WIDTH * (N % 3))
    (dy_, w_), (abs_dy, abs_w) = wide(dy, w), absolute(dy, w)
    alive = x != 0
    assert_within(sparse.matmul_transposed(dy, w, x), alive * (dy_ @ w_.T), alive * (abs_dy @ abs_w.T))


@pytest.mark.parametrize(("zeros", "samples", "used"), [(0.7, 16, True), (0.3, 16, False), (0.7, 15, False)])
def test_lists_are_used_where_they_pay(monkeypatch, zeros, samples, used):
    calls = []
    for name in ("matmul", "matmul_update", "matmul_transposed"):
        product = getattr(sparse, name)
        monkeypatch.setattr(sparse, name, lambda *a, product=product, name=name: (calls.append(name), product(*a))[1])
    make, some = Numbers(3), Numbers(4, zeros=zeros)
    x, w, dy = some(samples, 1024), make(1024, 1024), make(samples, 1024)
    results = cpu.dense_forward(x, w, make(1024)), cpu.dense_backward_input(dy, w), cpu.dense_backward_input(dy, w, x)
    assert [r.shape for r in results] == [(samples, 1024)] * 3
    np.testing.assert_allclose(results[2][x != 0], results[1][x != 0], atol=1e-3)
    cpu.dense_update_weights(x, dy, w, np.zeros_like(w), 0.1, 0.8)
    assert calls == (["matmul", "matmul_transposed", "matmul_update"] if used else [])


@few_examples
@given(numbers, lengths, lengths, lengths, st.floats(0.001, 2), st.floats(0, 1))
def test_updates(make, N, I, J, lr, momentum):
    """sgd_update is right, and dense_update_weights is dense_backward_weights followed by sgd_update."""
    x, dy = make(N, I), make(N, J)
    w, v = np.ascontiguousarray(make(I, J)), np.ascontiguousarray(make(I, J))
    (w_, v_, x_, dy_), (abs_w, abs_v, abs_x, abs_dy) = wide(w, v, x, dy), absolute(w, v, x, dy)
    dw = cpu.dense_backward_weights(x, dy)
    once_w, once_v, twice_w, twice_v = w.copy(), v.copy(), w.copy(), v.copy()
    cpu.dense_update_weights(x, dy, once_w, once_v, lr, momentum)
    cpu.sgd_update(twice_w, twice_v, LAYOUTS[make.layout](dw), lr, momentum)
    reference.dense_update_weights(x_, dy_, w_, v_, lr, momentum)
    behind_v = momentum * abs_v + lr * (abs_x.T @ abs_dy)
    for got_w, got_v in ((once_w, once_v), (twice_w, twice_v)):
        assert_within(got_v, v_, behind_v, "v")
        assert_within(got_w, w_, behind_v + abs_w, "w")
    exact_w, exact_v = wide(w, v)
    reference.sgd_update(exact_w, exact_v, dw.astype(np.float64), lr, momentum)  # from the same float32 gradient
    assert_within(twice_v, exact_v, momentum * abs_v + lr * np.abs(dw), "v", tolerance=1e-6)


@pytest.mark.parametrize("update", ["sgd_update", "matmul_update", "sparse.matmul_update"])
def test_velocities_end_before_they_are_denormal(update):
    """In whole vectors and behind them. Anything above 1e-30 stays, and so does what is not a number."""
    shape = ROWS + 1, sparse.WIDTH + 1
    w, v, lr, momentum = np.full(shape, 1e-20, np.float32), np.full(shape, 1e-29, np.float32), 0.1, 0.01
    v[1], v[2], v[:, -2], v[-1, -1] = 1e-27, -1e-27, np.nan, -2e-28
    expected = np.float32(momentum) * v
    expected[np.abs(v) == np.float32(1e-29)] = 0
    x, dy = np.zeros((3, shape[0]), np.float32), np.zeros((3, shape[1]), np.float32)
    if update == "sgd_update":
        cpu.sgd_update(w, v, np.zeros_like(w), lr, momentum)
    elif update == "matmul_update":
        matmul_module.matmul_update(x.T, dy, w, v, lr, momentum)
    else:
        sparse.matmul_update(x, dy, w, v, lr, momentum)
    np.testing.assert_array_equal(v, expected)
    np.testing.assert_array_equal(w, np.where(np.isnan(expected), np.nan, np.float32(1e-20)))
