"""The options that experiments with whole cross-validations have in common."""

from argparse import ArgumentParser
from pathlib import Path

from npser.cli import whole
from npser.options import repeat_and_fold
from npser.recipes import ARCHITECTURES, NAMES


def add_options(p: ArgumentParser, out: Path) -> None:
    """Network, corpus, folds, and where results go: `out`, unless --out says otherwise."""
    p.add_argument("--arch", default="cnn", choices=ARCHITECTURES, help="(default: cnn)")
    p.add_argument("--data", default="demo", help="demo, emodb or a folder, as for npser.train (default: demo)")
    p.add_argument("--recipe", default="paper", choices=NAMES, help="(default: paper)")
    p.add_argument("--folds", type=whole(2), default=10, help="(default: 10)")
    p.add_argument("--repeats", type=whole(1), default=1, help="(default: 1)")
    p.add_argument("--epochs", type=whole(1), help="(default: as the recipe says)")
    p.add_argument("--segment-hop", type=whole(1), help="(default: as the recipe says)")
    p.add_argument("--only", type=repeat_and_fold, metavar="R.F", help="just repeat R, fold F")
    p.add_argument("--seed", type=whole(0), default=0, help="(default: 0)")
    p.add_argument("--backend", default="cpu", choices=("cpu", "cuda"), help="what computes (default: cpu)")
    p.add_argument("--threads", type=whole(1), help="processor cores to use (default: all)")
    p.add_argument("--out", type=Path, default=out, help=f"(default: {out})")
