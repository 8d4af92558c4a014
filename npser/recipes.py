"""Recipes: everything that the paper leaves silent and that training uses, chosen on development data, under a name.

`paper` uses what the paper's words support, and for the lstm a limit on the length of the gradient; `best` is what the
same networks can do with everything that trials showed to be worth having (the tdcnn's is the cnn's, not tried). Every
trial is in bench/results/development.csv, a line for each epoch.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import inf
from typing import Any

from npser.errors import UserError

ARCHITECTURES = ("cnn", "lstm", "tdcnn")
NAMES = ("paper", "best")
_ADDED = {"label_smoothing": 0.0}  # fields that the first published runs do not have, and what they were trained with
OPTIONS = ("epochs", "segment_hop", "batch_size")  # fields that have a place of their own in config.json
_COUNTS = (*OPTIONS, "average_last")


@dataclass(frozen=True)
class Recipe:
    """How one network is trained. The defaults are the plainest choice: nothing beyond the paper's words.

    UserError, naming the field, for a value that no training can use.
    """

    epochs: int = 1
    segment_hop: int = 16  # frames (8 ms) from one window of an utterance to the next
    batch_size: int = 32
    standardisation: str = "bin"  # mean and deviation of the training frames: "bin", each bin its own, or "global"
    clip_norm: float | None = None  # longest gradient: see npser.optim.SGD
    final_rate: float = 1.0  # the learning rate falls linearly to this share of it
    average_last: int = 1  # the weights are the mean of those after so many last epochs
    label_smoothing: float = 0.0  # share of the probability that is wanted spread over all classes
    share_windows: int = 1  # tdcnn: so many neighbours stand together in a batch, common windows computed once
    speeds: tuple[float, ...] = ()  # beside 1: in each epoch, every utterance is heard at one of these speeds
    moving: bool = False  # windows begin anywhere within their share of the utterance, anew in every epoch

    def __post_init__(self) -> None:
        allowed = {
            **{name: (getattr(self, name) >= 1, "1 or more is wanted") for name in _COUNTS},
            "standardisation": (self.standardisation in ("bin", "global"), "bin or global is wanted"),
            "clip_norm": (self.clip_norm is None or 0 < self.clip_norm < inf, "None or a length above 0 is wanted"),
            "share_windows": (
                self.share_windows == 1 or (self.share_windows > 1 and not self.moving),
                "1 is wanted, as windows that move have nothing in common, or a recipe without moving windows",
            ),
            "label_smoothing": (0 <= self.label_smoothing < 1, "a share below 1 is wanted, 0 for none"),
            "final_rate": (0 < self.final_rate <= 1, "a share above 0, at most 1, is wanted"),
            "speeds": (all(0.25 <= speed <= 4 for speed in self.speeds), "speeds from 0.25 to 4 are wanted"),
        }
        for name, (good, wanted) in allowed.items():
            if not good:
                raise UserError(f"the recipe's {name} is {getattr(self, name)}: {wanted}")

    @property
    def augmented(self) -> bool:
        return bool(self.speeds or self.moving)


RECIPES: Mapping[str, Mapping[str, Recipe]] = {
    "paper": {
        "cnn": Recipe(epochs=5, segment_hop=8),
        "lstm": Recipe(epochs=12, clip_norm=1.0),
        "tdcnn": Recipe(epochs=8),
    },
    "best": {
        "cnn": Recipe(epochs=16, speeds=(0.95, 1.05), moving=True, final_rate=0.05, label_smoothing=0.1),
        "lstm": Recipe(epochs=12, clip_norm=1.0, average_last=3, label_smoothing=0.1),
        "tdcnn": Recipe(  # follows cnn
            epochs=10, speeds=(0.95, 1.05), moving=True, final_rate=0.05, label_smoothing=0.1
        ),
    },
}


# The built-in corpus is there to be run at once: a short protocol with the same networks.
DEMO: Mapping[str, Mapping[str, int]] = {
    "cnn": {"epochs": 4, "segment_hop": 16, "batch_size": 16},
    "lstm": {"epochs": 10, "segment_hop": 16, "batch_size": 16},
    "tdcnn": {"epochs": 3, "segment_hop": 28, "batch_size": 16},
}


def recipe_for(name: str, arch: str, demo: bool, given: Mapping[str, Any]) -> Recipe:
    """The named recipe of a network, on the built-in corpus or another, with the fields that were given."""
    return replace(RECIPES[name][arch], **{**(DEMO[arch] if demo else {}), **given})


def as_settings(recipe: Recipe) -> dict[str, Any]:
    """A recipe as config.json and model files hold it: what has an option of its own, then the rest as `training`."""
    everything = asdict(recipe)
    own = {name: everything.pop(name) for name in OPTIONS}
    return {**own, "training": everything | {"speeds": list(recipe.speeds)}}


def from_settings(config: Mapping[str, Any]) -> Recipe:
    """The recipe that `as_settings` wrote."""
    rest = dict(config["training"])
    return Recipe(**{name: config[name] for name in OPTIONS}, **rest | {"speeds": tuple(rest["speeds"])})


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the fields that its version did not know yet, as its trainings had them."""
    if not isinstance(config.get("training"), Mapping):
        return dict(config)
    return {**config, "training": {**_ADDED, **config["training"]}}


def describe(recipe: Recipe) -> str:
    """A recipe on one line: epochs, hop and batch, then whatever differs from the plainest choice."""
    said = [f"{name}={getattr(recipe, name)}" for name in OPTIONS]
    for field in fields(Recipe)[1:]:
        value = getattr(recipe, field.name)
        if value != field.default and f"{field.name}={value}" not in said:
            shown = ",".join(f"{x:g}" for x in value) if isinstance(value, tuple) else value
            said.append(f"{field.name}={shown}")
    return " ".join(said)


def changed(recipe: Recipe, settings: Mapping[str, str], option: str = "--set") -> Recipe:
    """The recipe with some fields set anew from text. UserError for an unknown field or a value of another kind.

    option: what the fields were given to, for that line.
    """
    values: dict[str, Any] = {}
    for name, text in settings.items():
        if name not in asdict(recipe):
            raise UserError(f"{option} {name}: a recipe has {', '.join(asdict(recipe))}")
        values[name] = _value(name, text, option)
    return replace(recipe, **values)


def _value(name: str, text: str, option: str) -> Any:
    kind = next(str(getattr(f.type, "__name__", f.type)) for f in fields(Recipe) if f.name == name)
    try:
        if kind == "str":
            return text
        if kind.startswith("tuple"):
            return tuple(float(part) for part in text.split(",") if part)
        if text == "None" and "None" in kind:
            return None
        if kind == "bool":
            return {"True": True, "False": False}[text]
        return int(text) if kind == "int" else float(text)
    except (ValueError, KeyError) as error:
        raise UserError(f"{option} {name}={text}: {kind} is wanted") from error
