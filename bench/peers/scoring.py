"""Whole utterances, as somebody would label them who has a network in another framework and npser's front end."""

from collections.abc import Callable

import numpy as np

from bench.peers import Inputs, Prepared, Sizes
from bench.workloads import utterances, window_shape
from kernels import reference
from kernels.reference import Array
from npser.features import Standardisation, WindowSet, log_magnitude

BATCH = 32


def standardisation(a: Inputs) -> Standardisation:
    """The statistics of the recordings themselves: the weights are random, and any will do."""
    return Standardisation.of([log_magnitude(reference, x) for x in utterances(a)])


def label_with(score: Callable[[Array], Array], a: Inputs, s: Sizes) -> Prepared:
    """Samples to the mean probabilities of each utterance's windows; score (BATCH, frames, bins) -> (BATCH, K).

    The last batch is filled up with windows that do not count: compiled graphs have one shape.
    """
    frames, bins = window_shape(s)
    scale = standardisation(a)

    def probabilities(samples: list[Array]) -> Array:
        windows = WindowSet([log_magnitude(reference, x) for x in samples], scale, frames, s["hop"])
        batch = np.zeros((BATCH, frames, bins), np.float32)
        parts = []
        for at in range(0, len(windows), BATCH):
            which = np.arange(at, min(at + BATCH, len(windows)))
            batch[: len(which)] = windows.batch(which)
            parts.append(score(batch)[: len(which)])
        p = np.concatenate(parts)
        sums = np.zeros((len(samples), p.shape[1]))
        np.add.at(sums, windows.owner, p)
        return sums / sums.sum(axis=1, keepdims=True)

    everything = utterances(a)
    return Prepared(lambda: {"p": probabilities(everything[: s["checked"]])}, lambda: lambda: probabilities(everything))
