"""What config.json says of a run, and that another run says something else."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile

from npser import synthetic, train
from npser.corpus import open_corpus
from npser.crossval import Settings
from npser.errors import UserError
from npser.recipes import RECIPES
from npser.runconfig import audio_sha256, listing_sha256, run_config, settings_of
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


def test_other_recordings_under_the_same_names_are_another_corpus(tones, tmp_path):
    before = open_corpus(str(tones))
    copy = shutil.copytree(tones, tmp_path / tones.name)
    same = open_corpus(str(copy))
    assert (listing_sha256(same), audio_sha256(same)) == (listing_sha256(before), audio_sha256(before))
    options = ["--arch", "lstm", "--folds", "2", "--repeats", "1", "--epochs", "1", "--segment-hop", "80"]
    command = [*options, "--only", "0.0", "--data", str(copy), "--out", str(tmp_path / "run")]
    assert train.main(command) == 0
    noisy = copy / "happy" / "high0.wav"
    samples, rate = soundfile.read(noisy)
    soundfile.write(noisy, 0.9 * samples, rate)
    with pytest.raises(UserError, match=r"what the recordings hold \(SHA-256\) was"):
        train.main(command)


def test_another_synthesiser_makes_another_built_in_corpus(tmp_path, monkeypatch):
    before = audio_sha256(CORPUS)
    changed = tmp_path / "synthetic.py"
    changed.write_text(Path(synthetic.__file__).read_text(encoding="utf-8") + "# otherwise\n", encoding="utf-8")
    monkeypatch.setattr(synthetic, "__file__", str(changed))
    assert audio_sha256(CORPUS) != before


def test_a_recording_that_cannot_be_read_is_named(tones, monkeypatch):
    """Frames that are kept would let a run begin without it."""

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match=r"high0\.wav: cannot be read \(Permission denied\): check its permissions"):
        audio_sha256(open_corpus(str(tones)))


@pytest.mark.parametrize("recipe", ["paper", "best"])
def test_settings_survive_the_configuration(recipe):
    settings = Settings("cnn", "cpu", 3, "majority", RECIPES[recipe]["cnn"])
    config = run_config(CORPUS, settings, recipe, "stratified", 4, 2, "float32", 1)
    assert settings_of(config) == settings
    assert (config["folds"], config["repeats"], config["recipe"]) == (4, 2, recipe)
