"""Where gradients go: into the parameters (SGD), or into a dictionary (Gradients).

A backward pass hands every gradient on as soon as it has it, by one of two calls that both classes answer:

    sink.add(k, name, w, dw)               a gradient that exists as an array
    sink.add_product(k, name, w, x, dy)    dw = x^T dy, which need not be stored to be used

so the same backward pass serves a gradient check, which wants arrays, and training, where the gradient of a matrix of
134 million weights is used up while it is still in registers. `k` is the rung of `kernels` that computes.
"""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Protocol

import kernels
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

    Holds the velocities and n, so it serves one model; keep it between steps. With clip_norm, gradients whose common
    Euclidean norm exceeds it are first scaled down to it (Pascanu, Mikolov and Bengio 2013): recurrent networks need it
    where the error explodes on its way back through time. Off by default, as in the paper. With final_rate, the rate
    falls further, linearly, to that share of itself after `total` updates; it stays there.
    """

    def __init__(
        self,
        lr: float = 0.01,
        momentum: float = 0.8,
        decay: float = 1e-6,
        clip_norm: float | None = None,
        final_rate: float = 1.0,
        total: int = 1,
    ) -> None:
        self.lr, self.momentum, self.decay, self.clip_norm = lr, momentum, decay, clip_norm
        self.final_rate, self.total = final_rate, total
        self.updates = 0
        self.velocities: dict[str, Array] = {}

    @property
    def rate(self) -> float:
        """The learning rate of the next update."""
        fallen = (1 - self.final_rate) * min(self.updates / self.total, 1)
        return self.lr / (1 + self.decay * self.updates) * (1 - fallen)

    def _velocity(self, k: ModuleType, name: str, w: Array) -> Array:
        if name not in self.velocities:
            self.velocities[name] = kernels.arrays(k).zeros_like(w)
        return self.velocities[name]

    def update(self, k: ModuleType, params: Mapping[str, Array], backward: Callable[[Sink], object]) -> None:
        """One update; `backward` runs the backward pass into the sink that it is given."""
        if self.clip_norm is None:
            backward(self)
        else:  # the norm is known when all gradients are: they are collected first
            gradients = Gradients()
            backward(gradients)
            clipped = kernels.arrays(k).shortened(list(gradients.arrays.values()), self.clip_norm)
            for name, dw in zip(gradients.arrays, clipped, strict=True):
                self.add(k, name, params[name], dw)
        self.updates += 1

    def add(self, k: ModuleType, name: str, w: Array, dw: Array) -> None:
        k.sgd_update(w, self._velocity(k, name, w), dw, self.rate, self.momentum)

    def add_product(self, k: ModuleType, name: str, w: Array, x: Array, dy: Array) -> None:
        k.dense_update_weights(x, dy, w, self._velocity(k, name, w), self.rate, self.momentum)
