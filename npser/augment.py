"""Augmentation: every epoch hears the training utterances a little differently. Our addition, not the paper's.

Each utterance is heard at one of several speeds (pitch and formants move along, as when a tape runs faster), and its
windows begin anywhere within their share of it. An epoch keeps its number of windows. The draw is made on the host,
once an epoch.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from npser.features import Standardisation, Windows, padded
from npser.recipes import Recipe

Frames = NDArray[np.float32]


class AugmentedWindows(Windows):
    """The windows of some utterances, drawn anew for every epoch.

    versions[0] holds the utterances' own frames, the other lists the same utterances at other speeds.
    """

    def __init__(
        self, versions: Sequence[Sequence[Frames]], scale: Standardisation, length: int, recipe: Recipe
    ) -> None:
        super().__init__([len(frames) for frames in versions[0]], length, recipe.segment_hop)
        self.versions, self.scale, self.recipe = versions, scale, recipe

    def epoch(self, rng: np.random.Generator) -> tuple[Frames, NDArray[np.intp]]:
        made = []
        for number in range(len(self.first)):
            version = int(rng.integers(len(self.versions)))
            made.append(self.scale.apply(padded(self.versions[version][number], self.length)))
        lengths = np.array([len(frames) for frames in made])
        first = np.cumsum(lengths) - lengths
        counts = np.bincount(self.owner)
        count = counts[self.owner]
        place = (
            np.arange(len(self.owner)) - (np.cumsum(counts) - counts)[self.owner]
        )  # of a window among its utterance's
        share = rng.random(len(self.owner)) if self.recipe.moving else 0.0
        places = lengths[self.owner] - self.length + 1  # where a window may begin
        return np.concatenate(made), first[self.owner] + ((place + share) * places / count).astype(np.intp)
