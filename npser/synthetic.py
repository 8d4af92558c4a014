"""The built-in demonstration corpus: acted emotions from a small source-filter synthesiser, generated on demand.

It stands in for recordings, which cannot be shipped: ten speakers (pitch, vocal-tract length, breathiness and tempo of
their own) utter random syllables in seven emotions. The emotions follow what the literature reports of pitch, loudness,
rate and voice quality, but mildly: most of each lies in how the sound moves within a second (contour and attack of the
syllables, their rate, tremor, creak), so that the mean spectrum, pitch and energy of an utterance do not give it away.

    glottal pulses + aspiration -> formants -----+
    noise -> frication band ---------------------+-> background noise, gain -> samples

Write it to disk with `python -m npser.synthetic FOLDER`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from npser.audio import SAMPLE_RATE, as_bytes
from npser.cli import Parser, run
from npser.corpus import PAPER_LABELS, Corpus, Utterance
from npser.errors import UserError

Floats = NDArray[np.float64]

SEED = 2016
SPEAKERS = 10
TAKES = 6
HOP = 128  # samples between two control points (8 ms)
WINDOW = 2 * HOP  # samples that one setting of the vocal tract filters; two overlap
FFT = 512  # leaves room for the ringing of the formants


@dataclass(frozen=True)
class Speaker:
    """What a voice keeps through all its emotions."""

    pitch: float  # Hz, the mean of neutral speech
    tract: float  # factor on all formants: 1 for a vocal tract of about 17 cm
    breath: float  # aspiration noise, relative to the pulses
    tempo: float  # factor on the syllable rate


@dataclass(frozen=True)
class Style:
    """What an emotion does to a voice."""

    pitch: float  # semitones above the speaker's mean
    accent: float  # semitones, spread of the pitch from syllable to syllable
    glide: tuple[float, float, float]  # semitones at the start, middle and end of every syllable
    rate: float  # syllables per second
    attack: float  # s, rise of the loudness in a syllable
    release: float  # s, its fall
    dip: float  # loudness left between two syllables, 0..1
    pause: float  # probability of a pause after a syllable
    level: float  # dB
    tilt: float  # dB per octave that the spectrum falls beyond the middle voice
    breath: float  # aspiration noise, factor
    vowels: float  # 0..1, how far the vowels leave schwa
    jitter: float = 0.01  # of the pulse distances, relative
    tremor: float = 5.0  # Hz
    shake: float = 0.0  # depth of the tremor, 0..1
    creak: float = 0.0  # 0..1, weakening of every second pulse


# fmt: off
STYLES = {
    # pitch, accent, glide, rate, attack, release, dip, pause, level, tilt, breath, vowels;
    # then, where they are out of the ordinary, jitter, tremor, shake, creak
    "neutral": Style( 0.0, 0.8,  (0, 0, -0.5), 4.0, 0.030, 0.05, 0.12, 0.04,  0.0,  0.4, 1.0, 0.6),
    "anger":   Style( 2.5, 2.5,  (4, 0, -5.0), 7.5, 0.005, 0.08, 0.02, 0.02,  3.5, -2.0, 1.0, 0.9, jitter=0.1),
    "fear":    Style( 4.0, 1.5,  (0, 0,  0.0), 5.0, 0.020, 0.03, 0.60, 0.04, -2.6,  0.3, 4.2, 0.5, 0.05, 11, shake=1),
    "disgust": Style(-3.0, 1.0,  (1, 0, -3.0), 2.9, 0.005, 0.20, 0.02, 0.06,  0.5,  1.0, 0.6, 0.6, 0.03, creak=0.95),
    "sadness": Style(-2.0, 0.7,  (1, 0, -3.0), 1.9, 0.150, 0.20, 0.05, 0.08, -3.4,  2.0, 3.5, 0.4, shake=0.1),
    "boredom": Style(-2.5, 0.2,  (0, 0,  0.0), 1.6, 0.060, 0.08, 0.95, 0.03, -1.5,  1.1, 1.0, 0.2, jitter=0.005),
    "happy":   Style( 4.0, 1.0, (-7, 7, -6.0), 4.4, 0.080, 0.08, 0.03, 0.02,  1.4, -0.7, 0.5, 0.9, 0.005, 7, shake=0.8),
}
# fmt: on

# Formant frequencies (Hz) of the vowels i e a o u and of schwa, for tract = 1, and the bandwidths (Hz).
VOWELS = np.array(
    [
        [280, 2250, 2900, 3500, 4500],
        [450, 1900, 2550, 3500, 4500],
        [730, 1250, 2500, 3500, 4500],
        [480, 850, 2450, 3400, 4500],
        [310, 750, 2300, 3400, 4500],
        [500, 1500, 2500, 3500, 4500],
    ],
    dtype=np.float64,
)
BANDWIDTHS = np.array([70.0, 90.0, 130.0, 200.0, 300.0])


def demo_corpus(takes: int = TAKES) -> Corpus:
    """Ten speakers x seven emotions x `takes` utterances; nothing is synthesised before it is read."""
    utterances = [
        Utterance(f"demo/{name}", name, f"s{speaker:02d}", f"t{take}", emotion)
        for speaker in range(1, SPEAKERS + 1)
        for emotion in PAPER_LABELS
        for take in range(1, takes + 1)
        for name in [f"s{speaker:02d}-{emotion}-{take}.wav"]
    ]
    utterances.sort(key=lambda utterance: utterance.name)
    return Corpus("demo", PAPER_LABELS, tuple(utterances), (), synthesise)


def synthesise(utterance: Utterance) -> NDArray[np.float32]:
    """Return the samples of an utterance of the demonstration corpus: a function of its speaker, emotion and take."""
    speaker, take = int(utterance.speaker[1:]), int(utterance.text[1:])
    rng = np.random.default_rng([SEED, speaker, PAPER_LABELS.index(utterance.emotion), take])
    return _utter(_speaker(speaker), STYLES[utterance.emotion], rng)


def _speaker(number: int) -> Speaker:
    """Speakers 1, 3, ... have long vocal tracts and low voices, speakers 2, 4, ... short ones and high voices."""
    rng = np.random.default_rng([SEED, number])
    place = (number - 1) // 2 / (SPEAKERS // 2 - 1)  # 0..1 within the low or the high voices
    low = number % 2 == 1
    pitch = 90 * 1.55**place if low else 160 * 1.56**place
    tract = (0.90 if low else 1.02) + 0.10 * rng.permutation(5)[0] / 4
    return Speaker(pitch, tract, breath=float(rng.uniform(0.02, 0.08)), tempo=float(rng.uniform(0.9, 1.1)))


def _utter(speaker: Speaker, style: Style, rng: np.random.Generator) -> NDArray[np.float32]:
    """Synthesise random syllables: (samples,) float32, 1.3 to 3.8 s."""
    seconds = rng.uniform(1.3, 3.8)
    size = int(seconds * SAMPLE_RATE)
    times = np.arange(0, size + HOP, HOP) / SAMPLE_RATE  # of the control points

    # Syllables: onset, length, and what each of them is.
    rate = style.rate * speaker.tempo * rng.uniform(0.9, 1.1)
    count = int(seconds * rate) + 2
    length = rng.lognormal(0, 0.12, count) / rate
    gap = np.where(rng.random(count) < style.pause, rng.uniform(0.1, 0.25, count), 0.0)
    onset = rng.uniform(0.03, 0.1) + np.concatenate([[0], np.cumsum(length + gap)[:-1]])
    consonant = np.minimum(rng.uniform(0.15, 0.35, count) * length, 0.09)  # s before the vowel
    accent = rng.normal(0, style.accent, count) + rng.integers(0, 2, count)
    stress = rng.normal(0, 1.0, count)  # dB
    vowel = rng.integers(0, len(VOWELS), count)

    at = np.clip(np.searchsorted(onset, times, side="right") - 1, 0, count - 1)
    since = times - onset[at]
    into = since - consonant[at]
    left = length[at] - since
    talking = (since >= 0) & (left > 0) & (times < seconds - 0.05)
    attack = style.attack * rng.uniform(0.8, 1.25)
    release = style.release * rng.uniform(0.8, 1.25)
    swell = np.clip(into / attack, 0, 1) * np.clip(left / release, 0, 1)
    phase = 2 * np.pi * (style.tremor * rng.uniform(0.92, 1.08) * times + rng.random())
    tremor = style.shake * np.sin(phase)
    dip = style.dip * rng.uniform(0.8, 1.25)
    loud = talking * (dip + (1 - dip) * swell) * 10 ** (stress[at] / 20) * (1 + 0.9 * tremor)

    # Pitch: a level, a slow fall, an accent and a glide per syllable, tremor, drift.
    place = np.clip(into / np.maximum(length[at] - consonant[at], 0.01), 0, 1)
    semitones = (
        style.pitch
        + rng.normal(0, 0.7)
        + 1.0
        - 2.0 * times / seconds
        + accent[at]
        + np.interp(place, [0, 0.5, 1], np.array(style.glide) * rng.uniform(0.8, 1.2))
        + 0.8 * tremor
        + 0.3 * _smooth(rng.standard_normal(times.size), 20)
    )
    pitch = speaker.pitch * 2 ** (_smooth(semitones, 3) / 12)

    # Vocal tract and voice.
    clear = 0.6 * style.vowels
    targets = clear * VOWELS[vowel] + (1 - clear) * VOWELS[-1]
    formants = _smooth(targets[at] * rng.normal(1, 0.02, 5), 8) * speaker.tract
    breath = speaker.breath * style.breath * rng.uniform(0.8, 1.25)
    jitter = style.jitter * rng.uniform(0.8, 1.25)
    creak = style.creak * rng.uniform(0.85, 1.1)
    source = _voice(pitch, loud, breath, jitter, min(creak, 0.95), rng)
    voiced = _filtered(source, _formant_response(formants, style.tilt + rng.normal(0, 0.4)))

    # Consonants: half of them add noise, clearer where the vowels are clear; the others only weaken the voice.
    hiss = rng.random(count) < 0.5
    centre = rng.uniform(2500, 6000, count)
    noisy = talking * hiss[at] * (into < 0) * np.clip(since / 0.02, 0, 1)
    noise = rng.standard_normal(times.size * HOP) * np.repeat(noisy, HOP)
    frequency = np.fft.rfftfreq(FFT, 1 / SAMPLE_RATE)
    band = np.exp(-(((frequency - centre[at][:, None]) / 1200) ** 2))
    samples = voiced / _rms(voiced) + 0.25 * (0.3 + 0.7 * style.vowels) * _filtered(noise, band)

    level = style.level + rng.normal(0, 1.5)  # dB: the emotion, and how far the microphone is
    samples = samples[:size] / _rms(samples[:size]) + 10 ** (rng.uniform(-42, -38) / 20) * rng.standard_normal(size)
    samples *= 0.06 * 10 ** (level / 20)
    return (samples * min(1.0, 0.95 / np.abs(samples).max())).astype(np.float32)


def _voice(pitch: Floats, loud: Floats, breath: float, jitter: float, creak: float, rng: np.random.Generator) -> Floats:
    """Glottal pulses and aspiration noise. pitch (points,) in Hz, loud (points,) -> (points * HOP,).

    The pulse is the derivative of the flow x^2 - x^3 while the glottis is open (Klatt and Klatt, 1990); the derivative
    stands for the radiation at the lips.
    """
    points, at = np.arange(pitch.size) * HOP, np.arange(pitch.size * HOP)
    cycles = np.cumsum(np.interp(at, points, pitch)) / SAMPLE_RATE
    number = np.arange(int(cycles[-1]) + 3)
    late = jitter * rng.standard_normal(number.size) + 0.15 * creak * (number % 2)
    cycles = np.maximum(cycles + np.interp(cycles, number, late), 0)
    cycle = np.minimum(cycles.astype(np.int64), number[-1])
    x = np.minimum((cycles - cycle) / 0.6, 1.0)
    strength = (1 + 2 * jitter * rng.standard_normal(number.size)) * (1 - creak * (number % 2))
    pulses = np.where(x < 1, 2 * x - 3 * x**2, 0.0) * strength[cycle]
    aspiration = breath * rng.standard_normal(at.size) * (1.5 - x)
    return (pulses + aspiration) * np.interp(at, points, loud)


def _formant_response(formants: Floats, tilt: float) -> NDArray[np.complex128]:
    """Cascade of two-pole resonators, unity at 0 Hz, and a tilt in dB per octave above 500 Hz.

    formants (points, 5) in Hz -> (points, FFT // 2 + 1).
    """
    radius = np.exp(-np.pi * BANDWIDTHS / SAMPLE_RATE)
    cosine = np.cos(2 * np.pi * np.minimum(formants, 7500) / SAMPLE_RATE)
    poles = np.ones((len(formants), 1))
    for r, c in zip(radius, cosine.T, strict=True):  # times 1 - 2 r c / z + (r / z)^2, normalised at z = 1
        padded = np.pad(poles, ((0, 0), (2, 2)))
        poles = padded[:, 2:] - (2 * r * c)[:, None] * padded[:, 1:-1] + r**2 * padded[:, :-2]
        poles /= (1 - 2 * r * c + r**2)[:, None]
    frequency = np.fft.rfftfreq(FFT, 1 / SAMPLE_RATE)
    return 10 ** (-tilt * np.log2(1 + frequency / 500) / 20) / np.fft.rfft(poles, FFT)


def _filtered(source: Floats, response: NDArray[np.complex128] | Floats) -> Floats:
    """Filter a signal with a response that changes every HOP samples, by windowed overlap-add.

    source (points * HOP,), response (points, FFT // 2 + 1) -> (points * HOP,).
    """
    points = len(response)
    window = np.hanning(WINDOW + 1)[:-1]  # two overlapping ones add up to 1
    padded = np.concatenate([np.zeros(WINDOW // 2), source, np.zeros(WINDOW)])
    blocks = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:points]
    blocks = np.fft.irfft(np.fft.rfft(blocks * window, FFT) * response, FFT)
    out = np.zeros((points + FFT // HOP, HOP))
    for part in range(FFT // HOP):
        out[part : part + points] += blocks[:, part * HOP : (part + 1) * HOP]
    return out.reshape(-1)[WINDOW // 2 :][: source.size]


def _smooth(track: Floats, width: int) -> Floats:
    """Average a track (points, ...) over about `width` control points with a Hann window, its ends held."""
    window = np.hanning(width + 2)[1:-1]
    window /= window.sum()
    before = (width - 1) // 2
    padded = np.concatenate([track[:1].repeat(before, 0), track, track[-1:].repeat(width - 1 - before, 0)])
    return np.asarray(np.tensordot(np.lib.stride_tricks.sliding_window_view(padded, width, axis=0), window, 1))


def _rms(samples: Floats) -> float:
    return float(np.sqrt(np.mean(samples**2)))


def write_corpus(folder: Path) -> int:
    """Write the corpus as 16-bit WAV files into one sub-folder per emotion; return how many."""
    import soundfile  # here, because training on the corpus does without

    corpus = demo_corpus()
    try:
        for utterance in corpus.utterances:
            path = folder / utterance.emotion / utterance.name
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(as_bytes(str(path)), corpus.read(utterance), SAMPLE_RATE, subtype="PCM_16")
    except (OSError, RuntimeError) as error:  # soundfile raises the latter, with the path in its message
        raise UserError(f"{folder}: cannot write the corpus there ({error}); name another folder") from error
    return len(corpus.utterances)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = Parser(
        prog="python -m npser.synthetic",
        description="Write the built-in demonstration corpus as 16 kHz, 16-bit WAV files, one sub-folder per emotion, "
        "to be used with --data FOLDER.",
        epilog="Exit status: 0 ok, 2 wrong use, or it cannot be written there.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder to write to; created if missing")
    folder = parser.parse_args(argv).folder
    count = write_corpus(folder)
    print(f"{count} utterances written to {folder}")
    return 0


if __name__ == "__main__":
    run("npser.synthetic", main)
