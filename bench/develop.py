"""python -m bench.develop: choose settings without looking at a test fold.

Takes the training utterances of one cross-validation fold, holds out a stratified ninth of them for development, trains
on the rest, and scores the development utterances after every epoch. The fold's test utterances are never read. Every
trial is appended to a table that ships with the project, one line per epoch.
"""

import argparse
import csv
import sys
from pathlib import Path

TABLE = Path(__file__).parent / "results" / "development.csv"
COLUMNS = (
    "arch", "corpus", "fold", "epochs", "segment_hop", "batch_size", "clip_norm", "seed", "note",
    "epoch", "training_loss", "training_accuracy", "development_uar_sum", "development_uar_majority", "seconds",
)  # fmt: skip


def main() -> int:
    p = argparse.ArgumentParser(prog="python -m bench.develop", description=__doc__)
    p.add_argument("--arch", required=True, choices=("cnn", "lstm", "tdcnn"))
    p.add_argument("--data", default="demo", help="demo, emodb or a folder, as for npser.train (default: demo)")
    p.add_argument("--folds", type=int, default=10, help="folds of the cross-validation (default: 10)")
    p.add_argument("--fold", type=int, default=0, help="the fold whose training utterances are used (default: 0)")
    p.add_argument("--epochs", type=int, required=True)
    p.add_argument("--segment-hop", type=int, required=True)
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--clip-norm", type=float, help="longest gradient (default: no limit)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--note", default="", help="what is special about this trial, for the table")
    options = p.parse_args()

    import numpy as np
    from numpy.typing import NDArray

    from npser.corpus import open_corpus
    from npser.crossval import make_folds
    from npser.features import Standardisation, WindowSet
    from npser.folds import development_split
    from npser.frontend import read_frames
    from npser.metrics import confusion_matrix, unweighted_average_recall
    from npser.models import build_model
    from npser.optim import SGD
    from npser.progress import Progress
    from npser.trainer import Task, evaluate, steps_per_epoch, train_epochs

    corpus = open_corpus(options.data)
    fold = make_folds(corpus, "stratified", options.folds, 1, options.seed)[options.fold]
    targets, classes = corpus.targets, len(corpus.labels)
    train, development = (
        fold.train[i] for i in development_split(targets[fold.train], 1 / 9, (options.seed, options.fold))
    )
    frames = read_frames(corpus, "cpu")
    scale = Standardisation.of([frames[i] for i in train])
    model = build_model(options.arch, seed=options.seed + 1, classes=classes)
    windows = WindowSet([frames[i] for i in train], scale, model.input_frames, options.segment_hop)
    held_out = WindowSet([frames[i] for i in development], scale, model.input_frames, options.segment_hop)
    task = Task(
        windows, targets[train][windows.owner], (options.seed, 0, options.fold), options.epochs, options.batch_size
    )
    progress = Progress(options.epochs * steps_per_epoch(task.targets, options.batch_size))
    progress.begin_fold("development", progress.total)

    def uar(predicted: NDArray[np.int64]) -> float:
        return unweighted_average_recall(confusion_matrix(targets[development], predicted, classes))

    new = not TABLE.exists()
    for result in train_epochs(model, SGD(clip_norm=options.clip_norm), task, progress):
        votes = evaluate(model, held_out)
        by_sum, by_majority = uar(votes.probabilities.argmax(axis=1)), uar(votes.majority)
        print(
            f"epoch {result.epoch}: development UAR {100 * by_sum:.1f} (sum), {100 * by_majority:.1f} (majority)",
            flush=True,
        )
        row = (
            options.arch, corpus.name, f"0.{options.fold}", options.epochs, options.segment_hop, options.batch_size,
            options.clip_norm or "",
            options.seed, options.note, result.epoch, f"{result.loss:.4f}", f"{result.accuracy:.4f}",
            f"{by_sum:.4f}", f"{by_majority:.4f}", f"{result.seconds:.1f}",
        )  # fmt: skip
        with TABLE.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(COLUMNS)
                new = False
            writer.writerow(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
