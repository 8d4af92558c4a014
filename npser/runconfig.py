"""config.json: everything needed to repeat a run, and what tells one run from another."""

import hashlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from npser import synthetic
from npser.audio import as_bytes
from npser.cli import machine, versions
from npser.crossval import Settings
from npser.errors import UserError
from npser.modelfile import feature_settings
from npser.optim import SGD
from npser.recipes import as_settings, from_settings

if TYPE_CHECKING:
    from npser.corpus import Corpus


def run_config(
    corpus: "Corpus", settings: Settings, recipe: str, cv: str, folds: int, repeats: int, precision: str, threads: int
) -> dict[str, Any]:
    """The configuration of a run; recipe: the name of the recipe that the settings began with."""
    sgd = SGD()
    return {
        "arch": settings.arch,
        "corpus": corpus.name,
        "utterances": len(corpus.utterances),
        "utterances_sha256": listing_sha256(corpus),
        "audio_sha256": audio_sha256(corpus),
        "labels": list(corpus.labels),
        "cv": cv,
        "folds": folds,
        "repeats": repeats,
        "recipe": recipe,
        **as_settings(settings.recipe),
        "vote": settings.vote,
        "seed": settings.seed,
        "optimiser": {"lr": sgd.lr, "momentum": sgd.momentum, "decay": sgd.decay},
        "features": feature_settings(),
        "backend": settings.backend,
        "precision": precision,
        "threads": threads,
        "versions": versions(),
    }


def listing_sha256(corpus: "Corpus") -> str:
    """Of which utterances a run is made, and on which side of a given split each is."""
    lines = ("\t".join([u.name, u.speaker, u.emotion, *([u.split] if u.split else [])]) for u in corpus.utterances)
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def audio_sha256(corpus: "Corpus") -> str:
    """What these utterances sound like: the bytes of their files, or, of the built-in corpus, what makes them."""
    digest = hashlib.sha256()
    for path in [synthetic.__file__] if corpus.name == "demo" else [u.path for u in corpus.utterances]:
        if os.path.isfile(path):  # a pipe would be waited for; reading it as audio says what is wrong
            try:
                with open(as_bytes(path), "rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror}): check its permissions") from error
        digest.update(b"end of file")
    return digest.hexdigest()


def settings_of(config: Mapping[str, Any]) -> Settings:
    """The part of a configuration that decides the numbers."""
    named = {name: config[name] for name in ("arch", "backend", "seed", "vote")}
    return Settings(**named, recipe=from_settings(config))


def computed_by(config: Mapping[str, Any]) -> str:
    """What computes, for people: the GPU by its name."""
    if config["backend"] != "cuda":
        return str(config["backend"])
    from kernels.cuda import device_name

    return f"cuda ({device_name()}, {config['precision']})"


def machine_of(config: Mapping[str, Any]) -> str:
    """What computes, for the record."""
    return machine() + (f", {computed_by(config)}" if config["backend"] == "cuda" else "")
