"""What the README tells its readers to type."""

import re
import shlex

import pytest
from conftest import ROOT, write_tone

from npser.features import Standardisation
from npser.models import build_model
from npser.options import read

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(module):
    """The commands of a module, as they stand in code and in sentences, without what a shell does with them."""
    flat = re.sub(r"\s+", " ", TEXT)
    lines = re.findall(rf"^\$? ?python -m {module} (.*)$", TEXT, re.MULTILINE)
    return [*lines, *re.findall(rf"`python -m {module} ([^`]*)`", flat)]


def test_the_block_of_python_runs(tmp_path, monkeypatch, capsys):
    import numpy as np

    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    write_tone(tmp_path / "emodb" / "wav" / "03a01Fa.wav", 200)
    model = build_model("lstm", hidden=8, seed=1)
    model.scale = Standardisation(np.full(128, -5, np.float32), np.full(128, 2, np.float32))
    model.save(tmp_path / "model.npz")
    names = {}
    exec(code, names)
    assert capsys.readouterr().out.strip() in model.labels
    assert np.isfinite(names["loss"])
    assert "lstm1.wx" in names["grads"]


@pytest.mark.parametrize("command", commands("npser.train"))
def test_options_of_npser_train_exist(command):
    words = ["2" if word == "N" else word for word in shlex.split(command.split("#")[0].split("|")[0])]
    if "--help" not in words and "..." not in command:
        read(words)


def test_there_are_such_commands():
    assert len(commands("npser.train")) > 5


@pytest.mark.parametrize("link", re.findall(r"\]\(#([^)]+)\)", TEXT))
def test_links_lead_to_headings(link):
    headings = re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    assert link in [re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings]
