"""PyTorch. Variants: "eager", "nhwc" (images and weights channels last), "compile", "loop".

Weights stand in PyTorch's own order before the clock runs. The eager variants update with the fused SGD, one pass over
each parameter, which is not the default; "loop" is the plain loop, for training alone.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from bench.peers import Inputs, Prepared, Sizes
from bench.peers.ours import dropout_facts, same, training_facts
from bench.peers.scoring import label_with
from bench.peers.torch_models import Twin, in_our_order
from bench.peers.torch_models import lstm as lstm_layer
from bench.workloads import CHECK_BATCH, CHECK_LR, CHECK_STEPS, DECAY, DROPOUT, LR, MOMENTUM
from kernels.reference import Array

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
torch.set_num_interop_threads(1)

_PRODUCTS = ("dense_forward", "dense_backward_input", "dense_update", "sgd", "lstm")  # library calls in every variant
_IMAGES = ("conv_block", "conv3x3", "maxpool")
_WHOLE = ("train", "memory", "infer", "label")
_SMALL = ("relu", "dropout", "cross_entropy", "stft")
NOT_WITH = {
    "nhwc": (*_PRODUCTS, *_SMALL),
    "compile": (*_PRODUCTS, "conv3x3", "stft", "memory"),
    "loop": (*_PRODUCTS, *_IMAGES, *_SMALL, "infer", "label"),
}
"""Kinds for which a variant differs in nothing from the eager one, or has no use."""


def maybe_compiled(call: Callable[..., Any], variant: str) -> Callable[..., Any]:
    if variant != "compile":
        return call
    torch._dynamo.reset()  # what was compiled for the row before
    compiled: Callable[..., Any] = torch.compile(call, dynamic=False)
    return compiled


def image(x: Array, variant: str) -> Any:
    """(B, T, F, C) -> a tensor (B, C, T, F) in the variant's memory format."""
    layout = torch.channels_last if variant == "nhwc" else torch.contiguous_format
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(memory_format=layout)


def filters(w: Array, variant: str) -> Any:
    """(3, 3, C, O) -> a tensor (O, C, 3, 3)."""
    layout = torch.channels_last if variant == "nhwc" else torch.contiguous_format
    return torch.from_numpy(w).permute(3, 2, 0, 1).contiguous(memory_format=layout)


def to_numpy(tensor: Any, *axes: int) -> Array:
    tensor = tensor.detach()
    array: Array = (tensor.permute(axes) if axes else tensor).numpy()
    return array


def _images(f: Callable[..., Any], a: Inputs, s: Sizes, variant: str) -> Prepared:
    """A function of x, w, b on images, forward or forward and backward."""
    x, w, b = image(a["x"], variant), filters(a["w"], variant), torch.from_numpy(a["b"])
    f = maybe_compiled(f, variant)
    if not s["backward"]:

        def forward() -> Any:
            with torch.inference_mode():
                return f(x, w, b)

        return Prepared(lambda: {"y": to_numpy(forward(), 0, 2, 3, 1)}, lambda: forward)

    dy = image(a["dy"], variant)
    wanted = [w.requires_grad_(), b.requires_grad_(), *([x.requires_grad_()] if s.get("need_dx", True) else [])]

    def both() -> Any:
        y = f(x, w, b)
        return y, *torch.autograd.grad(y, wanted, dy)

    def outputs() -> Inputs:
        y, dw, db, *dx = both()
        images = {"y": y} | ({"dx": dx[0]} if dx else {})
        got = {name: to_numpy(value, 0, 2, 3, 1) for name, value in images.items()}
        return got | {"dw": to_numpy(dw, 2, 3, 1, 0), "db": to_numpy(db)}

    return Prepared(outputs, lambda: both)


def conv_block(a: Inputs, s: Sizes, variant: str) -> Prepared:
    return _images(lambda x, w, b: F.max_pool2d(F.conv2d(x, w, b, padding=1).relu(), 2), a, s, variant)


def conv3x3(a: Inputs, s: Sizes, variant: str) -> Prepared:
    return _images(lambda x, w, b: F.conv2d(x, w, b, padding=1), a, s, variant)


def _elementwise(f: Callable[..., Any], x: Any, dy: Any, variant: str) -> Callable[[], Any]:
    """f forward and backward: (y, dx)."""
    x.requires_grad_()
    f = maybe_compiled(f, variant)

    def both() -> Any:
        y = f(x)
        return y, *torch.autograd.grad(y, x, dy)

    return both


def maxpool(a: Inputs, s: Sizes, variant: str) -> Prepared:
    run = _elementwise(lambda x: F.max_pool2d(x, 2), image(a["x"], variant), image(a["dy"], variant), variant)
    names = ("y", "dx")
    return Prepared(
        lambda: {name: to_numpy(value, 0, 2, 3, 1) for name, value in zip(names, run(), strict=True)}, lambda: run
    )


def relu(a: Inputs, s: Sizes, variant: str) -> Prepared:
    run = _elementwise(torch.relu, torch.from_numpy(a["x"]), torch.from_numpy(a["dy"]), variant)
    return Prepared(
        lambda: {name: to_numpy(value) for name, value in zip(("y", "dx"), run(), strict=True)}, lambda: run
    )


@torch.no_grad()
def dense_forward(a: Inputs, s: Sizes, variant: str) -> Prepared:
    x, w, b = torch.from_numpy(a["x"]), torch.from_numpy(a["w"]).T.contiguous(), torch.from_numpy(a["b"])
    return same(lambda: F.linear(x, w, b).numpy(), "y")


def dense_backward_input(a: Inputs, s: Sizes, variant: str) -> Prepared:
    dy, w = torch.from_numpy(a["dy"]), torch.from_numpy(a["w"]).T.contiguous()
    return same(lambda: (dy @ w).numpy(), "dx")


def _sgd(params: Any, fused: bool, lr: float = LR) -> Any:
    return torch.optim.SGD(params, lr=lr, momentum=MOMENTUM, fused=fused, foreach=False)


def _with_velocity(w: Any, v: Any) -> Any:
    """An optimiser of w alone. PyTorch keeps m with w -= lr m; ours is v with w += v."""
    sgd = _sgd([w], fused=True)
    sgd.state[w]["momentum_buffer"] = v.div_(-LR)
    return sgd


def dense_update(a: Inputs, s: Sizes, variant: str) -> Prepared:
    x, dy = torch.from_numpy(a["x"]), torch.from_numpy(a["dy"])
    w = torch.from_numpy(a["w"]).T.contiguous().requires_grad_()
    sgd = _with_velocity(w, torch.from_numpy(a["v"]).T.contiguous())

    def run() -> None:
        w.grad = dy.T @ x
        sgd.step()

    def outputs() -> Inputs:
        run()
        return {"w": to_numpy(w, 1, 0), "v": to_numpy(-LR * sgd.state[w]["momentum_buffer"], 1, 0)}

    return Prepared(outputs, lambda: run)


def sgd(a: Inputs, s: Sizes, variant: str) -> Prepared:
    w = torch.from_numpy(a["x"].copy()).requires_grad_()
    w.grad = torch.from_numpy(a["dy"])
    optimiser = _with_velocity(w, torch.from_numpy(a["v"].copy()))

    def outputs() -> Inputs:
        optimiser.step()
        return {"w": to_numpy(w), "v": to_numpy(-LR * optimiser.state[w]["momentum_buffer"])}

    return Prepared(outputs, lambda: optimiser.step)


def lstm(a: Inputs, s: Sizes, variant: str) -> Prepared:
    layer = lstm_layer(s["I"], s["H"])
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.from_numpy(a["wx"]).T)
        layer.weight_hh_l0.copy_(torch.from_numpy(a["wh"]).T)
        layer.bias_ih_l0.copy_(torch.from_numpy(a["b"]))
    x, dh = torch.from_numpy(a["x"]), torch.from_numpy(a["dh"])
    if not s["backward"]:

        def forward() -> Any:
            with torch.inference_mode():
                return layer(x)[0]

        return Prepared(lambda: {"h": to_numpy(forward())}, lambda: forward)
    wanted = [x.requires_grad_(), layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0]

    def both() -> Any:
        h = layer(x)[0]
        return h, *torch.autograd.grad(h, wanted, dh)

    def outputs() -> Inputs:
        h, dx, dwx, dwh, db = both()
        arrays = {"h": to_numpy(h), "dx": to_numpy(dx), "db": to_numpy(db)}
        return arrays | {"dwx": to_numpy(dwx, 1, 0), "dwh": to_numpy(dwh, 1, 0)}

    return Prepared(outputs, lambda: both)


def dropout(a: Inputs, s: Sizes, variant: str) -> Prepared:
    x = torch.from_numpy(a["x"])
    f = maybe_compiled(lambda x: F.dropout(x, DROPOUT, True), variant)
    return Prepared(lambda: dropout_facts(a["x"], to_numpy(f(x))), lambda: lambda: f(x))


def cross_entropy(a: Inputs, s: Sizes, variant: str) -> Prepared:
    x, y = torch.from_numpy(a["x"]).requires_grad_(), torch.from_numpy(a["y"])
    f = maybe_compiled(lambda x: F.cross_entropy(x, y), variant)

    def both() -> Any:
        loss = f(x)
        return loss, *torch.autograd.grad(loss, x)

    def outputs() -> Inputs:
        loss, dx = both()
        return {"loss": to_numpy(loss)[None], "dx": to_numpy(dx)}

    return Prepared(outputs, lambda: both)


def stft(a: Inputs, s: Sizes, variant: str) -> Prepared:
    from npser.features import FRAME, HOP

    x, window = torch.from_numpy(a["x"]), torch.hann_window(FRAME)

    def run() -> Array:
        return to_numpy(torch.stft(x, FRAME, HOP, window=window, center=False, return_complex=True).abs().T)

    return same(run, "magnitude")


# --- whole networks ----------------------------------------------------------------------------------------------


def _twin(s: Sizes, variant: str, rate: float, weights: Inputs | None) -> Any:
    twin = Twin(s["arch"], dropout=rate, **s["model"])
    if weights is not None:
        twin.set_params(weights)
    return twin.to(memory_format=torch.channels_last) if variant == "nhwc" else twin


def _training_step(twin: Any, x: Array, y: Array, variant: str, lr: float, decay: float) -> Callable[[], Any]:
    sgd = _sgd([p for p in twin.parameters() if p.requires_grad], fused=variant != "loop", lr=lr)
    network = maybe_compiled(twin, variant)
    windows, targets = torch.from_numpy(x), torch.from_numpy(y)
    updates = 0

    def run() -> float:
        nonlocal updates
        sgd.param_groups[0]["lr"] = lr / (1 + decay * updates)
        sgd.zero_grad()
        loss = F.cross_entropy(network(windows), targets)
        loss.backward()
        sgd.step()
        updates += 1
        return float(loss.item())

    return run


def train(a: Inputs, s: Sizes, variant: str) -> Prepared:
    def outputs() -> Inputs:
        twin = _twin(s, variant, 0.0, a)
        run = _training_step(twin, a["x"][:CHECK_BATCH], a["y"][:CHECK_BATCH], variant, CHECK_LR, 0.0)
        losses = [run() for _ in range(CHECK_STEPS)]
        return training_facts(a, losses, {name: in_our_order(*pair) for name, pair in twin.pairs().items()})

    return Prepared(outputs, lambda: _training_step(_twin(s, variant, DROPOUT, a), a["x"], a["y"], variant, LR, DECAY))


def memory(a: Inputs, s: Sizes, variant: str) -> Prepared:
    twin = _twin(s, variant, DROPOUT, None)
    return Prepared(dict, lambda: _training_step(twin, a["x"], a["y"], variant, LR, DECAY))


def _scorer(a: Inputs, s: Sizes, variant: str) -> Callable[[Array], Array]:
    twin = maybe_compiled(_twin(s, variant, DROPOUT, a).eval(), variant)

    def score(x: Array) -> Array:
        with torch.inference_mode():
            return to_numpy(torch.softmax(twin(torch.from_numpy(x)), dim=1))

    return score


def infer(a: Inputs, s: Sizes, variant: str) -> Prepared:
    score, x = _scorer(a, s, variant), np.ascontiguousarray(a["x"])
    return same(lambda: score(x), "p")


def label(a: Inputs, s: Sizes, variant: str) -> Prepared:
    return label_with(_scorer(a, s, variant), a, s)
