"""The demonstration corpus: reproducible, speech-like in its bounds, and neither trivial nor hopeless to classify."""

import hashlib
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import soundfile

from npser import synthetic
from npser.audio import SAMPLE_RATE
from npser.corpus import PAPER_LABELS, open_corpus
from npser.errors import UserError
from npser.synthetic import demo_corpus, main


@pytest.fixture(scope="module")
def corpus():
    return demo_corpus()


@pytest.fixture(scope="module")
def recordings(corpus):
    return [corpus.read(utterance) for utterance in corpus.utterances]


def mean_features(samples):
    """(130,): mean log spectrum (frames of 256, hop 128, bins 0..127), log of the median pitch, log energy."""
    frames = np.lib.stride_tricks.sliding_window_view(samples, 256)[::128] * np.hanning(257)[:-1]
    spectrum = np.log(np.maximum(np.abs(np.fft.rfft(frames)[:, :128]), 1e-3)).mean(axis=0)
    window = np.hanning(640)
    frames = np.lib.stride_tricks.sliding_window_view(samples, 640)[::320]
    energy = (frames**2).mean(axis=1)
    power = np.abs(np.fft.rfft(frames[energy > energy.mean() / 4] * window, 2048)) ** 2
    # Autocorrelation without the window's own fall towards long lags; lags of 60 to 400 Hz.
    correlation = np.fft.irfft(power)[:, :267] / np.fft.irfft(np.abs(np.fft.rfft(window, 2048)) ** 2)[:267]
    lag = np.median(40 + correlation[:, 40:].argmax(axis=1))
    return np.concatenate([spectrum, [np.log(SAMPLE_RATE / lag), np.log(np.mean(samples**2))]])


def centroid_uar(features, targets, rng, folds=10):
    """Unweighted average recall of the nearest centroid of standardised features, stratified cross-validation."""
    fold = np.empty(len(targets), dtype=int)
    for label in range(7):
        members = rng.permutation(np.flatnonzero(targets == label))
        fold[members] = np.arange(len(members)) % folds
    predicted = np.empty_like(targets)
    for f in range(folds):
        train = fold != f
        z = (features - features[train].mean(axis=0)) / features[train].std(axis=0)
        centroids = np.array([z[train & (targets == label)].mean(axis=0) for label in range(7)])
        predicted[~train] = ((z[~train, None] - centroids) ** 2).sum(axis=2).argmin(axis=1)
    return np.mean([(predicted[targets == label] == label).mean() for label in range(7)])


def test_balance_names_and_labels(corpus):
    assert corpus.name == "demo"
    assert corpus.labels == PAPER_LABELS
    assert corpus.skipped == ()
    assert len(corpus.speakers) == 10
    assert set(Counter((u.speaker, u.emotion) for u in corpus.utterances).values()) == {6}
    assert len(corpus.utterances) == 420
    names = [u.name for u in corpus.utterances]
    assert names == sorted(set(names))
    anger = next(u for u in corpus.utterances if u.name == "s03-anger-2.wav")
    assert (anger.speaker, anger.emotion, anger.path) == ("s03", "anger", "demo/s03-anger-2.wav")
    assert open_corpus("demo").utterances == corpus.utterances


def test_samples_are_sound(recordings):
    for samples in recordings:
        assert samples.dtype == np.float32
        assert samples.ndim == 1
        assert samples.flags.c_contiguous
        assert np.isfinite(samples).all()
        assert 1.2 <= samples.size / SAMPLE_RATE <= 4
        assert 0.05 < np.abs(samples).max() <= 1
        assert abs(samples.mean()) < 0.02


def test_utterances_differ(recordings):
    assert len({samples.tobytes() for samples in recordings}) == len(recordings)


def test_reading_is_a_function_of_the_utterance_alone(corpus, recordings):
    np.random.seed(1)  # noqa: NPY002  the global generator must have no influence
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    again = demo_corpus()
    for i in (17, 3, 200, 3):
        assert again.read(again.utterances[i]).tobytes() == recordings[i].tobytes()
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002  nor be advanced
    more_takes = demo_corpus(takes=7)
    same = next(u for u in more_takes.utterances if u.name == corpus.utterances[5].name)
    assert more_takes.read(same).tobytes() == recordings[5].tobytes()


def test_another_process_generates_the_same(corpus, recordings):
    script = (
        "import hashlib; from npser.synthetic import demo_corpus; c = demo_corpus(); "
        "print(hashlib.sha256(c.read(c.utterances[42]).tobytes()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashlib.sha256(recordings[42].tobytes()).hexdigest()


def test_speakers_cover_low_and_high_voices():
    speakers = [synthetic._speaker(number) for number in range(1, 11)]
    pitches = [speaker.pitch for speaker in speakers]
    assert 85 <= min(pitches) < 100
    assert 230 < max(pitches) <= 260
    assert len(set(pitches)) == 10
    assert all(0.85 <= speaker.tract <= 1.18 for speaker in speakers)


def test_pitch_of_the_emotions_follows_the_literature(corpus, recordings):
    pitch = {label: [] for label in PAPER_LABELS}
    for utterance, samples in zip(corpus.utterances, recordings, strict=True):
        pitch[utterance.emotion].append(mean_features(samples)[128])
    mean = {label: np.mean(values) for label, values in pitch.items()}
    assert min(mean["anger"], mean["fear"], mean["happy"]) > mean["neutral"] + 0.05
    assert max(mean["sadness"], mean["boredom"], mean["disgust"]) < mean["neutral"] - 0.05


def test_means_alone_do_not_solve_it(corpus, recordings):
    features = np.array([mean_features(samples) for samples in recordings])
    uar = centroid_uar(features, corpus.targets, np.random.default_rng(0))
    assert 0.3 < uar < 0.7  # chance is 0.14
    shuffled = np.random.default_rng(1).permutation(corpus.targets)
    chance = centroid_uar(features, shuffled, np.random.default_rng(0))
    # Four standard deviations of a binomial proportion, n = 420 and p = 1/7.
    assert abs(chance - 1 / 7) < 4 * np.sqrt(1 / 7 * 6 / 7 / 420)


def test_filter_follows_the_formants():
    """The response peaks at the formants, falls by the tilt, and leaves 0 Hz alone."""
    formants = np.array([[500.0, 1500.0, 2500.0, 3500.0, 4500.0]])
    frequency = np.fft.rfftfreq(synthetic.FFT, 1 / SAMPLE_RATE)
    flat, tilted = (np.abs(synthetic._formant_response(formants, tilt)[0]) for tilt in (0.0, 6.0))
    peaks = frequency[1:-1][(flat[1:-1] > flat[:-2]) & (flat[1:-1] > flat[2:])]
    np.testing.assert_allclose(peaks[:4], formants[0, :4], atol=40)
    assert flat[0] == pytest.approx(1)
    np.testing.assert_allclose(20 * np.log10(flat / tilted), 6 * np.log2(1 + frequency / 500), atol=1e-9)


def test_filtering_in_overlapping_blocks_equals_convolution():
    rng = np.random.default_rng(0)
    source = rng.standard_normal(20 * synthetic.HOP)
    impulse = rng.standard_normal(100)
    response = np.tile(np.fft.rfft(impulse, synthetic.FFT), (20, 1))
    expected = np.convolve(source, impulse)[: source.size]
    inside = slice(0, source.size - synthetic.WINDOW)
    np.testing.assert_allclose(synthetic._filtered(source, response)[inside], expected[inside], atol=1e-9)


def test_command_writes_folders_that_open_as_a_corpus(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(synthetic, "demo_corpus", lambda: demo_corpus(takes=1))
    folder = tmp_path / "new" / "demo"
    assert main([str(folder)]) == 0
    assert "70 utterances" in capsys.readouterr().out
    written = open_corpus(str(folder))
    assert written.labels == PAPER_LABELS
    assert len(written.utterances) == 70
    utterance = written.utterances[0]
    assert utterance.name == "anger/s01-anger-1.wav"
    assert soundfile.info(utterance.path).subtype == "PCM_16"
    original = next(u for u in demo_corpus(1).utterances if u.name == "s01-anger-1.wav")
    np.testing.assert_allclose(written.read(utterance), synthetic.synthesise(original), atol=2**-15)


def test_command_refuses_a_file_in_one_line(tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(UserError) as error:
        main([str(tmp_path / "taken")])
    assert "\n" not in str(error.value)
    assert str(tmp_path / "taken") in str(error.value)


def test_command_without_a_folder_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "FOLDER" in capsys.readouterr().err
