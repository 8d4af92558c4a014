"""Where gradients go: into the parameters (SGD), or into a dictionary (Gradients).

A backward pass hands every gradient on as soon as it has it, by one of two calls that both classes answer:

    sink.add(k, name, w, dw)               a gradient that exists as an array
    sink.add_product(k, name, w, x, dy)    dw = x^T dy, which need not be stored to be used

so the same backward pass serves a gradient check, which wants arrays, and training, where the gradient of a matrix of
134 million weights is used up while it is still in registers. `k` is the rung of `kernels` that computes.
"""

from types import ModuleType
from typing import Protocol

import numpy as np

from kernels.reference import Array


class Sink(Protocol):
    """What a backward pass hands its gradients to."""

    def add(self, k: ModuleType, name: str, w: Array, dw: Array) -> None: ...

    def add_product(self, k: ModuleType, name: str, w: Array, x: Array, dy: Array) -> None: ...


class Gradients:
    """Collects the plain gradients: `arrays` maps parameter names to gradients."""

    def __init__(self) -> None:
        self.arrays: dict[str, Array] = {}

    def add(self, k: ModuleType, name: str, w: Array, dw: Array) -> None:
        self.arrays[name] = dw

    def add_product(self, k: ModuleType, name: str, w: Array, x: Array, dy: Array) -> None:
        self.arrays[name] = k.dense_backward_weights(x, dy)


class SGD:
    """Stochastic gradient descent with momentum and learning-rate decay, as Keras 1 had it (paper: 0.01, 0.8, 1e-6).

        lr_n = lr / (1 + decay * n)         n = updates done so far
        v <- momentum * v - lr_n * dw       w <- w + v

    Holds the velocities and n, so it serves one model; keep it between steps.
    """

    def __init__(self, lr: float = 0.01, momentum: float = 0.8, decay: float = 1e-6) -> None:
        self.lr, self.momentum, self.decay = lr, momentum, decay
        self.updates = 0
        self.velocities: dict[str, Array] = {}

    @property
    def rate(self) -> float:
        """The learning rate of the next update."""
        return self.lr / (1 + self.decay * self.updates)

    def _velocity(self, name: str, w: Array) -> Array:
        if name not in self.velocities:
            self.velocities[name] = np.zeros_like(w)
        return self.velocities[name]

    def add(self, k: ModuleType, name: str, w: Array, dw: Array) -> None:
        k.sgd_update(w, self._velocity(name, w), dw, self.rate, self.momentum)

    def add_product(self, k: ModuleType, name: str, w: Array, x: Array, dy: Array) -> None:
        k.dense_update_weights(x, dy, w, self._velocity(name, w), self.rate, self.momentum)
