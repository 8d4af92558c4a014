"""python -m npser.export: a model file -> ONNX, the format that browsers, phones and other programs run.

The graph reads log-magnitude frames as `npser.features` makes them, not standardised, and returns probabilities: the
statistics of the training data are part of it. Several networks stand side by side in one graph, which averages them.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npser.cli import Parser, run
from npser.errors import RunFailed, UserError
from npser.files import replacing, require_place
from npser.modelfile import feature_settings
from npser.models import Model
from npser.scoring import load_together, standardisation

OPSET = 17
LARGEST = 2_000_000_000  # bytes of parameters: a protocol buffer ends at 2**31
TOLERANCE = 1e-5  # between the probabilities of this program and those of ONNX Runtime


class Graph:
    """An ONNX graph in the making: nodes in order, constants by name, behind the prefix of the network they are of."""

    def __init__(self) -> None:
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise UserError(f"ONNX needs {error.name}: pip install 'npser[onnx]'") from error
        self.onnx, self.runtime = onnx, onnxruntime
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.prefix = ""

    def constant(self, name: str, value: NDArray[Any]) -> str:
        name = self.prefix + name
        self.constants.append(self.onnx.numpy_helper.from_array(np.array(value, order="C"), name))
        return name

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add an operation; returns the name of its (first) output."""
        name = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [name], name, **attributes))
        return name

    def reshape(self, x: str, *shape: int) -> str:
        return self.node("Reshape", x, self.constant(f"shape{len(self.nodes)}", np.array(shape, np.int64)))


def build(graph: Graph, models: Sequence[Model]) -> Any:
    """The model as an onnx.ModelProto: "frames" (B, input_frames, bins) -> "probabilities" (B, K).

    models: one, or several of one kind, whose probabilities are averaged. UserError where ONNX cannot hold so much.
    """
    if sum(value.nbytes for model in models for value in model.params.values()) > LARGEST:
        raise UserError("--with: ONNX files hold 2 GB at most: name fewer models")
    said = []
    for number, model in enumerate(models, 1):
        graph.prefix = f"network{number}/" if len(models) > 1 else ""
        said.append(_network(graph, model))
    graph.node("Mean", *said)
    graph.nodes[-1].output[0] = "probabilities"
    first, *others = models
    helper, kind = graph.onnx.helper, graph.onnx.TensorProto.FLOAT
    made = helper.make_model(
        helper.make_graph(
            graph.nodes,
            f"npser-{first.arch}",
            [helper.make_tensor_value_info("frames", kind, ["batch", first.input_frames, first.settings["bins"]])],
            [helper.make_tensor_value_info("probabilities", kind, ["batch", first.settings["classes"]])],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        producer_name="npser",
        ir_version=8,  # of the time of this opset: older runtimes refuse newer files
    )
    about: dict[str, Any] = {
        "labels": list(first.labels),
        "features": feature_settings(),
        "training": dict(first.training),
    }
    if others:
        about["training of the others"] = [dict(model.training) for model in others]
    helper.set_model_props(made, {key: json.dumps(value) for key, value in about.items()})
    graph.onnx.checker.check_model(made)
    return made


def _network(graph: Graph, model: Model) -> str:
    """The probabilities (B, K) of one model."""
    scale, params, bins = standardisation(model), model.params, model.settings["bins"]
    if behind := {"cnn": "dense1.w", "tdcnn": "lstm1.wx"}.get(model.arch):  # behind the convolutions
        params[behind] = channels_first(params[behind], model.settings["filters"])
    x = graph.node("Sub", "frames", graph.constant("mean", scale.mean))
    x = graph.node("Div", x, graph.constant("deviation", scale.deviation))
    if model.arch == "cnn":
        x = _convolutions(graph, params, graph.reshape(x, -1, 1, bins, bins))  # (B, 1, T, F)
        x = graph.node("Relu", _dense(graph, params, "dense1", x))
    elif model.arch == "lstm":
        x = graph.node("Transpose", x, perm=[1, 0, 2])  # (T, B, F)
        for name in ("lstm1", "lstm2", "lstm3"):
            x = _lstm(graph, params, name, x)
        x = _last(graph, x)
    else:
        x = _time_distributed(graph, params, x, bins)
        for name in ("lstm1", "lstm2"):
            x = _lstm(graph, params, name, x)
        x = _last(graph, x)
    return graph.node("Softmax", _dense(graph, params, "out", x), axis=1)


def _convolutions(graph: Graph, params: dict[str, Any], x: str) -> str:
    """(N, 1, T, F) -> (N, C * T/4 * F/4): ONNX images have their channels first. See `channels_first`."""
    for name in ("conv1", "conv2"):
        w = graph.constant(f"{name}.w", params[f"{name}.w"].transpose(3, 2, 0, 1))
        b = graph.constant(f"{name}.b", params[f"{name}.b"])
        x = graph.node("Conv", x, w, b, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        x = graph.node("MaxPool", graph.node("Relu", x), kernel_shape=[2, 2], strides=[2, 2])
    return graph.node("Flatten", x, axis=1)


def channels_first(w: NDArray[Any], filters: int) -> NDArray[Any]:
    """The weights (T*F*C, J) of what follows the convolutions, their rows in the order C, T, F. T = F, C = filters."""
    side = math.isqrt(len(w) // filters)
    return w.reshape(side, side, filters, -1).transpose(2, 0, 1, 3).reshape(w.shape)


def _time_distributed(graph: Graph, params: dict[str, Any], x: str, bins: int) -> str:
    """(B, frames, F) -> (W, B, features): the windows of all samples go through the convolutions as one batch."""
    from npser.models import WINDOW_HOP, WINDOWS

    axis = graph.constant("time", np.array([1], np.int64))
    windows = []
    for w in range(WINDOWS):
        first, last = (np.array([n], np.int64) for n in (WINDOW_HOP * w, WINDOW_HOP * w + bins))
        bounds = graph.constant(f"from{w}", first), graph.constant(f"to{w}", last)
        windows.append(graph.node("Slice", x, *bounds, axis))
    x = graph.reshape(graph.node("Concat", *windows, axis=0), -1, 1, bins, bins)  # (W * B, 1, T, F)
    x = _convolutions(graph, params, x)
    return graph.reshape(x, WINDOWS, -1, params["lstm1.wx"].shape[0])


def _dense(graph: Graph, params: dict[str, Any], name: str, x: str) -> str:
    w = graph.constant(f"{name}.w", params[f"{name}.w"])
    return graph.node("Gemm", x, w, graph.constant(f"{name}.b", params[f"{name}.b"]))


def _lstm(graph: Graph, params: dict[str, Any], name: str, x: str) -> str:
    """(T, B, I) -> (T, B, H). ONNX orders the gates input, output, forget, cell; ours: input, forget, cell, output."""

    def gates(value: NDArray[Any]) -> NDArray[Any]:
        i, f, c, o = np.split(value, 4, axis=-1)
        return np.concatenate([i, o, f, c], axis=-1)

    wx, wh, b = (gates(params[f"{name}.{part}"]) for part in ("wx", "wh", "b"))
    hidden = wh.shape[0]
    weights = (
        graph.constant(f"{name}.wx", wx.T[None]),
        graph.constant(f"{name}.wh", wh.T[None]),
        graph.constant(f"{name}.b", np.concatenate([b, np.zeros_like(b)])[None]),
    )
    y = graph.node("LSTM", x, *weights, hidden_size=hidden)  # (T, 1, B, H): one direction
    return graph.node("Squeeze", y, graph.constant(f"{name}.direction", np.array([1], np.int64)))


def _last(graph: Graph, x: str) -> str:
    """(T, B, H) -> (B, H) of the last step."""
    return graph.node("Gather", x, graph.constant("last", np.array(-1, np.int64)), axis=0)


def difference(graph: Graph, content: bytes, models: Sequence[Model], windows: int = 8) -> float:
    """The largest difference between the models' probabilities and ONNX Runtime's, over random windows."""
    scale = standardisation(models[0])
    rng = np.random.default_rng(0)
    shape = (windows, models[0].input_frames, models[0].settings["bins"])
    frames = (scale.mean + scale.deviation * rng.standard_normal(shape)).astype(np.float32)
    options = graph.runtime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = graph.runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (p,) = session.run(["probabilities"], {"frames": frames})
    ours = np.mean([model.predict_proba(standardisation(model).apply(frames)) for model in models], axis=0)
    return float(np.abs(p - ours).max())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status, raises UserError or RunFailed."""
    parser = Parser(
        prog="python -m npser.export",
        description="Write a trained model as ONNX, which browsers, phones and other programs run without Python. "
        "Input frames (batch, frames, 128): natural logarithms of the magnitudes of bins 0 to 127 of a 256-point "
        "Fourier transform with a periodic Hann window every 128 samples, at least log 0.001, of 16 kHz samples within "
        "[-1, 1], not standardised. Output probabilities (batch, emotions). Labels, features and training are in the "
        "file's metadata.",
        epilog="What is written was run by ONNX Runtime first, and gave the same probabilities within 1e-5. Needs "
        "pip install 'npser[onnx]'. Exit status: 0 ok, 1 the check failed or the disk is full, 2 wrong use or bad "
        "input.",
    )
    parser.add_argument("model", metavar="MODEL.npz", type=Path, help="a model that npser.train saved")
    parser.add_argument("target", metavar="MODEL.onnx", type=Path, help="the file to write")
    parser.add_argument(
        "--with",
        dest="others",
        action="append",
        default=[],
        type=Path,
        metavar="OTHER.npz",
        help="another model of the same kind that decides, too: probabilities are averaged; may be repeated",
    )
    options = parser.parse_args(arguments)
    graph = Graph()
    if options.target.suffix != ".onnx":
        raise UserError(f"{options.target}: the file to write is called something.onnx")
    require_place(options.target, str(options.target))
    models = load_together([options.model, *options.others], "cpu", standardisation)
    content = build(graph, models).SerializeToString()
    apart = difference(graph, content, models)
    if not apart <= TOLERANCE:
        raise RunFailed(f"ONNX Runtime's probabilities differ by {apart:.1e}, more than {TOLERANCE:g}: nothing written")
    _write(options.target, content)
    kind = models[0].arch if len(models) == 1 else f"{len(models)} networks of kind {models[0].arch}"
    print(
        f"{options.target}: {kind}, {len(content) / 1e6:.2f} MB, opset {OPSET}; ONNX Runtime "
        f"{graph.runtime.__version__} gives the same probabilities within {apart:.1e}"
    )
    return 0


def _write(target: Path, content: bytes) -> None:
    try:
        with replacing(target) as file:
            file.write(content)
    except OSError as error:
        raise RunFailed(f"{target}: cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    run("npser.export", main)
