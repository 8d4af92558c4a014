"""ONNX Runtime: inference alone, of graphs built from the same weights.

Its images are (B, C, T, F), its sequences (T, B, I), its LSTM gates in the order input, output, forget, cell.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from bench.peers import Inputs, Prepared, Sizes
from bench.peers.ours import same
from bench.peers.scoring import label_with
from bench.workloads import window_shape
from kernels.reference import Array
from npser.export import channels_first

OPSET = 17


class Graph:
    """An ONNX graph under construction; every method adds nodes and returns the name of their result."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(value, order="C"), name))
        return name

    def node(self, kind: str, *operands: str, **attributes: Any) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(operands), [name], **attributes))
        return name

    def convolution(self, x: str, w: Array, b: Array) -> str:
        kernel = self.constant(w.transpose(3, 2, 0, 1))
        return self.node("Conv", x, kernel, self.constant(b), pads=[1, 1, 1, 1], kernel_shape=[3, 3])

    def block(self, x: str, w: Array, b: Array) -> str:
        return self.pooled(self.node("Relu", self.convolution(x, w, b)))

    def pooled(self, x: str) -> str:
        return self.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])

    def dense(self, x: str, w: Array, b: Array) -> str:
        return self.node("Gemm", x, self.constant(w), self.constant(b))

    def lstm(self, x: str, wx: Array, wh: Array, b: Array) -> str:
        """(T, B, I) -> (T, B, H)."""
        H = len(wh)

        def reordered(value: Array) -> Array:
            i, f, g, o = np.split(value, 4, axis=-1)
            return np.concatenate([i, o, f, g], axis=-1)

        bias = np.concatenate([reordered(b), np.zeros_like(b)])
        weights = [self.constant(value[None]) for value in (reordered(wx).T, reordered(wh).T, bias)]
        y = self.node("LSTM", x, *weights, hidden_size=H)  # (T, 1, B, H)
        return self.node("Squeeze", y, self.constant(np.array([1])))

    def session(self, result: str, x: Array) -> Callable[[Array], Any]:
        """The function that the graph computes of an input of x's shape, named "x"."""
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)]
        outputs = [helper.make_tensor_value_info(result, TensorProto.FLOAT, None)]
        graph = helper.make_graph(self.nodes, "bench", inputs, outputs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = int(os.environ["OMP_NUM_THREADS"]), 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {"x": x})[0]


def _images(a: Inputs, build: Callable[[Graph], str]) -> Prepared:
    g = Graph()
    x = np.ascontiguousarray(a["x"].transpose(0, 3, 1, 2))
    f = g.session(build(g), x)
    return Prepared(lambda: {"y": f(x).transpose(0, 2, 3, 1)}, lambda: lambda: f(x))


def conv_block(a: Inputs, s: Sizes, variant: str) -> Prepared | None:
    return None if s["backward"] else _images(a, lambda g: g.block("x", a["w"], a["b"]))


def conv3x3(a: Inputs, s: Sizes, variant: str) -> Prepared | None:
    return None if s["backward"] else _images(a, lambda g: g.convolution("x", a["w"], a["b"]))


def dense_forward(a: Inputs, s: Sizes, variant: str) -> Prepared:
    g, x = Graph(), a["x"]
    f = g.session(g.dense("x", a["w"], a["b"]), x)
    return same(lambda: f(x), "y")


def lstm(a: Inputs, s: Sizes, variant: str) -> Prepared | None:
    if s["backward"]:
        return None
    g = Graph()
    x = np.ascontiguousarray(a["x"].swapaxes(0, 1))
    f = g.session(g.lstm("x", a["wx"], a["wh"], a["b"]), x)
    return Prepared(lambda: {"h": f(x).swapaxes(0, 1)}, lambda: lambda: f(x))


# --- whole networks ----------------------------------------------------------------------------------------------


def _network(a: Inputs, s: Sizes, x: Array) -> Callable[[Array], Any]:
    """(B, frames, bins) of x's shape -> probabilities (B, K)."""
    from npser.models import WINDOW_HOP, WINDOWS

    g, arch, B = Graph(), s["arch"], len(x)
    bins = window_shape(s)[1]

    def images(name: str, count: int) -> str:
        """(count, bins, bins) -> (count, features) in the order channel, time, frequency."""
        name = g.node("Unsqueeze", name, g.constant(np.array([1])))
        for conv in ("conv1", "conv2"):
            name = g.block(name, a[f"{conv}.w"], a[f"{conv}.b"])
        return g.node("Reshape", name, g.constant(np.array([count, -1])))

    if arch == "cnn":
        w = channels_first(a["dense1.w"], a["conv2.b"].size)
        last = g.node("Relu", g.dense(images("x", B), w, a["dense1.b"]))
    else:
        if arch == "tdcnn":  # the windows of all samples, first windows first: as an LSTM wants them
            ends = [(WINDOW_HOP * i, WINDOW_HOP * i + bins) for i in range(WINDOWS)]
            cut = [g.node("Slice", "x", *(g.constant(np.array([n])) for n in (*ends[i], 1))) for i in range(WINDOWS)]
            features = images(g.node("Concat", *cut, axis=0), B * WINDOWS)
            h = g.node("Reshape", features, g.constant(np.array([WINDOWS, B, -1])))
            a = {**a, "lstm1.wx": channels_first(a["lstm1.wx"], a["conv2.b"].size)}
        else:
            h = g.node("Transpose", "x", perm=[1, 0, 2])
        for n in (1, 2, 3):
            if f"lstm{n}.wx" in a:
                h = g.lstm(h, a[f"lstm{n}.wx"], a[f"lstm{n}.wh"], a[f"lstm{n}.b"])
        last = g.node("Gather", h, g.constant(np.array(-1)), axis=0)
    return g.session(g.node("Softmax", g.dense(last, a["out.w"], a["out.b"]), axis=1), x)


def infer(a: Inputs, s: Sizes, variant: str) -> Prepared:
    x = np.ascontiguousarray(a["x"])
    f = _network(a, s, x)
    return same(lambda: f(x), "p")


def label(a: Inputs, s: Sizes, variant: str) -> Prepared:
    from bench.peers.scoring import BATCH

    return label_with(_network(a, s, np.empty((BATCH, *window_shape(s)), np.float32)), a, s)
