"""The candidates: how each of them computes the workloads of `bench.workloads`.

A module of this folder has one function for each kind of workload that it can do, under the name of the kind:

    conv_block(inputs, sizes, variant) -> Prepared, or None for sizes that it cannot do

`inputs` are arrays in the layout of `kernels`; whatever a candidate wants to have changed about them once (transposed
weights, a compiled graph) is done before the clock runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeAlias

from kernels.reference import Array

Inputs: TypeAlias = dict[str, Array]
Sizes: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """What is compared with the reference, and what is timed.

    outputs: the results by name, in the layout of `kernels`; called once, before anything is timed. begin: makes what
    is timed, a function that does one repetition and returns when its result is there.
    """

    outputs: Callable[[], Inputs]
    begin: Callable[[], Callable[[], object]]


@dataclass(frozen=True)
class Candidate:
    """One column of the tables."""

    name: str
    what: str  # for the reader
    module: str
    variant: str = ""
    packages: tuple[str, ...] = ()  # what it needs beside npser's own

    def missing(self) -> list[str]:
        return [package for package in self.packages if find_spec(package) is None]

    def prepare(self, kind: str, inputs: Inputs, sizes: Sizes) -> Prepared | None:
        """None where this candidate has nothing to offer. To be called in its own process: it imports its packages."""
        module = import_module(f"bench.peers.{self.module}")
        if not hasattr(module, kind) or kind in getattr(module, "NOT_WITH", {}).get(self.variant, ()):
            return None
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


def named(name: str) -> Candidate:
    """The candidate (or the reference) of this name."""
    return next(candidate for candidate in (*CANDIDATES, REFERENCE) if candidate.name == name)
