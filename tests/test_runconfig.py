"""What config.json says of a run, and that another run says something else."""

from dataclasses import replace

import pytest

from npser.crossval import Settings
from npser.recipes import RECIPES
from npser.runconfig import listing_sha256, run_config, settings_of
from npser.synthetic import demo_corpus

CORPUS = demo_corpus()


def split(first):
    """The corpus with a given split: every other utterance is on the first side."""
    sides = first, "test" if first == "train" else "train"
    return replace(CORPUS, utterances=tuple(replace(u, split=sides[n % 2]) for n, u in enumerate(CORPUS.utterances)))


def test_a_listing_knows_utterances_speakers_emotions_and_sides():
    first = CORPUS.utterances[0]
    others = [replace(first, **{field: "another"}) for field in ("name", "speaker", "emotion")]
    corpora = [replace(CORPUS, utterances=(u, *CORPUS.utterances[1:])) for u in (first, *others)]
    corpora += [split("train"), split("test")]
    assert len({listing_sha256(corpus) for corpus in corpora}) == len(corpora)


@pytest.mark.parametrize("recipe", ["paper", "best"])
def test_settings_survive_the_configuration(recipe):
    settings = Settings("cnn", "cpu", 3, "majority", RECIPES[recipe]["cnn"])
    config = run_config(CORPUS, settings, recipe, "stratified", 4, 2, "float32", 1)
    assert settings_of(config) == settings
    assert (config["folds"], config["repeats"], config["recipe"]) == (4, 2, recipe)
