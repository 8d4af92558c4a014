"""What the paper leaves silent and no recipe changes: one thing at a time, tried by `bench.develop --variant NAME`.

They are here to show what such choices are worth, on development data, and are no options of npser's own commands.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from npser.errors import UserError
from npser.features import FLOOR, transforming
from npser.layers import Dropout, Layer, Sequential, TimeDistributed

if TYPE_CHECKING:
    from npser.corpus import Corpus
    from npser.crossval import Versions
    from npser.models import Model

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Variant:
    """One thing that is otherwise than in the recipes; what is left away stays as it is."""

    what: str
    frames: Callable[[Floats], Floats] | None = None  # an utterance's magnitudes (frames, 128) -> what stands for them
    recording: Callable[[Floats, np.random.Generator], Floats] | None = None  # samples: heard beside the others
    network: Callable[["Model"], None] | None = None  # changes a fresh network
    hop: int | None = None  # frames between windows when development utterances are scored
    speeds: tuple[float, ...] = ()  # at which they are heard, beside 1; their probabilities are averaged


# --- what the network reads --------------------------------------------------------------------------------------


def _log(magnitude: Floats, floor: float = FLOOR) -> Floats:
    return np.log(np.maximum(magnitude, np.float32(floor)))


def _root(magnitude: Floats) -> Floats:
    return np.cbrt(magnitude)


def _utterance(magnitude: Floats) -> Floats:
    frames = _log(magnitude)
    return (frames - frames.mean(axis=0)) / np.maximum(frames.std(axis=0), np.float32(1e-3))


def _utterance_mean(magnitude: Floats) -> Floats:
    frames = _log(magnitude)
    return frames - frames.mean(axis=0)


def _level(magnitude: Floats) -> Floats:
    """Every utterance equally loud: a frame's squared magnitudes sum to 14^2 on average, as in EMO-DB's median."""
    return _log(magnitude * np.float32(14 / np.sqrt(np.square(magnitude).sum(axis=1).mean())))


def _noisy(samples: Floats, rng: np.random.Generator) -> Floats:
    """White noise, 10 to 30 dB below the utterance."""
    power = float(np.square(samples, dtype=np.float64).mean()) * 10 ** -rng.uniform(1, 3)
    noise = rng.standard_normal(len(samples), dtype=np.float32)
    return samples + np.float32(np.sqrt(power)) * noise


# --- the network -------------------------------------------------------------------------------------------------


def _he(model: "Model") -> None:
    """Initial weights of the layers before a ReLU as He et al. (2015): sqrt(6 / fan_in) instead of Glorot's limit."""
    for name, value in model.params.items():
        if name.endswith(".w") and name != "out.w":
            taps = int(np.prod(value.shape[:-2]))
            fan_in, fan_out = taps * value.shape[-2], taps * value.shape[-1]
            model.set_params({name: value * np.float32(np.sqrt((fan_in + fan_out) / fan_in))})


def _dropouts(layer: Layer) -> list[Dropout]:
    """All dropout layers, in their order."""
    inner: Sequence[Layer] = ()
    if isinstance(layer, Sequential):
        inner = layer.layers
    elif isinstance(layer, TimeDistributed):
        inner = [layer.layer]
    return [layer] if isinstance(layer, Dropout) else list(chain.from_iterable(map(_dropouts, inner)))


def _rates(model: "Model", convolutions: float, dense: float) -> None:
    """Dropout behind the two convolutions, and behind the dense layer."""
    for number, dropout in enumerate(_dropouts(model.layers)):
        dropout.rate = convolutions if number < 2 else dense


VARIANTS: Mapping[str, Variant] = {
    "floor-0.01": Variant("the logarithm's floor 0.01", frames=partial(_log, floor=0.01)),
    "floor-0.0001": Variant("the logarithm's floor 0.0001", frames=partial(_log, floor=0.0001)),
    "cube-root": Variant("the cube root of the magnitudes instead of their logarithm", frames=_root),
    "utterance": Variant("each utterance standardised by its own statistics before", frames=_utterance),
    "utterance-mean": Variant("each utterance's own mean subtracted from each bin before", frames=_utterance_mean),
    "level": Variant("each utterance equally loud", frames=_level),
    "he": Variant("initial weights after He et al.", network=_he),
    "no-dropout": Variant("no dropout", network=partial(_rates, convolutions=0, dense=0)),
    "dense-dropout": Variant("dropout in the dense layer only", network=partial(_rates, convolutions=0, dense=0.25)),
    "half-dropout": Variant("dropout 0.5", network=partial(_rates, convolutions=0.5, dense=0.5)),
    "noise": Variant("utterances heard with white noise, too, 10 to 30 dB below them", recording=_noisy),
    "dense-scoring": Variant("scored by windows every 4 frames", hop=4),
    "speeds-scoring": Variant("scored at speeds 0.95, 1 and 1.05", speeds=(0.95, 1.05)),
}  # fmt: skip


def versions(
    corpus: "Corpus", backend: str, threads: int, speeds: Sequence[float], variants: Sequence[Variant]
) -> "Versions":
    """What `npser.frontend.read_versions` gives, changed by the variants; recordings that one adds come last."""
    import kernels
    from npser.features import log_magnitude, magnitude
    from npser.frontend import at_speed, read_versions

    changes = [v.frames for v in variants if v.frames]
    additions = [v.recording for v in variants if v.recording]
    if len(changes) > 1:
        raise UserError("--variant: two of them say what the network reads: give one of these")
    k = kernels.rung(transforming(backend))
    change = changes[0] if changes else None

    def frames(samples: Floats) -> Floats:
        return change(magnitude(k, samples)) if change else log_magnitude(k, samples)

    made: list[list[Floats]] = (
        [[frames(at_speed(corpus.read(u), speed)) for u in corpus.utterances] for speed in (1.0, *speeds)]
        if change
        else read_versions(corpus, backend, threads, speeds)
    )
    for addition in additions:
        rng = np.random.default_rng(0)
        made.append([frames(addition(corpus.read(u), rng)) for u in corpus.utterances])
    return made
