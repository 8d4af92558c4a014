"""What the paper leaves open and no recipe changes: one thing at a time, tried by `bench.develop --variant NAME`.

They are here to show what such choices are worth, on development data, and are no options of npser's own commands.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from npser.errors import UserError
from npser.features import FLOOR, magnitude, transforming
from npser.recipes import ARCHITECTURES

if TYPE_CHECKING:
    from npser.corpus import Corpus
    from npser.crossval import Frames
    from npser.layers import Dropout, Layer
    from npser.models import Model

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Variant:
    """One thing that is otherwise than in the recipes; what is left away stays as it is."""

    what: str
    frames: Callable[[Floats], Floats] | None = None  # an utterance's magnitudes (frames, 128) -> what stands for them
    recording: Callable[[Floats, np.random.Generator], Floats] | None = None  # samples: heard beside the others
    network: Callable[["Model"], None] | None = None  # changes a fresh network
    speeds: tuple[float, ...] = ()  # at which development utterances are scored, beside 1
    networks: tuple[str, ...] = ARCHITECTURES  # for which it is one


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


def _dropouts(layer: "Layer") -> "list[Dropout]":
    """All dropout layers, in their order."""
    from npser.layers import Dropout, Sequential, TimeDistributed

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


_BLOCKS = ("cnn", "tdcnn")  # the networks with convolutions
VARIANTS: Mapping[str, Variant] = {
    "floor-0.0001": Variant("the logarithm's floor 0.0001", frames=partial(_log, floor=0.0001)),
    "cube-root": Variant("the cube root of the magnitudes instead of their logarithm", frames=_root),
    "utterance": Variant("each utterance standardised by its own statistics before", frames=_utterance),
    "utterance-mean": Variant("each utterance's own mean subtracted from each bin before", frames=_utterance_mean),
    "noise": Variant("utterances heard with white noise, too, 10 to 30 dB below them", recording=_noisy),
    "he": Variant("initial weights after He et al.", network=_he, networks=_BLOCKS),
    "half-dropout": Variant("dropout 0.5", network=partial(_rates, convolutions=0.5, dense=0.5), networks=_BLOCKS),
    "dense-dropout": Variant(
        "dropout behind the dense layer only", network=partial(_rates, convolutions=0, dense=0.25), networks=("cnn",)
    ),
    "speeds-scoring": Variant("scored at speeds 0.95, 1 and 1.05 together", speeds=(0.95, 1.05)),
}


def combined(names: Sequence[str], arch: str) -> Variant:
    """Some variants as one. UserError where two change the same, or one changes nothing of this network."""
    made, by = Variant(""), dict[str, str]()
    for name in names:
        variant = VARIANTS[name]
        if arch not in variant.networks:
            raise UserError(f"--variant {name}: changes nothing of the {arch}")
        for field in fields(Variant):
            if field.name in ("what", "networks") or not (change := getattr(variant, field.name)):
                continue
            if field.name in by:
                raise UserError(f"--variant {name}: changes what {by[field.name]} does, too: give one of the two")
            by[field.name], made = name, replace(made, **{field.name: change})
    return made


def versions(
    corpus: "Corpus", backend: str, threads: int, speeds: Sequence[float], variant: Variant
) -> "tuple[list[Frames], list[Frames]]":
    """What `npser.frontend.read_versions` gives, changed by the variant; and the recordings that it adds."""
    import kernels
    from npser.features import log_magnitude
    from npser.frontend import at_speed, read_versions

    k = kernels.rung(transforming(backend))

    def frames(samples: Floats) -> Floats:
        return variant.frames(magnitude(k, samples)) if variant.frames else log_magnitude(k, samples)

    made: list[Frames]
    if variant.frames:
        made = [[frames(at_speed(corpus.read(u), speed)) for u in corpus.utterances] for speed in (1.0, *speeds)]
    else:
        made = [*read_versions(corpus, backend, threads, speeds)]
    if not variant.recording:
        return made, []
    rng = np.random.default_rng(0)
    return made, [[frames(variant.recording(corpus.read(u), rng)) for u in corpus.utterances]]
