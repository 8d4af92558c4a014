"""npser itself. The variant is the rung of `kernels` that computes: "cpu" or "cuda" is timed, "reference" the truth.

On a GPU the operands are there before the clock runs, results stay there, and nothing waits but the clock.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

import kernels
from bench.peers import Inputs, Prepared, Sizes
from bench.peers.scoring import standardisation
from bench.workloads import (
    CHECK_BATCH,
    CHECK_LR,
    CHECK_STEPS,
    DECAY,
    DISTINCT,
    DROPOUT,
    LR,
    MOMENTUM,
    SEED,
    trained,
    utterances,
)
from kernels.reference import Array

NOT_WITH = {"cuda": ("stft", "label", "memory")}
"""Recordings become frames on the cpu."""


def same(call: Callable[[], Any], *names: str) -> Prepared:
    """Prepared for an operation that returns its results, None for one that is not wanted, and changes nothing."""

    def outputs() -> Inputs:
        result = call()
        values = result if isinstance(result, tuple) else (result,)
        return {name: value for name, value in zip(names, values, strict=True) if value is not None}

    return Prepared(outputs, lambda: call)


def use_gpu(tf32: bool) -> None:
    kernels.rung("cuda").settings.precision = "tf32" if tf32 else "float32"


def there(a: Inputs, variant: str) -> Any:
    """The operands where the rung wants them."""
    return {name: kernels.arrays(kernels.rung(variant)).asarray(value) for name, value in a.items()}


def computed(call: Callable[[], Any], variant: str, *names: str) -> Prepared:
    """`same` for an operation of a rung."""
    prepared = same(call, *names)
    if variant != "cuda":
        return prepared
    arrays = kernels.arrays(kernels.rung(variant))
    on_host = {True: arrays.asnumpy, False: np.asarray}

    def outputs() -> Inputs:
        results: dict[str, Any] = dict(prepared.outputs())
        return {name: np.atleast_1d(on_host[hasattr(value, "memory")](value)) for name, value in results.items()}

    return Prepared(outputs, prepared.begin, _by_events())


def conv_block(a: Inputs, s: Sizes, variant: str) -> Prepared:
    k, a = kernels.rung(variant), there(a, variant)

    def run() -> Any:
        y, argmax = k.conv_relu_pool_forward(a["x"], a["w"], a["b"])
        if not s["backward"]:
            return y, None, None, None
        dx, dw, db = k.conv_relu_pool_backward(a["dy"], argmax, a["x"], a["w"], s["need_dx"])
        return y, dx, dw, db

    return computed(run, variant, "y", "dx", "dw", "db")


def conv3x3(a: Inputs, s: Sizes, variant: str) -> Prepared:
    k, a = kernels.rung(variant), there(a, variant)

    def run() -> Any:
        y = k.conv3x3_forward(a["x"], a["w"], a["b"])
        if not s["backward"]:
            return y, None, None, None
        return (y, *k.conv3x3_backward(a["dy"], a["x"], a["w"]))

    return computed(run, variant, "y", "dx", "dw", "db")


def maxpool(a: Inputs, s: Sizes, variant: str) -> Prepared:
    k, a = kernels.rung(variant), there(a, variant)

    def run() -> Any:
        y, argmax = k.maxpool2x2_forward(a["x"])
        return y, k.maxpool2x2_backward(a["dy"], argmax, a["x"].shape)

    return computed(run, variant, "y", "dx")


def relu(a: Inputs, s: Sizes, variant: str) -> Prepared:
    k, a = kernels.rung(variant), there(a, variant)

    def run() -> Any:
        y = k.relu_forward(a["x"])
        return y, k.relu_backward(a["dy"], y)

    return computed(run, variant, "y", "dx")


def dense_forward(a: Inputs, s: Sizes, variant: str) -> Prepared:
    k, a = kernels.rung(variant), there(a, variant)
    return computed(lambda: k.dense_forward(a["x"], a["w"], a["b"]), variant, "y")


def dense_backward_input(a: Inputs, s: Sizes, variant: str) -> Prepared:
    k, a = kernels.rung(variant), there(a, variant)
    return computed(lambda: k.dense_backward_input(a["dy"], a["w"]), variant, "dx")


def dense_update(a: Inputs, s: Sizes, variant: str) -> Prepared:
    k, a = kernels.rung(variant), there(a, variant)

    def run() -> Any:
        k.dense_update_weights(a["x"], a["dy"], a["w"], a["v"], LR, MOMENTUM)
        return a["w"], a["v"]

    return computed(run, variant, "w", "v")


def sgd(a: Inputs, s: Sizes, variant: str) -> Prepared:
    k, a = kernels.rung(variant), there(a, variant)

    def run() -> Any:
        k.sgd_update(a["x"], a["v"], a["dy"], LR, MOMENTUM)
        return a["x"], a["v"]

    return computed(run, variant, "w", "v")


def lstm(a: Inputs, s: Sizes, variant: str) -> Prepared:
    k, a = kernels.rung(variant), there(a, variant)
    B, T, I, H = (s[letter] for letter in "BTIH")
    rows = a["x"].reshape(B * T, I)

    def run() -> Any:
        z = k.dense_forward(rows, a["wx"], a["b"]).reshape(B, T, 4 * H)
        h, c, gates = k.lstm_forward(z, a["wh"])
        if not s["backward"]:
            return h, None, None, None, None
        dz = k.lstm_backward(a["dh"], gates, c, a["wh"]).reshape(B * T, 4 * H)
        dx = k.dense_backward_input(dz, a["wx"]).reshape(B, T, I)
        before = kernels.arrays(k).step_before(h).reshape(B * T, H)
        dwx, dwh = k.dense_backward_weights(rows, dz), k.dense_backward_weights(before, dz)
        return h, dx, dwx, dwh, k.dense_backward_bias(dz)

    return computed(run, variant, "h", "dx", "dwx", "dwh", "db")


def dropout(a: Inputs, s: Sizes, variant: str) -> Prepared:
    k, a = kernels.rung(variant), there(a, variant)
    x, key = kernels.arrays(k).asnumpy(a["x"]), k.dropout_key(SEED, 1, 0)

    prepared = computed(lambda: k.dropout(a["x"], DROPOUT, key), variant, "y")
    return replace(prepared, outputs=lambda: dropout_facts(x, prepared.outputs()["y"]))


def dropout_facts(x: Array, y: Array) -> Inputs:
    """What can be compared of random masks: the share of dropped elements, and by how much the others grew."""
    kept = y != 0
    return {"dropped": np.array([1 - kept.mean()]), "gain": np.array([np.abs(y[kept]).sum() / np.abs(x[kept]).sum()])}


def cross_entropy(a: Inputs, s: Sizes, variant: str) -> Prepared:
    k, a = kernels.rung(variant), there(a, variant)

    def run() -> Any:
        loss, p = k.cross_entropy_forward(a["x"], a["y"])
        return np.array([loss]) if variant != "cuda" else loss, k.cross_entropy_backward(p, a["y"])

    return computed(run, variant, "loss", "dx")


def stft(a: Inputs, s: Sizes, variant: str) -> Prepared:
    from npser.features import FRAME, HOP

    k, a = kernels.rung(variant), there(a, variant)
    return computed(lambda: k.stft_magnitude_forward(a["x"], FRAME, HOP)[0], variant, "magnitude")


# --- whole networks ----------------------------------------------------------------------------------------------


def network(s: Sizes, variant: str, dropout_rate: float = DROPOUT) -> Any:
    """A network with the weights that `bench.workloads.weights` gives to the others."""
    from npser.models import build_model

    model = build_model(s["arch"], backend=variant, seed=SEED, dropout=dropout_rate, **s["model"])
    model.set_params(trained(s))
    return model


def train(a: Inputs, s: Sizes, variant: str) -> Prepared:
    from npser.optim import SGD

    def outputs() -> Inputs:
        model, sgd = network(s, variant, dropout_rate=0.0), SGD(CHECK_LR, MOMENTUM, decay=0.0)
        x, y = a["x"][:CHECK_BATCH], a["y"][:CHECK_BATCH]
        losses = [model.train_step(x, y, sgd) for _ in range(CHECK_STEPS)]
        return training_facts(a, losses, model.params)

    begin = lambda: training_step(a["x"], a["y"], s, variant)  # noqa: E731
    return Prepared(outputs, begin) if variant != "cuda" else Prepared(outputs, begin, _by_events())


def _by_events() -> Callable[[Callable[[], object], int], float]:
    from bench.gpu import by_events

    return by_events


def training_facts(a: Inputs, losses: list[float], params: Inputs) -> Inputs:
    """What is compared of training: the losses, and the change of every parameter."""
    changes = {f"change of {name}": value - a[name] for name, value in params.items()}
    return {"losses": np.array(losses), **changes}


def training_step(x: Array, y: Array, s: Sizes, variant: str) -> Callable[[], object]:
    from npser.optim import SGD

    model, sgd = network(s, variant), SGD(LR, MOMENTUM, DECAY)
    if variant != "cuda":
        return lambda: model.train_step(x, y, sgd)
    windows, targets = model.arrays.asarray(x), model.arrays.asarray(y)
    return lambda: model.train_batch(windows, targets, sgd)  # as in training: no look at the loss


def memory(a: Inputs, s: Sizes, variant: str) -> Prepared:
    return Prepared(dict, lambda: training_step(a["x"], a["y"], s, variant))


def infer(a: Inputs, s: Sizes, variant: str) -> Prepared:
    model, x, B = network(s, variant), a["x"], s["B"]
    if variant == "cuda":
        windows = model.arrays.asarray(x)
        return computed(lambda: model.k.softmax(model.layers.forward(windows, None)), variant, "p")
    if variant == "cpu":
        return same(lambda: model.predict_proba(x, batch_size=B), "p")
    return same(lambda: np.resize(model.predict_proba(x[:DISTINCT]), (B, model.settings["classes"])), "p")


def label(a: Inputs, s: Sizes, variant: str) -> Prepared:
    from npser.features import WindowSet, log_magnitude
    from npser.trainer import evaluate

    model, scale = network(s, variant), standardisation(a)

    def probabilities(samples: list[Array]) -> Array:
        frames = [log_magnitude(model.k, x) for x in samples]
        p: Array = evaluate(model, WindowSet(frames, scale, model.input_frames, s["hop"])).probabilities
        return p

    everything = utterances(a)
    return Prepared(lambda: {"p": probabilities(everything[: s["checked"]])}, lambda: lambda: probabilities(everything))
