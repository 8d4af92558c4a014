"""How published corpora name their files: a file's relative name -> speaker, text and emotion.

Each layout is one regular expression with the groups speaker, text and emotion, and a table that translates the code of
the emotion. It is matched against the end of the relative name, from the start of a folder's or file's name on.
Emotions are spelt alike in all of them (as in the paper's tables, plus calm and surprise), so that one corpus can test
what was trained on another.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from npser.audio import AUDIO_SUFFIXES

_AUDIO = rf"(?i:{'|'.join(map(re.escape, AUDIO_SUFFIXES))})"


@dataclass(frozen=True)
class Parsed:
    """What a file name tells."""

    speaker: str
    text: str
    emotion: str


@dataclass(frozen=True)
class Layout:
    """The naming convention of a corpus."""

    name: str  # the corpus' name in results
    title: str  # its name for people
    pattern: re.Pattern[str]
    emotions: Mapping[str, str]

    @property
    def file_name(self) -> str:
        """What a file that follows the convention has, for messages."""
        return f"{'an' if self.title[0] in 'AEIOU' else 'a'} {self.title} file name"

    def twin(self, name: str) -> str | None:
        """The file of the same performance, where a corpus has it twice: RAVDESS has it with video and without."""
        folder, _, file = name.rpartition("/")
        if self.name != "ravdess" or not file.startswith("01-"):
            return None
        return f"{folder}/03-{file[3:]}".lstrip("/")

    def parse(self, name: str) -> Parsed | None:
        """What the relative name `name` ("/" between folders) tells; None where it does not follow the convention."""
        match = self.pattern.search(name)
        if not match:
            return None
        return Parsed(match["speaker"], match["text"], self.emotions[match["emotion"]])


def _layout(name: str, title: str, pattern: str, emotions: Mapping[str, str]) -> Layout:
    codes = "|".join(sorted(emotions, key=len, reverse=True))  # "sa" before "s"
    text = pattern.replace("EMOTION", f"(?P<emotion>{codes})")
    return Layout(name, title, re.compile(rf"(?:^|/){text}{_AUDIO}$"), emotions)


LAYOUTS = (
    # Burkhardt et al. (2005): speaker, text, initial of the German emotion, version: 03a01Wa.wav. Version 2.0 of the
    # corpus adds recordings.
    _layout(
        "emodb",
        "EMO-DB",
        r"(?P<speaker>\d\d)(?P<text>[ab]\d\d)EMOTION[a-z]?",
        # Wut, Langeweile, Ekel, Angst, Freude, Trauer
        {"W": "anger", "L": "boredom", "E": "disgust", "A": "fear", "F": "happy", "T": "sadness", "N": "neutral"},
    ),
    # Livingstone and Russo (2018): modality (03: sound alone), channel (01: speech), emotion, intensity, statement,
    # repetition, actor: 03-01-06-01-02-01-12.wav. Song is left out.
    _layout(
        "ravdess",
        "RAVDESS speech",
        r"0[13]-01-EMOTION-\d\d-(?P<text>\d\d)-\d\d-(?P<speaker>\d\d)",
        {
            "01": "neutral",
            "02": "calm",
            "03": "happy",
            "04": "sadness",
            "05": "anger",
            "06": "fear",
            "07": "disgust",
            "08": "surprise",
        },
    ),
    # Costantini et al. (2014): emotion in Italian, speaker, sentence: gio-f2-l3.wav.
    _layout(
        "emovo",
        "EMOVO",
        r"EMOTION-(?P<speaker>[fm]\d)-(?P<text>[a-z]{1,2}\d+)",
        # disgusto, gioia, neutro, paura, rabbia, sorpresa, tristezza
        {
            "dis": "disgust",
            "gio": "happy",
            "neu": "neutral",
            "pau": "fear",
            "rab": "anger",
            "sor": "surprise",
            "tri": "sadness",
        },
    ),
    # Jackson and Haq (2014): the speaker's folder or prefix, emotion, number: DC/sa07.wav or DC_sa07.wav. The numbers
    # stand for other sentences with each emotion.
    _layout(
        "savee",
        "SAVEE",
        r"(?P<speaker>DC|JE|JK|KL)[_/](?P<text>EMOTION\d\d)",
        {
            "a": "anger",
            "d": "disgust",
            "f": "fear",
            "h": "happy",
            "n": "neutral",
            "sa": "sadness",
            "su": "surprise",
        },
    ),
    # Dupuis and Pichora-Fuller (2010): speaker, word, emotion (ps: pleasant surprise): YAF_back_ps.wav. One speaker's
    # prefix is misspelt OA in a file.
    _layout(
        "tess",
        "TESS",
        r"(?P<speaker>[OY]A)F?_(?P<text>[a-z]+)_EMOTION",
        {
            "angry": "anger",
            "disgust": "disgust",
            "fear": "fear",
            "happy": "happy",
            "neutral": "neutral",
            "ps": "surprise",
            "sad": "sadness",
        },
    ),
)


def recognise(names: Iterable[str]) -> Layout | None:
    """The layout that these relative names follow; None where none of them follows any.

    EMO-DB wins with a single file; among the others the one that most files follow.
    """
    names = list(names)
    counts = [sum(layout.pattern.search(name) is not None for name in names) for layout in LAYOUTS]
    best = 0 if counts[0] else max(range(len(LAYOUTS)), key=counts.__getitem__)
    return LAYOUTS[best] if counts[best] else None
