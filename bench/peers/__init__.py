"""The candidates: how each of them computes the workloads of `bench.workloads`.

A module of this folder has one function for each kind of workload that it can do, under the name of the kind:

    conv_block(inputs, sizes, variant) -> Prepared, or None for sizes that it cannot do

`inputs` are arrays in the layout of `kernels`; whatever a candidate wants to have changed about them once (transposed
weights, a compiled graph) is done before the clock runs.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeAlias

from kernels.reference import Array

Inputs: TypeAlias = dict[str, Array]
Sizes: TypeAlias = dict[str, Any]


def by_the_clock(call: Callable[[], object], count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - started


@dataclass(frozen=True)
class Prepared:
    """What is compared with the reference, and what is timed.

    outputs: the results by name, in the layout of `kernels`; called once, before anything is timed. begin: makes what
    is timed, a function that does one repetition; on the cpu it returns when its result is there. seconds: how long so
    many calls of it take, the last one's result included.
    """

    outputs: Callable[[], Inputs]
    begin: Callable[[], Callable[[], object]]
    seconds: Callable[[Callable[[], object], int], float] = by_the_clock


@dataclass(frozen=True)
class Candidate:
    """One column of the tables."""

    name: str
    what: str  # for the reader
    module: str
    variant: str = ""
    packages: tuple[str, ...] = ()  # what it needs beside npser's own
    device: str = "cpu"
    tf32: bool = False  # products and convolutions on the tensor cores, with 10 instead of 23 bits of mantissa

    def tolerance(self, tolerance: float) -> float:
        """How far its results may be from the reference's where float32 may be as far as `tolerance`."""
        return TF32_TOLERANCE * tolerance if self.tf32 else tolerance

    def missing(self) -> list[str]:
        return [package for package in self.packages if find_spec(package) is None]

    def prepare(self, kind: str, inputs: Inputs, sizes: Sizes) -> Prepared | None:
        """None where this candidate has nothing to offer. To be called in its own process: it imports its packages."""
        module = import_module(f"bench.peers.{self.module}")
        if not hasattr(module, kind) or kind in getattr(module, "NOT_WITH", {}).get(self.variant, ()):
            return None
        if self.device != "cpu":
            module.use_gpu(self.tf32)
        prepared: Prepared | None = getattr(module, kind)(inputs, sizes, self.variant)
        return prepared


OURS = Candidate("npser", "this project", "ours", "cpu")
REFERENCE = Candidate("reference", "plain NumPy", "ours", "reference")
TORCH = Candidate("torch", "PyTorch eager, updates by the fused SGD", "torch_", "eager", ("torch",))
TORCH_NHWC = Candidate("torch-nhwc", "the same, images and weights channels last", "torch_", "nhwc", ("torch",))
TORCH_LOOP = Candidate("torch-loop", "PyTorch eager, updates by the plain loop", "torch_", "loop", ("torch",))
TORCH_COMPILE = Candidate("torch.compile", "PyTorch compiled by Inductor", "torch_", "compile", ("torch",))
JAX = Candidate("jax", "JAX, compiled by jit", "jax_", "", ("jax",))
ONNX = Candidate("onnxruntime", "ONNX Runtime, for inference", "onnx_", "", ("onnx", "onnxruntime"))
CANDIDATES = (OURS, TORCH, TORCH_NHWC, TORCH_LOOP, TORCH_COMPILE, JAX, ONNX)

# On a GPU, float32 first; the names of ours and the reference are those of the cpu.
TF32_TOLERANCE = 50
_CUDA: Any = {"device": "cuda"}
_TF32: Any = {"device": "cuda", "tf32": True}
CUDA_OURS = Candidate(OURS.name, "this project, float32", "ours", "cuda", **_CUDA)
CUDA_OURS_TF32 = Candidate("npser-tf32", "this project, --precision tf32", "ours", "cuda", **_TF32)
CUDA_TORCH = Candidate("torch", "PyTorch eager, TF32 off, fused SGD", "torch_", "eager", ("torch",), **_CUDA)
CUDA_NHWC = Candidate("torch-nhwc", "the same, channels last", "torch_", "nhwc", ("torch",), **_CUDA)
CUDA_GRAPH = Candidate("torch-graph", "the same as torch, one CUDA graph", "torch_", "graph", ("torch",), **_CUDA)
CUDA_COMPILE = Candidate("torch.compile", "PyTorch compiled, TF32 off", "torch_", "compile", ("torch",), **_CUDA)
CUDA_TORCH_TF32 = Candidate("torch-tf32", "PyTorch eager, TF32 on", "torch_", "eager", ("torch",), **_TF32)
CUDA_GRAPH_TF32 = Candidate(
    "graph-tf32", "channels last, CUDA graph, TF32 on", "torch_", "nhwc-graph", ("torch",), **_TF32
)
CUDA_JAX = Candidate("jax", "JAX, compiled by jit, TF32 off", "jax_", "", ("jax",), **_CUDA)
CUDA_JAX_TF32 = Candidate("jax-tf32", "JAX, TF32 on", "jax_", "", ("jax",), **_TF32)
CUDA_CANDIDATES = (
    CUDA_OURS, CUDA_OURS_TF32, CUDA_TORCH, CUDA_NHWC, CUDA_GRAPH, CUDA_COMPILE, CUDA_TORCH_TF32, CUDA_GRAPH_TF32,
    CUDA_JAX, CUDA_JAX_TF32,
)  # fmt: skip
NO_RIVALS = frozenset(c.name for c in (*CANDIDATES, *CUDA_CANDIDATES) if c.module == "ours" or c.tf32)
"""Whom `ratio` leaves out: ourselves, and those that compute with fewer bits than our float32."""
ON_DEVICE = {"cpu": CANDIDATES, "cuda": CUDA_CANDIDATES}


def named(name: str, device: str = "cpu") -> Candidate:
    """The candidate (or the reference) of this name."""
    return next(candidate for candidate in (*ON_DEVICE[device], REFERENCE) if candidate.name == name)
