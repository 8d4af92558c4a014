"""JAX, compiled by jit. Images and weights have the layout of `kernels`, which XLA takes as it is.

On a GPU, where JAX has no events, the clock is read before the first call and when the last result is there.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from bench.peers import Inputs, Prepared, Sizes
from bench.peers.ours import dropout_facts, same, training_facts
from bench.peers.scoring import label_with
from bench.workloads import CHECK_BATCH, CHECK_LR, CHECK_STEPS, DECAY, DROPOUT, LR, MOMENTUM, SEED, weights
from kernels.reference import Array

_waits = True  # for the result of every call


def use_gpu(tf32: bool) -> None:
    global _waits
    if jax.default_backend() != "gpu":
        raise RuntimeError("this JAX finds no GPU")
    _waits = False
    jax.config.update("jax_default_matmul_precision", "tensorfloat32" if tf32 else "highest")


def ready(result: Any) -> Any:
    return jax.block_until_ready(result) if _waits else result


def to_the_end(call: Callable[[], Any], count: int) -> float:
    """Seconds of so many calls, the last result included."""
    started = time.perf_counter()
    for _ in range(count):
        result = call()
    jax.block_until_ready(result)
    return time.perf_counter() - started


def prepared(outputs: Callable[[], Inputs], begin: Callable[[], Callable[[], object]]) -> Prepared:
    return Prepared(outputs, begin) if _waits else Prepared(outputs, begin, to_the_end)


def compiled(f: Callable[..., Any], *operands: Any, names: tuple[str, ...]) -> Prepared:
    """f of operands that are on the device already, waited for."""
    fast: Any = jax.jit(f)
    there = [jax.device_put(operand) for operand in operands]

    def run() -> Any:
        return ready(fast(*there))

    def outputs() -> Inputs:
        result = run()
        values = result if isinstance(result, tuple) else (result,)
        return {name: np.atleast_1d(value) for name, value in zip(names, values, strict=True)}

    return prepared(outputs, lambda: run)


def convolution(x: Any, w: Any, b: Any) -> Any:
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) + b


def pooled(x: Any) -> Any:
    """2x2 max-pooling; the first of equals takes the gradient, as elsewhere.

    By comparisons of halves, because the backward pass of `lax.reduce_window`, the customary way, takes XLA several
    times as long on the CPU.
    """
    B, T, F, C = x.shape
    x = x[:, : T // 2 * 2, : F // 2 * 2].reshape(B, T // 2, 2, F // 2, 2, C)
    x = jnp.where(x[:, :, :, :, 0] >= x[:, :, :, :, 1], x[:, :, :, :, 0], x[:, :, :, :, 1])
    return jnp.where(x[:, :, 0] >= x[:, :, 1], x[:, :, 0], x[:, :, 1])


def block(x: Any, w: Any, b: Any) -> Any:
    return pooled(jax.nn.relu(convolution(x, w, b)))


def _images(f: Callable[..., Any], a: Inputs, s: Sizes) -> Prepared:
    operands = a["x"], a["w"], a["b"]
    if not s["backward"]:
        return compiled(f, *operands, names=("y",))
    need_dx = s.get("need_dx", True)

    def both(x: Any, w: Any, b: Any, dy: Any) -> Any:
        if not need_dx:
            y, backward = jax.vjp(lambda w, b: f(x, w, b), w, b)
            return y, *backward(dy)
        y, backward = jax.vjp(f, x, w, b)
        return y, *backward(dy)

    return compiled(both, *operands, a["dy"], names=("y", *(("dx",) if need_dx else ()), "dw", "db"))


def conv_block(a: Inputs, s: Sizes, variant: str) -> Prepared:
    return _images(block, a, s)


def conv3x3(a: Inputs, s: Sizes, variant: str) -> Prepared:
    return _images(convolution, a, s)


def _elementwise(f: Callable[..., Any], a: Inputs) -> Prepared:
    def both(x: Any, dy: Any) -> Any:
        y, backward = jax.vjp(f, x)
        return y, *backward(dy)

    return compiled(both, a["x"], a["dy"], names=("y", "dx"))


def maxpool(a: Inputs, s: Sizes, variant: str) -> Prepared:
    return _elementwise(pooled, a)


def relu(a: Inputs, s: Sizes, variant: str) -> Prepared:
    return _elementwise(jax.nn.relu, a)


def dense_forward(a: Inputs, s: Sizes, variant: str) -> Prepared:
    return compiled(lambda x, w, b: x @ w + b, a["x"], a["w"], a["b"], names=("y",))


def dense_backward_input(a: Inputs, s: Sizes, variant: str) -> Prepared:
    return compiled(lambda dy, w: dy @ w.T, a["dy"], a["w"], names=("dx",))


def updated(w: Any, v: Any, dw: Any, lr: Any) -> Any:
    v = MOMENTUM * v - lr * dw
    return w + v, v


def _in_place(step: Callable[..., Any], w: Array, v: Array, *operands: Array) -> Prepared:
    """A step (w, v, ...) -> (w, v) whose operands w and v are given up to its results."""
    f = jax.jit(step, donate_argnums=(0, 1))
    state = [jax.device_put(w), jax.device_put(v)]
    there = [jax.device_put(operand) for operand in operands]

    def run() -> Any:
        state[:] = ready(f(*state, *there))
        return state[0]

    def outputs() -> Inputs:
        run()
        return {"w": np.asarray(state[0]), "v": np.asarray(state[1])}

    return prepared(outputs, lambda: run)


def dense_update(a: Inputs, s: Sizes, variant: str) -> Prepared:
    return _in_place(lambda w, v, x, dy: updated(w, v, x.T @ dy, LR), a["w"], a["v"], a["x"], a["dy"])


def sgd(a: Inputs, s: Sizes, variant: str) -> Prepared:
    return _in_place(lambda w, v, dw: updated(w, v, dw, LR), a["x"], a["v"], a["dy"])


def lstm_layer(x: Any, wx: Any, wh: Any, b: Any) -> Any:
    """(B, T, I) -> (B, T, H): all input projections at once, then a scan over the time steps."""
    z = x @ wx + b

    def step(before: Any, z_t: Any) -> Any:
        h, c = before
        i, f, g, o = jnp.split(z_t + h @ wh, 4, axis=1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    start = jnp.zeros((x.shape[0], wh.shape[0]), x.dtype)
    _, h = lax.scan(step, (start, start), z.swapaxes(0, 1))
    return h.swapaxes(0, 1)


def lstm(a: Inputs, s: Sizes, variant: str) -> Prepared:
    operands = a["x"], a["wx"], a["wh"], a["b"]
    if not s["backward"]:
        return compiled(lstm_layer, *operands, names=("h",))

    def both(x: Any, wx: Any, wh: Any, b: Any, dh: Any) -> Any:
        h, backward = jax.vjp(lstm_layer, x, wx, wh, b)
        return h, *backward(dh)

    return compiled(both, *operands, a["dh"], names=("h", "dx", "dwx", "dwh", "db"))


def _dropout(x: Any, rate: float, key: Any) -> Any:
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0) if rate else x


def _key() -> Any:
    return jax.random.key(SEED, impl="unsafe_rbg")  # XLA's own generator: faster than the default one


def dropout(a: Inputs, s: Sizes, variant: str) -> Prepared:
    made = compiled(lambda x, key: _dropout(x, DROPOUT, key), a["x"], _key(), names=("y",))
    return replace(made, outputs=lambda: dropout_facts(a["x"], made.outputs()["y"]))


def cross_entropy_of(logits: Any, y: Any) -> Any:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1).mean()


def cross_entropy(a: Inputs, s: Sizes, variant: str) -> Prepared:
    return compiled(jax.value_and_grad(cross_entropy_of), a["x"], a["y"], names=("loss", "dx"))


def stft(a: Inputs, s: Sizes, variant: str) -> Prepared:
    from npser.features import FRAME, HOP

    count = 1 + (len(a["x"]) - FRAME) // HOP
    index = HOP * np.arange(count)[:, None] + np.arange(FRAME)
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME) / FRAME)).astype(np.float32)
    return compiled(lambda x: jnp.abs(jnp.fft.rfft(x[index] * window, axis=1)), a["x"], names=("magnitude",))


# --- whole networks ----------------------------------------------------------------------------------------------


def logits(p: Any, x: Any, arch: str, bins: int, rate: float, key: Any) -> Any:
    """p: parameters by name; x (B, frames, bins); rate 0 switches dropout off."""
    from npser.models import WINDOW_HOP, WINDOWS

    keys = iter(jax.random.split(key, 3))

    def images(x: Any) -> Any:
        x = x[..., None]
        for name in ("conv1", "conv2"):
            x = _dropout(block(x, p[f"{name}.w"], p[f"{name}.b"]), rate, next(keys))
        return x.reshape(x.shape[0], -1)

    if arch == "cnn":
        x = _dropout(jax.nn.relu(images(x) @ p["dense1.w"] + p["dense1.b"]), rate, next(keys))
        return x @ p["out.w"] + p["out.b"]
    if arch == "tdcnn":
        B = x.shape[0]
        windows = jnp.stack([x[:, WINDOW_HOP * i : WINDOW_HOP * i + bins] for i in range(WINDOWS)], axis=1)
        x = images(windows.reshape(B * WINDOWS, bins, bins)).reshape(B, WINDOWS, -1)
    for n in (1, 2, 3):
        if f"lstm{n}.wx" in p:
            x = lstm_layer(x, p[f"lstm{n}.wx"], p[f"lstm{n}.wh"], p[f"lstm{n}.b"])
    return x[:, -1] @ p["out.w"] + p["out.b"]


class Training:
    """A network in training: parameters and velocities live on the device, and are given up to each step."""

    def __init__(self, params: Inputs, s: Sizes, rate: float) -> None:
        arch, bins = s["arch"], s["model"].get("bins", 128)

        def step(p: Any, v: Any, x: Any, y: Any, lr: Any, first: Any, updates: Any) -> Any:
            key = jax.random.fold_in(first, updates)
            loss, dp = jax.value_and_grad(lambda p: cross_entropy_of(logits(p, x, arch, bins, rate, key), y))(p)
            both = {name: updated(p[name], v[name], dp[name], lr) for name in p}
            return {name: w for name, (w, _) in both.items()}, {name: v for name, (_, v) in both.items()}, loss

        self.step = jax.jit(step, donate_argnums=(0, 1))
        self.p = {name: jnp.array(value) for name, value in params.items()}
        self.v = {name: jnp.zeros_like(value) for name, value in self.p.items()}
        self.key, self.updates = _key(), 0

    def run(self, x: Any, y: Any, lr: float, decay: float) -> Any:
        rate = lr / (1 + decay * self.updates)
        self.p, self.v, loss = ready(self.step(self.p, self.v, x, y, rate, self.key, self.updates))
        self.updates += 1
        return float(loss) if _waits else loss


def _parameters(a: Inputs) -> Inputs:
    return {name: value for name, value in a.items() if "." in name}


def train(a: Inputs, s: Sizes, variant: str) -> Prepared:
    def outputs() -> Inputs:
        training = Training(_parameters(a), s, 0.0)
        x, y = a["x"][:CHECK_BATCH], a["y"][:CHECK_BATCH]
        losses = [float(training.run(x, y, CHECK_LR, 0.0)) for _ in range(CHECK_STEPS)]
        return training_facts(a, losses, {name: np.asarray(value) for name, value in training.p.items()})

    return prepared(outputs, lambda: _training_step(_parameters(a), a["x"], a["y"], s))


def _training_step(params: Inputs, x: Array, y: Array, s: Sizes) -> Callable[[], object]:
    training = Training(params, s, DROPOUT)
    there = jax.device_put(x), jax.device_put(y)
    return lambda: training.run(*there, LR, DECAY)


def memory(a: Inputs, s: Sizes, variant: str) -> Prepared:
    return prepared(dict, lambda: _training_step(weights(s), a["x"], a["y"], s))


def _scorer(a: Inputs, s: Sizes) -> Callable[[Any], Any]:
    arch, bins = s["arch"], s["model"].get("bins", 128)
    params, key = {name: jax.device_put(value) for name, value in _parameters(a).items()}, _key()
    f = jax.jit(lambda p, x: jax.nn.softmax(logits(p, x, arch, bins, 0.0, key)))
    return lambda x: f(params, x)


def infer(a: Inputs, s: Sizes, variant: str) -> Prepared:
    score, x = _scorer(a, s), jax.device_put(a["x"])
    if _waits:
        return same(lambda: np.asarray(score(x)), "p")
    return prepared(lambda: {"p": np.asarray(score(x))}, lambda: lambda: score(x))


def label(a: Inputs, s: Sizes, variant: str) -> Prepared:
    score = _scorer(a, s)
    return label_with(lambda x: np.asarray(score(x)), a, s)
