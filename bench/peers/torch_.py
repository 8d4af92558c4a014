"""PyTorch. Variants: "eager", "nhwc" (images and weights channels last), "compile", "loop"; on a GPU also "graph".

Weights stand in PyTorch's own order before the clock runs. The eager variants update with the fused SGD, one pass over
each parameter, which is not the default; "loop" is the plain loop, for training alone. On a GPU operands are there
before the clock runs, results stay there, and nothing waits but the clock; a "graph" (or "nhwc-graph") replays a whole
network as one CUDA graph, and is checked as the step that was captured.
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
_SMALL = ("relu", "dropout", "cross_entropy", "stft")
NOT_WITH = {
    "nhwc": (*_PRODUCTS, *_SMALL),
    "compile": (*_PRODUCTS, "conv3x3", "stft", "memory"),
    "loop": (*_PRODUCTS, *_IMAGES, *_SMALL, "infer", "label"),
    "graph": (*_PRODUCTS, *_IMAGES, *_SMALL),
    "nhwc-graph": (*_PRODUCTS, *_IMAGES, *_SMALL),
}
"""Kinds for which a variant differs in nothing from the eager one, or has no use."""


_device = "cpu"


def use_gpu(tf32: bool) -> None:
    global _device
    if not torch.cuda.is_available():
        raise RuntimeError("this PyTorch finds no GPU")
    _device = "cuda"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True  # it looks for the fastest convolution of a shape, in the repetitions before


def there(values: Any) -> Any:
    """A NumPy array, or a module, where the variant computes."""
    return (torch.from_numpy(values) if isinstance(values, np.ndarray) else values).to(_device)


def by_events(call: Callable[[], object], count: int) -> float:
    """Seconds of so many calls on the GPU."""
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(count):
        call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def prepared(outputs: Callable[[], Inputs], begin: Callable[[], Callable[[], object]]) -> Prepared:
    return Prepared(outputs, begin) if _device == "cpu" else Prepared(outputs, begin, by_events)


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of a step, after a few outside of it, away from the default stream, as PyTorch's manual asks."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay: Callable[[], object] = graph.replay
    return replay


def maybe_compiled(call: Callable[..., Any], variant: str) -> Callable[..., Any]:
    if variant != "compile":
        return call
    torch._dynamo.reset()  # what was compiled for the row before
    compiled: Callable[..., Any] = torch.compile(call, dynamic=False)
    return compiled


def image(x: Array, variant: str) -> Any:
    """(B, T, F, C) -> a tensor (B, C, T, F) in the variant's memory format."""
    layout = torch.channels_last if "nhwc" in variant else torch.contiguous_format
    return there(x).permute(0, 3, 1, 2).contiguous(memory_format=layout)


def filters(w: Array, variant: str) -> Any:
    """(3, 3, C, O) -> a tensor (O, C, 3, 3)."""
    layout = torch.channels_last if "nhwc" in variant else torch.contiguous_format
    return there(w).permute(3, 2, 0, 1).contiguous(memory_format=layout)


def to_numpy(tensor: Any, *axes: int) -> Array:
    tensor = tensor.detach()
    array: Array = (tensor.permute(axes) if axes else tensor).cpu().numpy()
    return array


def unchanged(call: Callable[[], Any], name: str) -> Prepared:
    """An operation with one result, which has the layout of `kernels`."""
    return prepared(lambda: {name: to_numpy(call())}, lambda: call)


def _images(f: Callable[..., Any], a: Inputs, s: Sizes, variant: str) -> Prepared:
    """A function of x, w, b on images, forward or forward and backward."""
    x, w, b = image(a["x"], variant), filters(a["w"], variant), there(a["b"])
    f = maybe_compiled(f, variant)
    if not s["backward"]:

        def forward() -> Any:
            with torch.inference_mode():
                return f(x, w, b)

        return prepared(lambda: {"y": to_numpy(forward(), 0, 2, 3, 1)}, lambda: forward)

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

    return prepared(outputs, lambda: both)


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
    return prepared(
        lambda: {name: to_numpy(value, 0, 2, 3, 1) for name, value in zip(names, run(), strict=True)}, lambda: run
    )


def relu(a: Inputs, s: Sizes, variant: str) -> Prepared:
    run = _elementwise(torch.relu, there(a["x"]), there(a["dy"]), variant)
    return prepared(
        lambda: {name: to_numpy(value) for name, value in zip(("y", "dx"), run(), strict=True)}, lambda: run
    )


def dense_forward(a: Inputs, s: Sizes, variant: str) -> Prepared:
    x, w, b = there(a["x"]), there(a["w"]).T.contiguous(), there(a["b"])
    return unchanged(lambda: F.linear(x, w, b), "y")


def dense_backward_input(a: Inputs, s: Sizes, variant: str) -> Prepared:
    dy, w = there(a["dy"]), there(a["w"]).T.contiguous()
    return unchanged(lambda: dy @ w, "dx")


def _sgd(params: Any, fused: bool, lr: float = LR) -> Any:
    return torch.optim.SGD(params, lr=lr, momentum=MOMENTUM, fused=fused, foreach=False)


def _with_velocity(w: Any, v: Any) -> Any:
    """An optimiser of w alone. PyTorch keeps m with w -= lr m; ours is v with w += v."""
    sgd = _sgd([w], fused=True)
    sgd.state[w]["momentum_buffer"] = v.div_(-LR)
    return sgd


def dense_update(a: Inputs, s: Sizes, variant: str) -> Prepared:
    x, dy = there(a["x"]), there(a["dy"])
    w = there(a["w"]).T.contiguous().requires_grad_()
    sgd = _with_velocity(w, there(a["v"]).T.contiguous())

    def run() -> None:
        w.grad = dy.T @ x
        sgd.step()

    def outputs() -> Inputs:
        run()
        return {"w": to_numpy(w, 1, 0), "v": to_numpy(-LR * sgd.state[w]["momentum_buffer"], 1, 0)}

    return prepared(outputs, lambda: run)


def sgd(a: Inputs, s: Sizes, variant: str) -> Prepared:
    w = there(a["x"].copy()).requires_grad_()
    w.grad = there(a["dy"])
    optimiser = _with_velocity(w, there(a["v"].copy()))

    def outputs() -> Inputs:
        optimiser.step()
        return {"w": to_numpy(w), "v": to_numpy(-LR * optimiser.state[w]["momentum_buffer"])}

    return prepared(outputs, lambda: optimiser.step)


def lstm(a: Inputs, s: Sizes, variant: str) -> Prepared:
    layer = there(lstm_layer(s["I"], s["H"]))
    with torch.no_grad():
        layer.weight_ih_l0.copy_(there(a["wx"]).T)
        layer.weight_hh_l0.copy_(there(a["wh"]).T)
        layer.bias_ih_l0.copy_(there(a["b"]))
    x, dh = there(a["x"]), there(a["dh"])
    if not s["backward"]:

        def forward() -> Any:
            with torch.inference_mode():
                return layer(x)[0]

        return prepared(lambda: {"h": to_numpy(forward())}, lambda: forward)
    wanted = [x.requires_grad_(), layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0]

    def both() -> Any:
        h = layer(x)[0]
        return h, *torch.autograd.grad(h, wanted, dh)

    def outputs() -> Inputs:
        h, dx, dwx, dwh, db = both()
        arrays = {"h": to_numpy(h), "dx": to_numpy(dx), "db": to_numpy(db)}
        return arrays | {"dwx": to_numpy(dwx, 1, 0), "dwh": to_numpy(dwh, 1, 0)}

    return prepared(outputs, lambda: both)


def dropout(a: Inputs, s: Sizes, variant: str) -> Prepared:
    x = there(a["x"])
    f = maybe_compiled(lambda x: F.dropout(x, DROPOUT, True), variant)
    return prepared(lambda: dropout_facts(a["x"], to_numpy(f(x))), lambda: lambda: f(x))


def cross_entropy(a: Inputs, s: Sizes, variant: str) -> Prepared:
    x, y = there(a["x"]).requires_grad_(), there(a["y"])
    f = maybe_compiled(lambda x: F.cross_entropy(x, y), variant)

    def both() -> Any:
        loss = f(x)
        return loss, *torch.autograd.grad(loss, x)

    def outputs() -> Inputs:
        loss, dx = both()
        return {"loss": to_numpy(loss)[None], "dx": to_numpy(dx)}

    return prepared(outputs, lambda: both)


def stft(a: Inputs, s: Sizes, variant: str) -> Prepared:
    from npser.features import FRAME, HOP

    x, window = there(a["x"]), there(torch.hann_window(FRAME))

    def run() -> Any:
        return torch.stft(x, FRAME, HOP, window=window, center=False, return_complex=True).abs().T

    return unchanged(run, "magnitude")


# --- whole networks ----------------------------------------------------------------------------------------------


def _twin(s: Sizes, variant: str, rate: float, weights: Inputs | None) -> Any:
    last = "nhwc" in variant
    twin = Twin(s["arch"], dropout=rate, channels_last=last, **s["model"])
    if weights is not None:
        twin.set_params(weights)
    twin = there(twin)
    return twin.to(memory_format=torch.channels_last) if last else twin


def _training_step(twin: Any, x: Array, y: Array, variant: str, lr: float, decay: float) -> Callable[[], Any]:
    sgd = _sgd([p for p in twin.parameters() if p.requires_grad], fused=variant != "loop", lr=lr)
    network = maybe_compiled(twin, variant)
    windows, targets = there(x), there(y)
    updates = 0

    def run() -> Any:
        nonlocal updates
        sgd.param_groups[0]["lr"] = lr / (1 + decay * updates)
        sgd.zero_grad()
        loss = F.cross_entropy(network(windows), targets)
        loss.backward()
        sgd.step()
        updates += 1
        return loss.detach() if _device != "cpu" else loss.item()

    return run


def train(a: Inputs, s: Sizes, variant: str) -> Prepared:
    def outputs() -> Inputs:
        twin = _twin(s, variant, 0.0, a)
        run = _training_step(twin, a["x"][:CHECK_BATCH], a["y"][:CHECK_BATCH], variant, CHECK_LR, 0.0)
        losses = [float(run()) for _ in range(CHECK_STEPS)]
        return training_facts(a, losses, {name: in_our_order(*pair) for name, pair in twin.pairs().items()})

    def begin() -> Callable[[], object]:
        step = _training_step(_twin(s, variant, DROPOUT, a), a["x"], a["y"], variant, LR, DECAY)
        return captured(step) if "graph" in variant else step

    return prepared(outputs, begin)


def memory(a: Inputs, s: Sizes, variant: str) -> Prepared:
    twin = _twin(s, variant, DROPOUT, None)
    return prepared(dict, lambda: _training_step(twin, a["x"], a["y"], variant, LR, DECAY))


def _scorer(a: Inputs, s: Sizes, variant: str) -> Callable[[Array], Array]:
    twin = maybe_compiled(_twin(s, variant, DROPOUT, a).eval(), variant)

    def score(x: Array) -> Array:
        with torch.inference_mode():
            return to_numpy(torch.softmax(twin(there(x)), dim=1))

    return score


def infer(a: Inputs, s: Sizes, variant: str) -> Prepared:
    x = np.ascontiguousarray(a["x"])
    if _device == "cpu":
        score = _scorer(a, s, variant)
        return same(lambda: score(x), "p")
    network, windows = maybe_compiled(_twin(s, variant, DROPOUT, a).eval(), variant), there(x)

    def run() -> Any:
        with torch.inference_mode():
            return torch.softmax(network(windows), dim=1)

    return prepared(lambda: {"p": to_numpy(run())}, lambda: captured(run) if "graph" in variant else run)


def label(a: Inputs, s: Sizes, variant: str) -> Prepared:
    return label_with(_scorer(a, s, variant), a, s)
