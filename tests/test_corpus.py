"""Finding labelled recordings and reading any audio file, with every way in which a file can be damaged."""

import os
import pickle
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT

from npser.audio import AUDIO_SUFFIXES, SAMPLE_RATE, read_audio
from npser.corpus import PAPER_LABELS, cross_corpus, open_corpus
from npser.errors import UserError
from npser.report import find_listeners


def tone(seconds=1.0, rate=SAMPLE_RATE, frequency=440.0):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)


@pytest.fixture
def place(tmp_path):
    """A function that writes a short tone at a path below the test's folder and returns that path."""

    def write(name, samples=None, rate=SAMPLE_RATE, subtype=None):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        form = "AIFF" if path.suffix == ".aif" else None  # the one suffix that soundfile does not know
        soundfile.write(path, tone(0.1) if samples is None else samples, rate, subtype=subtype, format=form)
        return path

    return write


def refusal(call, argument):
    """The message of the UserError that the call must raise, one line that names the argument; without that name."""
    with pytest.raises(UserError) as caught:
        call(argument)
    message = str(caught.value)
    assert "\n" not in message
    assert os.fspath(argument) in message
    return message.replace(os.fspath(argument), "")  # whose folders are named after the test


# Reading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "subtype", "bound"),
    [
        ("a.wav", "PCM_U8", 2**-7),
        ("a.wav", "PCM_16", 2**-15),
        ("a.wav", "PCM_24", 2**-23),
        ("a.wav", "FLOAT", 1e-7),
        ("a.flac", "PCM_16", 2**-15),
        ("a.aiff", "PCM_16", 2**-15),
        ("a.ogg", "VORBIS", 0.05),
    ],
)
def test_reads_format(place, name, subtype, bound):
    samples = read_audio(place(name, tone(), subtype=subtype))
    assert samples.dtype == np.float32
    assert samples.flags.c_contiguous
    assert samples.shape == (SAMPLE_RATE,)
    np.testing.assert_allclose(samples, tone(), atol=bound)


@pytest.mark.parametrize("suffix", AUDIO_SUFFIXES)
def test_every_suffix_is_found_and_read(suffix, tmp_path):
    form = {".oga": "OGG", ".opus": "OGG", ".aif": "AIFF", ".aifc": "AIFF", ".snd": "AU"}.get(suffix)
    rate, subtype = (48000, "OPUS") if suffix == ".opus" else (16000, None)
    for emotion, frequency in (("low", 200), ("high", 900)):
        (tmp_path / emotion).mkdir()
        with open(tmp_path / emotion / f"a{suffix}", "wb") as file:
            soundfile.write(file, tone(1.0, rate, frequency), rate, subtype, format=form or suffix[1:].upper())
    corpus = open_corpus(str(tmp_path))
    for utterance in corpus.utterances:
        spectrum = np.abs(np.fft.rfft(corpus.read(utterance)[:SAMPLE_RATE]))  # codecs may pad
        assert abs(spectrum.argmax() - {"low": 200, "high": 900}[utterance.emotion]) <= 1


def test_reads_mp3(place):
    samples = read_audio(place("a.mp3", tone()))  # the codec may shift and pad
    spectrum = np.abs(np.fft.rfft(samples[:SAMPLE_RATE]))
    assert spectrum.argmax() == 440


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_resamples_to_16_khz(place, rate):
    samples = read_audio(place("a.wav", tone(1.0, rate), rate, "FLOAT"))
    assert samples.shape == (SAMPLE_RATE,)
    inside = slice(400, -400)  # the filter sees zeros beyond the ends
    np.testing.assert_allclose(samples[inside], tone()[inside], atol=2e-3)


def test_resampling_removes_what_16_khz_cannot_hold(place):
    path = place("a.wav", tone(1.0, 48000, 440) + tone(1.0, 48000, 12000), 48000, "FLOAT")
    np.testing.assert_allclose(read_audio(path)[400:-400], tone()[400:-400], atol=5e-3)


def test_stereo_is_averaged(place):
    left, right = tone(), tone(frequency=1000)
    samples = read_audio(place("a.wav", np.stack([left, right], axis=1), subtype="FLOAT"))
    np.testing.assert_allclose(samples, (left + right) / 2, atol=1e-6)


def test_stereo_48_khz_equals_mono_16_khz(place):
    stereo = read_audio(place("stereo.wav", np.stack([tone(1.0, 48000)] * 2, axis=1), 48000, "PCM_24"))
    mono = read_audio(place("mono.wav", tone(), subtype="PCM_24"))
    np.testing.assert_allclose(stereo[400:-400], mono[400:-400], atol=2e-3)


def test_beyond_full_scale_is_scaled_to_it(place):
    samples = read_audio(place("a.wav", 8 * tone(), subtype="FLOAT"))
    assert np.abs(samples).max() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(samples, 2 * tone(), atol=1e-3)  # scaled, not clipped


@pytest.mark.parametrize("lost", [1, 2, 200, 1600])
@pytest.mark.parametrize("name", ["a.wav", "a.aiff"])
def test_truncated_file_is_refused(place, name, lost):
    path = place(name)
    path.write_bytes(path.read_bytes()[:-lost])
    assert "truncated" in refusal(read_audio, path)


def test_truncated_file_with_a_chunk_before_the_samples_is_refused(place):
    path = place("a.wav")
    data = path.read_bytes()
    at = data.index(b"data")
    whole = data[:at] + b"note" + struct.pack("<I", 3) + b"hey\0" + data[at:]  # odd length: one byte of padding
    path.write_bytes(whole)
    assert read_audio(path).size == 1600
    path.write_bytes(whole[:-2])
    assert "truncated" in refusal(read_audio, path)


@pytest.mark.parametrize(("name", "reason"), [("a.flac", "cannot be read"), ("a.mp3", "truncated")])
def test_truncated_compressed_file_is_refused(place, name, reason):
    path = place(name, np.random.default_rng(0).uniform(-0.5, 0.5, SAMPLE_RATE))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    assert reason in refusal(read_audio, path)


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFFFFF])
def test_wav_written_into_a_pipe_is_read(place, length):
    path = place("a.wav")
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", length)
    path.write_bytes(data)
    np.testing.assert_allclose(read_audio(path), tone(0.1), atol=2**-15)


def test_flac_that_claims_absurd_length_is_refused(place):
    path = place("a.flac")
    data = bytearray(path.read_bytes())
    data[21] |= 0x0F  # STREAMINFO: upper bits of the 36-bit number of samples
    data[22] = 0xFF
    path.write_bytes(data)
    refusal(read_audio, path)


def test_empty_files_are_refused(place, tmp_path):
    assert "empty" in refusal(read_audio, place("header.wav", np.zeros(0)))
    (tmp_path / "nothing.wav").touch()
    assert "empty" in refusal(read_audio, tmp_path / "nothing.wav")


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_silent_file_is_refused(place, value):
    assert "silent" in refusal(read_audio, place("a.wav", np.full(SAMPLE_RATE, value)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_refused(place, value):
    samples = tone()
    samples[100] = value
    assert "not finite" in refusal(read_audio, place("a.wav", samples, subtype="FLOAT"))


def test_shorter_than_a_frame_is_refused(place):
    assert "shorter" in refusal(read_audio, place("short.wav", tone()[:255]))
    assert "shorter" in refusal(read_audio, place("fast.wav", tone()[:765], 48000))
    assert read_audio(place("enough.wav", tone()[:256])).shape == (256,)


@pytest.mark.parametrize("rate", [1, 2_000_000_011])
def test_absurd_sample_rate_is_refused(place, rate):
    assert f"{rate} Hz" in refusal(read_audio, place("a.wav", tone(), rate))


def test_what_is_no_audio_is_refused(tmp_path):
    assert "no such file" in refusal(read_audio, tmp_path / "missing.wav")
    assert "not a file" in refusal(read_audio, tmp_path)
    for name in ("text.wav", "text.raw"):
        (tmp_path / name).write_text("not audio\n" * 100)
        assert "cannot be read" in refusal(read_audio, tmp_path / name)


# Folders ------------------------------------------------------------------------------------------------------------


def test_folder_names_are_emotions(place, tmp_path):
    for name in ("z/calm/b.wav", "calm/a.WAV", "calm/c.Flac", "excited/deep/excited/d.aif", "excited/e.ogg"):
        place(name)
    corpus = open_corpus(str(tmp_path))
    assert corpus.name == tmp_path.name
    assert corpus.labels == ("calm", "excited")
    assert [(u.name, u.emotion) for u in corpus.utterances] == [
        ("calm/a.WAV", "calm"),
        ("calm/c.Flac", "calm"),
        ("excited/deep/excited/d.aif", "excited"),
        ("excited/e.ogg", "excited"),
        ("z/calm/b.wav", "calm"),
    ]
    assert corpus.targets.dtype == np.int64
    assert corpus.targets.tolist() == [0, 0, 1, 1, 0]
    assert corpus.speakers == ("",)
    assert all(u.text == "" and os.path.isabs(u.path) and Path(u.path).is_file() for u in corpus.utterances)
    assert corpus.read(corpus.utterances[0]).shape == (1600,)


def test_relative_folder_keeps_absolute_paths(place, tmp_path, monkeypatch):
    place("set/calm/a.wav")
    place("set/excited/b.wav")
    monkeypatch.chdir(tmp_path)
    corpus = open_corpus("set")
    monkeypatch.chdir("/")
    assert corpus.name == "set"
    assert corpus.read(corpus.utterances[1]).size == 1600


def test_corpus_reaches_worker_processes(place, tmp_path):
    place("calm/a.wav")
    place("excited/b.wav")
    corpus = pickle.loads(pickle.dumps(open_corpus(str(tmp_path))))
    assert corpus.read(corpus.utterances[0]).size == 1600


def test_labels_of_the_paper_keep_its_order(place, tmp_path):
    for emotion in ("anger", "happy", "boredom", "neutral"):
        place(f"{emotion}/a.wav")
    assert open_corpus(str(tmp_path)).labels == ("neutral", "anger", "boredom", "happy")
    place("surprise/a.wav")
    assert open_corpus(str(tmp_path)).labels == ("anger", "boredom", "happy", "neutral", "surprise")


def test_what_is_left_out(place, tmp_path):
    for name in ("calm/a.wav", "calm/.hidden.wav", ".git/b.wav", "excited/c.wav", "loose.wav"):
        place(name)
    (tmp_path / "calm" / "notes.txt").write_text("x")
    corpus = open_corpus(str(tmp_path))
    assert [u.name for u in corpus.utterances] == ["calm/a.wav", "excited/c.wav"]
    assert corpus.skipped == ("loose.wav: lies in no emotion folder",)


def test_linked_folders_are_followed_and_loops_end(place, tmp_path):
    place("elsewhere/excited/b.wav")
    place("set/calm/a.wav")
    (tmp_path / "set" / "excited").symlink_to(tmp_path / "elsewhere" / "excited")
    (tmp_path / "set" / "calm" / "loop").symlink_to(tmp_path / "set")
    corpus = open_corpus(str(tmp_path / "set"))
    assert [u.name for u in corpus.utterances] == ["calm/a.wav", "excited/b.wav"]


def test_emodb_names_win_over_folders(place, tmp_path):
    for name in ("calm/03a01Wa.wav", "calm/16b10Lb.WAV", "x/08a02Fc.aiff", "09a04Nb.wav", "calm/other.wav"):
        place(name)
    place("calm/03a01Xa.wav")  # no such emotion
    place("calm/03a01wa.wav")  # the letter is a capital
    corpus = open_corpus(str(tmp_path))
    assert corpus.name == "emodb"
    assert corpus.labels == ("neutral", "anger", "boredom", "happy")
    assert [(u.name, u.speaker, u.text, u.emotion) for u in corpus.utterances] == [
        ("09a04Nb.wav", "09", "a04", "neutral"),
        ("calm/03a01Wa.wav", "03", "a01", "anger"),
        ("calm/16b10Lb.WAV", "16", "b10", "boredom"),
        ("x/08a02Fc.aiff", "08", "a02", "happy"),
    ]
    assert corpus.speakers == ("03", "08", "09", "16")
    assert corpus.targets.tolist() == [0, 1, 2, 3]
    assert corpus.skipped == tuple(
        f"calm/{name}.wav: not an EMO-DB file name" for name in ("03a01Xa", "03a01wa", "other")
    )


@pytest.mark.parametrize(
    ("letter", "emotion"),
    list(zip("WLEAFTN", ("anger", "boredom", "disgust", "fear", "happy", "sadness", "neutral"), strict=True)),
)
def test_emodb_letters(place, tmp_path, letter, emotion):
    place(f"03a01{letter}a.wav")
    place("08a01Na.wav" if letter != "N" else "08a01Wa.wav")
    assert open_corpus(str(tmp_path)).utterances[0].emotion == emotion


@pytest.mark.parametrize(
    ("corpus", "files"),
    [
        (
            "ravdess",
            {
                "Actor_12/03-01-06-01-02-01-12.wav": ("12", "02", "fear"),
                "Actor_12/03-01-01-01-01-01-12.wav": ("12", "01", "neutral"),
                "Actor_24/03-01-02-01-02-01-24.wav": ("24", "02", "calm"),
                "Actor_24/03-01-08-02-02-02-24.wav": ("24", "02", "surprise"),
                "Actor_24/03-02-04-01-02-01-24.wav": None,  # sung
                "Actor_24/03-01-09-01-02-01-24.wav": None,  # no such emotion
            },
        ),
        (
            "emovo",
            {
                "f1/dis-f1-b1.wav": ("f1", "b1", "disgust"),
                "f1/gio-f1-l4.wav": ("f1", "l4", "happy"),
                "m3/pau-m3-n5.wav": ("m3", "n5", "fear"),
                "m3/rab-m3-d1.wav": ("m3", "d1", "anger"),
                "m3/tri-m3-d1.wav": ("m3", "d1", "sadness"),
                "m3/xxx-m3-d1.wav": None,
            },
        ),
        (
            "savee",
            {
                "AudioData/DC/a01.wav": ("DC", "a01", "anger"),
                "AudioData/DC/sa15.wav": ("DC", "sa15", "sadness"),
                "AudioData/KL/su02.wav": ("KL", "su02", "surprise"),
                "JE_h07.wav": ("JE", "h07", "happy"),
                "AudioData/XX/a01.wav": None,
            },
        ),
        (
            "tess",
            {
                "OAF_angry/OAF_back_angry.wav": ("OA", "back", "anger"),
                "OAF_neutral/OA_bite_neutral.wav": ("OA", "bite", "neutral"),
                "YAF_pleasant_surprised/YAF_young_ps.wav": ("YA", "young", "surprise"),
                "YAF_sad/YAF_young_sad.wav": ("YA", "young", "sadness"),
                "YAF_sad/readme.wav": None,
            },
        ),
    ],
)
def test_corpora_known_by_their_file_names(place, tmp_path, corpus, files):
    for name in files:
        place(name)
    opened = open_corpus(str(tmp_path))
    assert opened.name == corpus
    assert {u.name: (u.speaker, u.text, u.emotion) for u in opened.utterances} == {
        name: parsed for name, parsed in files.items() if parsed
    }
    assert [line.split(": not a")[0] for line in opened.skipped] == sorted(
        n for n, parsed in files.items() if not parsed
    )


def test_folders_of_emotions_are_not_taken_for_a_known_corpus(place, tmp_path):
    for name in ("happy/a01.wav", "sad/h02.wav", "DCX/a01.wav"):
        place(name)
    assert {u.emotion for u in open_corpus(str(tmp_path)).utterances} == {"happy", "sad", "DCX"}


def listing(tmp_path, text):
    path = tmp_path / "my labels.csv"
    path.write_bytes(text.encode("utf-8-sig"))
    return str(path)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv(place, tmp_path, delimiter):
    for name in ("x/a.wav", "x/b.flac", "c.wav"):
        place(name)
    rows = ["Emotion,path,speaker,ignored", "joy,x/b.flac,ann,1", "", 'rage,"c.wav",bob,2', "joy,./x/a.wav,,3"]
    corpus = open_corpus(listing(tmp_path, "\r\n".join(rows).replace(",", delimiter)))
    assert corpus.name == "my labels"
    assert corpus.labels == ("joy", "rage")
    assert [(u.name, u.speaker, u.emotion, u.split) for u in corpus.utterances] == [
        ("c.wav", "bob", "rage", ""),
        ("x/a.wav", "", "joy", ""),
        ("x/b.flac", "ann", "joy", ""),
    ]
    assert corpus.read(corpus.utterances[0]).size == 1600


def test_csv_with_a_split(place, tmp_path):
    for name in "abcde":
        place(f"{name}.wav")
    rows = [
        "path,emotion,split",
        "a.wav,joy,train",
        "b.wav,rage,train",
        "c.wav,joy,test",
        "d.wav,joy,dev",
        "e.wav,joy,",
    ]
    corpus = open_corpus(listing(tmp_path, "\n".join(rows)))
    assert [u.split for u in corpus.utterances] == ["train", "train", "test"]
    assert corpus.skipped == (
        "d.wav: its split is dev, neither train nor test",
        "e.wav: its split is empty, neither train nor test",
    )


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["file,emotion", "a.wav,joy"], "no column path"),
        ([""], "no column path and no column emotion"),
        (["path,emotion", "a.wav,joy", "b.wav"], "line 3 has no emotion"),
        (["path,emotion", "", ",joy"], "line 3 has no path"),
        (["path,emotion", "a.wav,joy", "absent.wav,joy"], "line 3: there is no file"),
        (["path,emotion", "a.wav,joy", "./a.wav,rage"], "line 3: a.wav is there twice"),
        (["path,emotion", "a.wav,joy", "b.wav,joy"], "only one emotion (joy)"),
        (["path,emotion,split", "a.wav,joy,dev"], "no recording that can be used"),
    ],
)
def test_unusable_csv_is_refused(place, tmp_path, rows, said):
    place("a.wav"), place("b.wav")
    assert said in refusal(open_corpus, listing(tmp_path, "\n".join(rows)))


def test_csv_that_is_none(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"path,emotion\n\xff\xfe,x\n")
    assert "cannot be read as CSV" in refusal(open_corpus, str(tmp_path / "a.csv"))


def test_cross_corpus(place, tmp_path):
    for name in ("one/03a01Wa.wav", "one/03a01Fa.wav", "one/03a01La.wav"):  # anger, happy, boredom
        place(name)
    for name in ("two/f1/rab-f1-b1.wav", "two/f1/gio-f1-b1.wav", "two/f1/sor-f1-b1.wav"):  # anger, happy, surprise
        place(name)
    joint = cross_corpus(open_corpus(str(tmp_path / "one")), open_corpus(str(tmp_path / "two")))
    assert joint.name == "emodb-to-emovo"
    assert joint.labels == ("anger", "happy")
    assert [(u.name, u.speaker, u.split) for u in joint.utterances] == [
        ("emodb/03a01Fa.wav", "emodb:03", "train"),
        ("emodb/03a01Wa.wav", "emodb:03", "train"),
        ("emovo/f1/gio-f1-b1.wav", "emovo:f1", "test"),
        ("emovo/f1/rab-f1-b1.wav", "emovo:f1", "test"),
    ]
    assert len(joint.skipped) == 2
    assert "surprise is in only one" in joint.skipped[1]
    assert joint.read(joint.utterances[0]).size == 1600
    for name in ("again/03a01Wa.wav", "again/03a01Fa.wav"):
        place(name)
    twice = cross_corpus(open_corpus(str(tmp_path / "one")), open_corpus(str(tmp_path / "again")))
    assert len({u.name for u in twice.utterances}) == 5 - 1  # boredom is in one of them only
    (tmp_path / "again" / "16a01Wb.wav").symlink_to(tmp_path / "one" / "03a01Wa.wav")
    with pytest.raises(UserError, match=r"--test-data: has 1 of the recordings of --data, .*16a01Wb\.wav for one"):
        cross_corpus(open_corpus(str(tmp_path / "one")), open_corpus(str(tmp_path / "again")))
    with pytest.raises(UserError, match="built-in"):
        cross_corpus(open_corpus("demo"), open_corpus(str(tmp_path / "two")))
    place("three/happy/a.wav"), place("three/weird/a.wav")
    with pytest.raises(UserError, match="share happy, at least two"):
        cross_corpus(open_corpus(str(tmp_path / "one")), open_corpus(str(tmp_path / "three")))


def test_unusable_folders_are_refused(place, tmp_path):
    assert "no such folder" in refusal(open_corpus, str(tmp_path / "missing"))
    file = place("calm/a.wav")
    assert "not a folder" in refusal(open_corpus, str(file))
    assert "only one emotion (calm)" in refusal(open_corpus, str(tmp_path))
    place("flat/a.wav")
    assert "emotion folder" in refusal(open_corpus, str(tmp_path / "flat"))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "readme.txt").write_text("x")
    assert "no audio file" in refusal(open_corpus, str(tmp_path / "bare"))


def test_emodb_is_found_in_data_folder_then_cache(place, tmp_path, monkeypatch):
    monkeypatch.setenv("NPSER_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("npser.fetch.fetch_emodb", lambda folder: asked.append(folder))
    asked = []
    with pytest.raises(UserError, match="no such folder"):  # because nothing was fetched
        open_corpus("emodb")
    assert asked == [tmp_path / "cache" / "npser" / "emodb"]
    for name in ("03a01Wa.wav", "03a01Na.wav"):
        place(f"cache/npser/emodb/wav/{name}")
    assert open_corpus("emodb").speakers == ("03",)
    monkeypatch.delenv("NPSER_DATA")
    assert open_corpus("emodb").speakers == ("03",)
    monkeypatch.setenv("NPSER_DATA", str(tmp_path / "data"))
    for name in ("08a01Wa.wav", "08a01Na.wav"):
        place(f"data/emodb/wav/{name}")
    assert open_corpus("emodb").speakers == ("08",)


def test_cache_is_below_home_by_default(place, tmp_path, monkeypatch):
    monkeypatch.delenv("NPSER_DATA", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("03a01Wa.wav", "03a01Na.wav"):
        place(f".cache/npser/emodb/wav/{name}")
    assert len(open_corpus("emodb").utterances) == 2


def test_who_has_no_home_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("NPSER_DATA", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def nobody(_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(nobody))
    with pytest.raises(UserError, match="XDG_CACHE_HOME: not set, and this user has no home"):
        open_corpus("emodb")
    assert find_listeners(None) == {}
    (tmp_path / "emodb").mkdir()
    (tmp_path / "emodb" / "erkennung.txt").write_text("Nr.\tSatz\terkannt\n1\t03a01Fa.wav\t90,00\n")
    assert find_listeners(None) == {"03a01Fa.wav": 0.9}


@pytest.mark.skipif(
    not Path(os.environ.get("NPSER_DATA", ""), "emodb").is_dir() or not os.environ.get("NPSER_DATA"),
    reason="needs the EMO-DB recordings: set NPSER_DATA to the folder that holds emodb",
)
def test_real_emodb():
    corpus = open_corpus("emodb")
    assert corpus.labels == PAPER_LABELS
    assert corpus.skipped == ()
    assert len(corpus.utterances) == 535
    assert len(corpus.speakers) == 10
    counts = {"anger": 127, "boredom": 81, "disgust": 46, "fear": 69, "happy": 71, "sadness": 62, "neutral": 79}
    assert Counter(u.emotion for u in corpus.utterances) == counts
    seconds = [corpus.read(u).size / SAMPLE_RATE for u in corpus.utterances]  # none is refused as damaged
    assert min(seconds) > 1.2
    assert max(seconds) < 9


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_U8", "FLOAT"])
def test_wav_files_are_the_same_without_soundfile(subtype, tmp_path, monkeypatch):
    rng = np.random.default_rng(3)
    soundfile.write(tmp_path / "a.wav", 0.3 * rng.uniform(-1, 1, (3000, 2)), 16000, subtype=subtype)
    soundfile.write(tmp_path / "a.flac", 0.3 * rng.uniform(-1, 1, 3000), 16000)
    usual = read_audio(tmp_path / "a.wav")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), usual, rtol=0, atol=1e-7)
    with pytest.raises(UserError, match=r"a\.flac: only WAV files .* pip install soundfile"):
        read_audio(tmp_path / "a.flac")
    (tmp_path / "b.wav").write_text("this is no audio")
    with pytest.raises(UserError, match=r"b\.wav: cannot be read as audio"):
        read_audio(tmp_path / "b.wav")


def test_training_does_without_soundfile():
    program = "import sys; sys.modules['soundfile'] = None; import npser.crossval, npser.frontend, npser.predict"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_a_file_under_two_names_is_one_recording(place, tmp_path):
    for n in range(3):
        place(f"c/zorn/{n}.wav"), place(f"c/freude/{n}.wav")
    (tmp_path / "c" / "freude" / "again.wav").symlink_to(tmp_path / "c" / "zorn" / "0.wav")
    (tmp_path / "c" / "anger").symlink_to(tmp_path / "c" / "zorn")
    corpus = open_corpus(str(tmp_path / "c"))
    assert corpus.labels == ("freude", "zorn")  # and not the link that sorts before it
    assert len(corpus.utterances) == 6
    assert corpus.skipped == ("freude/again.wav: the same file as zorn/0.wav",)


def test_ravdess_with_video_is_the_same_performance(place, tmp_path):
    for name in ("03-01-03-01-01-01-12", "01-01-03-01-01-01-12", "01-01-05-01-01-01-12"):
        place(f"r/{name}.wav")
    corpus = open_corpus(str(tmp_path / "r"))
    assert [u.name for u in corpus.utterances] == ["01-01-05-01-01-01-12.wav", "03-01-03-01-01-01-12.wav"]
    assert corpus.skipped == ("01-01-03-01-01-01-12.wav: the same performance as 03-01-03-01-01-01-12.wav",)


def test_an_emotion_that_cannot_be_printed_is_refused(place, tmp_path):
    place("c/an\u00a0ger/a.wav"), place("c/happy/a.wav")
    assert "no name that can be printed" in refusal(open_corpus, str(tmp_path / "c"))
