"""The SIMD language: one tiny kernel per feature, and the accuracy of its functions."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numba as nb
import numpy as np
import pytest

import kernels
from kernels.cpu import simd
from kernels.cpu.simd import LANES, Bytes, Int, Ptr, kernel

RANGE = np.arange(LANES, dtype=np.float32)
INF, NAN = np.inf, np.nan


def run(trace, *arguments):
    """Call the kernel that `trace` describes; arrays are passed by address."""
    code = kernel(trace)

    @nb.njit
    def call(arguments):
        code(*arguments)

    call(tuple(a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments))


def lanes(*values):
    """The values, repeated to a whole number of vectors."""
    return np.resize(np.float32(values), -(-len(values) // LANES) * LANES)


def mapped(function, *inputs):
    """function(k, vector, ...) -> vector, applied to arrays of whole vectors."""

    def trace(k, x: Ptr, z: Ptr, vectors: Int, y: Ptr) -> None:
        for i in k.range(vectors):
            operands = [k.load(p + i * LANES) for p in (x, z)[: len(inputs)]]
            k.store(y + i * LANES, function(k, *operands))

    x = inputs[0]
    assert x.size % LANES == 0
    y = np.full_like(x, -99)
    run(trace, x, inputs[-1], x.size // LANES, y)
    return y


# --- memory ------------------------------------------------------------------------------------------------------


def test_load_and_store():
    def trace(k, x: Ptr, y: Ptr) -> None:
        k.store(y + 1, k.load(x + 3))

    x, y = np.arange(LANES + 5, dtype=np.float32), np.full(LANES + 2, -1, np.float32)
    run(trace, x, y)
    np.testing.assert_array_equal(y, [-1, *(RANGE + 3), -1])


def test_addresses_need_not_be_aligned():
    def trace(k, x: Ptr, y: Ptr) -> None:
        k.store(y, k.load(x))

    x, y = np.arange(2 * LANES, dtype=np.float32), np.zeros(2 * LANES, np.float32)
    for shift in range(LANES):
        run(trace, x[shift:], y[LANES - shift :])
        np.testing.assert_array_equal(y[LANES - shift :][:LANES], x[shift:][:LANES])


def test_splat():
    def trace(k, x: Ptr, y: Ptr) -> None:
        k.store(y, k.splat(x + 2))

    y = np.zeros(LANES, np.float32)
    run(trace, np.float32([1, 2, 3, 4]), y)
    assert (y == 3).all()


def test_bytes():
    """They widen without a sign, and shrink to their lowest byte; pointers to them count in bytes."""

    def trace(k, source: Bytes, target: Bytes, n: Int) -> None:
        k.store_bytes(target + n, k.load_bytes(source + 1))

    source = np.arange(256 - LANES - 1, 256, dtype=np.uint8)
    target = np.zeros(LANES + 4, np.uint8)
    run(trace, source, target, 3)
    np.testing.assert_array_equal(target, [0, 0, 0, *source[1:], 0])

    def constant(k, target: Bytes) -> None:
        k.store_bytes(target, k.ints(0x1FE))

    run(constant, target)
    assert (target[:LANES] == 0xFE).all()

    def equals(k, source: Bytes, y: Ptr) -> None:
        k.store(y, k.where(k.load_bytes(source).equals(255), 1.0, 0.0))

    y = np.zeros(LANES, np.float32)
    run(equals, source[1:], y)  # ends with 255, which must not have become -1
    np.testing.assert_array_equal(y, source[1 : LANES + 1] == 255)
    assert y[-1] == 1


def test_load_byte():
    """A single byte as an integer, and its use in an address."""

    def trace(k, place: Bytes, x: Ptr, y: Ptr) -> None:
        k.store(y, k.splat(x + k.load_byte(place + 1)))

    y = np.zeros(LANES, np.float32)
    run(trace, np.uint8([0, 200, 0]), np.arange(256, dtype=np.float32), y)
    assert (y == 200).all()


def test_load_int():
    """32 bits with their sign, as an address."""

    def trace(k, place: Bytes, x: Ptr, y: Ptr) -> None:
        k.store(y, k.splat(x + 200 + k.load_int(place + 4)))

    y = np.zeros(LANES, np.float32)
    run(trace, np.int32([0, -70, 0]).view(np.uint8), np.arange(256, dtype=np.float32), y)
    assert (y == 130).all()


def test_pointers():
    def trace(k, x: Ptr, n: Int, y: Ptr) -> None:
        k.store(y, k.splat(x + n))
        k.store(y + LANES, k.splat(n + x))
        k.store(y + n * LANES, k.splat(3 + x + n * 2))

    y = np.zeros(3 * LANES, np.float32)
    run(trace, np.arange(10, dtype=np.float32), 2, y)
    assert [set(part) for part in y.reshape(3, LANES).tolist()] == [{2}, {2}, {7}]


# --- integers and loops ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        (lambda a, b: a + b, 10),
        (lambda a, b: a + 4, 11),
        (lambda a, b: 4 + a, 11),
        (lambda a, b: a - b, 4),
        (lambda a, b: a - 5, 2),
        (lambda a, b: a * b, 21),
        (lambda a, b: a * 2, 14),
        (lambda a, b: 2 * a, 14),
        (lambda a, b: a & 5, 5),
        (lambda a, b: a >> 1, 3),
        (lambda a, b: a - a, 0),
    ],
)
def test_integers_and_loops(expression, value):
    """A loop of a + b rounds goes round a + b times; none is no round."""

    def trace(k, a: Int, b: Int, y: Ptr) -> None:
        rounds = k.var(0.0)
        for _ in k.range(expression(a, b)):
            rounds += k.vector(1.0)
        k.store(y, rounds)

    y = np.zeros(LANES, np.float32)
    run(trace, 7, 3, y)
    assert (y == value).all()


def test_loop_index_and_variables():
    """A matrix product in small: what the language is for. Variables keep their values from round to round."""

    def trace(k, x: Ptr, w: Ptr, n: Int, y: Ptr) -> None:
        acc = [k.var(0.5) for _ in range(3)]
        for i in k.range(n):
            for r in range(3):
                acc[r] += k.splat(x + i * 3 + r) * k.load(w + LANES * i)
        for r in range(3):
            k.store(y + LANES * r, acc[r])

    rng = np.random.default_rng(0)
    x, w = rng.integers(-9, 9, (11, 3)).astype(np.float32), rng.integers(-9, 9, (11, LANES)).astype(np.float32)
    y = np.zeros((3, LANES), np.float32)
    for n in (11, 1, 0):
        run(trace, x, w, n, y)
        np.testing.assert_array_equal(y, x[:n].T @ w[:n] + 0.5)


def test_variables_can_be_set():
    def trace(k, x: Ptr, n: Int, y: Ptr) -> None:
        a, b = k.var(k.load(x)), k.var(1)
        for _ in k.range(n):
            old = a.get()
            a.set(b.get())
            b.set(old + b.get())
        k.store(y, a.get())
        k.store(y + LANES, b)

    y = np.zeros((2, LANES), np.float32)
    run(trace, np.zeros(LANES, np.float32), 10, y)
    assert (y[0] == 55).all()  # Fibonacci's numbers
    assert (y[1] == 89).all()


def test_loops_in_loops():
    def trace(k, n: Int, y: Ptr) -> None:
        rounds = k.var(0.0)
        for i in k.range(n):
            for _ in k.range(i):
                rounds += k.vector(1.0)
        k.store(y, rounds)

    y = np.zeros(LANES, np.float32)
    run(trace, 5, y)
    assert (y == 0 + 1 + 2 + 3 + 4).all()


# --- arithmetic --------------------------------------------------------------------------------------------------

X, Z = np.float32([1.5, -2, 0.25, 3, 100, -7.5, 0, 8]), np.float32([0.5, 4, -1, 3, -50, 2.5, 1, -16])


@pytest.mark.parametrize(
    "function",
    [
        lambda x, z: x + z,
        lambda x, z: x + 3,
        lambda x, z: 3 + x,
        lambda x, z: x - z,
        lambda x, z: x - 1.5,
        lambda x, z: 1.5 - x,
        lambda x, z: x * z,
        lambda x, z: x * 0.5,
        lambda x, z: 0.5 * x,
        lambda x, z: x / z,
        lambda x, z: x / 4,
        lambda x, z: x * z + x,
        lambda x, z: 2 - x * z,
    ],
)
def test_arithmetic(function):
    """Exact in float32, for these numbers."""
    x, z = lanes(*X, *X), lanes(*Z, *Z)
    np.testing.assert_array_equal(mapped(lambda k, x, z: function(x, z), x, z), function(x, z))


# every pair of these
SPECIAL = np.float32([-INF, -1, -0.0, 0.0, 1, 2, INF, NAN])
LEFT, RIGHT = np.resize(np.repeat(SPECIAL, 8), 64), np.resize(np.tile(SPECIAL, 8), 64)


@pytest.mark.parametrize(
    ("compare", "expected"),
    [
        (lambda x, z: x > z, lambda x, z: x > z),
        (lambda x, z: x < z, lambda x, z: x < z),
        (lambda x, z: x <= z, lambda x, z: x <= z),
        (lambda x, z: x > 0.0, lambda x, z: x > 0),
        (lambda x, z: x < 1, lambda x, z: x < 1),
        (lambda x, z: x <= 0.0, lambda x, z: x <= 0),
        (lambda x, z: x.unordered(z), lambda x, z: np.isnan(x) | np.isnan(z)),
        (lambda x, z: (x > z) | (z > 1.0), lambda x, z: (x > z) | (z > 1)),
    ],
)
def test_comparisons(compare, expected):
    """As in NumPy; with not-a-number, nothing but `unordered` is true."""
    got = mapped(lambda k, x, z: k.where(compare(x, z), 1.0, 0.0), LEFT, RIGHT)
    np.testing.assert_array_equal(got, expected(LEFT, RIGHT))


def test_where():
    np.testing.assert_array_equal(
        mapped(lambda k, x, z: k.where(x > z, x, z), LEFT, RIGHT), np.where(LEFT > RIGHT, LEFT, RIGHT)
    )
    np.testing.assert_array_equal(
        mapped(lambda k, x, z: k.where(x > z, -3, z), LEFT, RIGHT), np.where(LEFT > RIGHT, -3, RIGHT)
    )

    def of_integers(k, x: Ptr, y: Bytes) -> None:
        k.store_bytes(y, k.where(k.load(x) > 1.0, k.ints(7), k.ints(250)))

    y = np.zeros(LANES, np.uint8)
    run(of_integers, RANGE, y)
    np.testing.assert_array_equal(y, np.where(RANGE > 1, 7, 250))


def test_abs():
    x = lanes(-2.5, 0.0, 7.0, -INF, -1e-40)
    np.testing.assert_array_equal(mapped(lambda k, x: abs(x), x), np.abs(x))


def test_clamp():
    x = lanes(-INF, -2.5, -2, -1, 0, 2.9, 3, 3.1, 1e30, INF, NAN)
    np.testing.assert_array_equal(mapped(lambda k, x: k.clamp(x, -2, 3), x), np.clip(x, -2, 3))


@pytest.mark.parametrize(("place", "d", "runs"), [(3, 1, True), (4, 1, False), (3, 0, False), (3, NAN, True)])
def test_when(place, d, runs):
    """The body runs under both conditions only; -0 is 0, and not-a-number is not."""

    def trace(k, place: Bytes, d: Ptr, n: Int, y: Ptr) -> None:
        total = k.var(0.0)
        for i in k.range(n):
            with k.when((k.load_byte(place) < 4) & k.nonzero(d)):
                total += k.vector(1.0)
            with k.when(i < 2):
                total += k.vector(10.0)
        k.store(y, total)

    for sign in (1, -1):
        y = np.zeros(LANES, np.float32)
        run(trace, np.uint8([place]), np.float32([sign * d]), 5, y)
        assert (y == 20 + 5 * runs).all()


def test_wrong_number_of_arguments():
    def trace(k, x: Ptr, y: Ptr) -> None:
        k.store(y, k.load(x))

    with pytest.raises((TypeError, nb.TypingError), match="trace"):
        run(trace, RANGE)


# --- functions ---------------------------------------------------------------------------------------------------

GRID = np.concatenate(
    [
        np.linspace(-20, 20, 1 << 20),
        np.linspace(-8, -7.8, 1 << 12),  # where the rational function is cut off
        np.linspace(7.8, 8, 1 << 12),
        np.geomspace(1e-45, 1e38, 1 << 12),
        -np.geomspace(1e-45, 1e38, 1 << 12),
    ]
).astype(np.float32)
EDGES = lanes(0, INF, -INF, 3e38, -3e38, 1e-45, -1e-45, 1e-38)


def test_tanh():
    y = mapped(simd.tanh, GRID)
    error = np.abs(y - np.tanh(GRID.astype(np.float64)))
    assert error.max() < 4e-7, f"{error.max():.3g} at {GRID[error.argmax()]}"
    assert np.abs(y).max() <= 1
    np.testing.assert_array_equal(mapped(simd.tanh, -GRID), -y)
    small = (np.abs(GRID) < 1e-3) & (np.abs(GRID) > 1e-30)  # near 0 the relative error counts, too
    np.testing.assert_allclose(y[small], np.tanh(GRID[small].astype(np.float64)), rtol=5e-7)
    np.testing.assert_allclose(mapped(simd.tanh, EDGES), np.tanh(EDGES), atol=4e-7)
    assert np.isnan(mapped(simd.tanh, lanes(NAN, -NAN))).all()


def test_sigmoid():
    y = mapped(simd.sigmoid, GRID)
    with np.errstate(over="ignore"):
        error = np.abs(y - 1 / (1 + np.exp(-GRID.astype(np.float64))))
    assert error.max() < 2.5e-7, f"{error.max():.3g} at {GRID[error.argmax()]}"
    assert y.min() >= 0
    assert y.max() <= 1
    expected = np.resize(np.float32([0.5, 1, 0, 1, 0, 0.5, 0.5, 0.5]), EDGES.size)
    np.testing.assert_allclose(mapped(simd.sigmoid, EDGES), expected, atol=2.5e-7)
    assert np.isnan(mapped(simd.sigmoid, lanes(NAN, -NAN))).all()


# --- the machine -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names processors of the x86-64 family")
@pytest.mark.parametrize(("cpu", "expected"), [("haswell", "8 16"), ("generic", "4 16"), ("znver4", "16 32")])
def test_width_follows_the_processor_named(cpu, expected):
    """AVX2 has 16 registers of 8 floats, plain x86-64 16 of 4, AVX-512 32 of 16. Nothing is executed for them here."""
    environment = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ""}
    environment["PYTHONPATH"] = str(Path(kernels.__file__).parents[1])
    program = "from kernels.cpu.simd import LANES, REGISTERS; print(LANES, REGISTERS)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == expected, done.stderr
