"""What is in a corpus: python -m npser.corpus PATH."""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from npser.audio import as_bytes, open_recording
from npser.cli import Parser, count
from npser.corpus import Corpus, open_corpus
from npser.document import Table, text_table
from npser.errors import UserError, printable
from npser.fetch import emodb_manifest
from npser.layouts import LAYOUTS
from npser.progress import duration

_SHOWN = 10  # skipped files that are listed without --all


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status, raises UserError or RunFailed."""
    known = ", ".join(layout.title for layout in LAYOUTS)
    parser = Parser(
        prog="python -m npser.corpus",
        description="Show what a corpus is recognised as: how many recordings of each emotion and speaker, how long "
        f"they are, and which files are left out and why. Known by their file names: {known}. Any other folder: one "
        "sub-folder for each emotion. A .csv file: columns path,emotion[,speaker][,text][,split], paths relative to "
        "it, split train or test.",
        epilog="What is shown is what npser.train --data PATH would use. Exit status: 0 ok, 2 no usable corpus, or a "
        "recording that --check refuses.",
    )
    parser.add_argument(
        "corpus",
        metavar="PATH",
        help="a folder, a .csv file, emodb (fetched from its authors if it is nowhere on this machine) or demo",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="read every recording to its end, and compare those of EMO-DB with the published ones (SHA-256)",
    )
    parser.add_argument("--all", action="store_true", help=f"list all skipped files, not only the first {_SHOWN}")
    options = parser.parse_args(arguments)
    if not options.corpus.strip():
        raise UserError("PATH: is empty: name a corpus")
    corpus = open_corpus(options.corpus, "PATH")
    for line in describe(corpus, None if options.all else _SHOWN):
        print(line)
    if not options.check:
        return 0
    faults = check(corpus)
    for line in faults:
        print(f"npser.corpus: {line}", file=sys.stderr)
    print(f"\n{len(corpus.utterances) - len(faults)} of {len(corpus.utterances)} recordings are in order")
    return 2 if faults else 0


def describe(corpus: Corpus, shown: int | None) -> list[str]:
    """The paragraphs about a corpus; shown: how many skipped files are listed at most, None for all."""
    known = [speaker for speaker in corpus.speakers if speaker]
    texts = {u.text for u in corpus.utterances if u.text}
    title = printable({layout.name: layout.title for layout in LAYOUTS}.get(corpus.name, corpus.name))
    said = [f"{len(corpus.utterances)} recordings", f"{len(corpus.labels)} emotions"]
    said.append(count(len(known), "speakers") if known else "speakers unknown")
    if texts:
        said.append(count(len(texts), "texts"))
    splits = Counter(u.split for u in corpus.utterances if u.split)
    said += [f"{number} of them for {split}" for split, number in sorted(splits.items(), reverse=True)]
    lines = [f"{title}: {', '.join(said)}", "", text_table(_counts(corpus))]
    if corpus.name != "demo":
        lines += ["", _durations(corpus)]
    if corpus.skipped:
        listed = corpus.skipped[:shown]
        lines += ["", f"left out: {count(len(corpus.skipped), 'files')}", *(f"  {printable(line)}" for line in listed)]
        if len(listed) < len(corpus.skipped):
            lines.append(f"  and {len(corpus.skipped) - len(listed)} more (--all lists them)")
    return lines


def _counts(corpus: Corpus) -> Table:
    """Recordings by speaker (rows) and emotion (columns)."""
    counts = Counter((u.speaker, u.emotion) for u in corpus.utterances)
    rows = [
        (speaker or "unknown", *(str(counts[speaker, label]) for label in corpus.labels), str(total))
        for speaker, total in sorted(Counter(u.speaker for u in corpus.utterances).items())
    ]
    by_emotion = Counter(u.emotion for u in corpus.utterances)
    totals = ("all", *(str(by_emotion[label]) for label in corpus.labels), str(len(corpus.utterances)))
    rows = [*rows, totals] if len(rows) > 1 else [totals]
    return Table("Recordings by speaker and emotion", ("speaker", *corpus.labels, "all"), tuple(rows))


def _durations(corpus: Corpus) -> str:
    """How long the recordings are, by what their headers say."""
    try:
        import soundfile
    except ImportError:
        return "durations unknown: the package soundfile is missing"
    seconds: list[float] = []
    rates: Counter[int] = Counter()
    unreadable = 0
    for utterance in corpus.utterances:
        try:
            if not os.path.isfile(utterance.path):  # a pipe would be waited for
                raise OSError("not a file")
            info = soundfile.info(as_bytes(utterance.path))
        except (OSError, RuntimeError, TypeError):
            unreadable += 1
            continue
        seconds.append(info.frames / max(info.samplerate, 1))
        rates[info.samplerate] += 1
    if not seconds:
        return "durations unknown: no recording could be opened"
    text = (
        f"{duration(sum(seconds))} in all; {min(seconds):.2f} to {max(seconds):.2f} s, mean "
        f"{sum(seconds) / len(seconds):.2f} s; sampled at "
        + ", ".join(f"{rate} Hz ({files})" for rate, files in rates.most_common())
    )
    return text + (f"; {unreadable} could not be opened: --check says why" if unreadable else "")


def check(corpus: Corpus) -> list[str]:
    """What is wrong with the recordings, a line for each bad one; nothing for generated ones."""
    if corpus.name == "demo":
        return []
    published = {name.rsplit("/", 1)[-1]: digest for name, digest in emodb_manifest().items()}
    faults = []
    for utterance in corpus.utterances:
        try:
            open_recording(utterance.path)
            digest = published.get(Path(utterance.path).name) if corpus.name == "emodb" else None
            if digest and hashlib.sha256(Path(utterance.path).read_bytes()).hexdigest() != digest:
                raise UserError(f"{utterance.path}: not the published recording of this name (SHA-256)")
        except UserError as error:
            faults.append(str(error))
    return faults
