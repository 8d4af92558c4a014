"""ONNX: every network gives ONNX Runtime's probabilities, and a wrong translation is not written."""

import errno
import json
import os
import re
import sys

import numpy as np
import pytest

from npser import export
from npser.errors import RunFailed, UserError
from npser.export import Graph, build, difference, main
from npser.features import Standardisation
from npser.models import ARCHITECTURES, build_model


def trained_like(arch, seed=1, **sizes):
    """A network with weights and biases far from zero, so that no part of it could be left out unnoticed."""
    model = build_model(arch, seed=seed, **sizes)
    rng = np.random.default_rng(seed + 1)
    bins = model.settings["bins"]
    model.set_params({n: v + rng.normal(0, 0.1, v.shape).astype(np.float32) for n, v in model.params.items()})
    model.scale = Standardisation(
        np.linspace(-6, -4, bins, dtype=np.float32), np.linspace(1, 3, bins, dtype=np.float32)
    )
    model.training = {"segment_hop": 16}
    return model


@pytest.fixture
def tools():
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package, reason="needs pip install 'npser[onnx]'")


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_onnx_runtime_gives_the_same_probabilities(arch, tmp_path, capsys):
    import onnx
    import onnxruntime

    model = trained_like(arch, filters=5, hidden=12, bins=16, classes=3)
    model.labels = ("a", "b", "c")
    model.save(tmp_path / "m.npz")
    assert main([str(tmp_path / "m.npz"), str(tmp_path / "m.onnx")]) == 0
    assert "gives the same probabilities within" in capsys.readouterr().out
    frames = np.random.default_rng(3).normal(-5, 2, (7, model.input_frames, 16)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    (p,) = session.run(None, {"frames": frames})
    assert p.std(axis=0).min() > 1e-3  # the windows are told apart
    np.testing.assert_allclose(p, model.predict_proba(model.scale.apply(frames)), atol=1e-5)
    metadata = {entry.key: json.loads(entry.value) for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert metadata["labels"] == ["a", "b", "c"]
    assert metadata["features"]["hop"] == 128
    assert metadata["training"]["segment_hop"] == 16


@pytest.mark.usefixtures("tools")
def test_the_papers_lstm():
    models, graph = [trained_like("lstm")], Graph()
    assert difference(graph, build(graph, models).SerializeToString(), models) < 1e-5


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_several_networks_decide_together(arch, tmp_path, capsys, monkeypatch):
    import onnx

    models = [trained_like(arch, seed=seed, filters=5, hidden=12, bins=16, classes=3) for seed in (1, 2, 3)]
    models[2].scale = Standardisation(np.full(16, -5, np.float32), np.full(16, 2, np.float32))  # each has its own
    for n, model in enumerate(models):
        model.training["seed"] = n
        model.save(tmp_path / f"{n}.npz")
    named = [str(tmp_path / name) for name in ("0.npz", "m.onnx", "1.npz", "2.npz")]
    command = [*named[:2], "--with", named[2], "--with", named[3]]
    assert main(command) == 0
    assert re.search(rf"m\.onnx: 3 networks of kind {arch}, .* the same probabilities within", capsys.readouterr().out)
    graph = Graph()
    assert difference(graph, (tmp_path / "m.onnx").read_bytes(), models) < 1e-6
    assert difference(graph, (tmp_path / "m.onnx").read_bytes(), models[:2]) > 1e-3  # all of them decide
    metadata = {entry.key: json.loads(entry.value) for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    trained = [metadata["training"], *metadata["training of the others"]]
    assert [training["seed"] for training in trained] == [0, 1, 2]
    monkeypatch.setattr(export, "LARGEST", sum(v.nbytes for m in models for v in m.params.values()) - 1)
    with pytest.raises(UserError, match="--with: ONNX files hold 2 GB at most"):
        main(command)
    with pytest.raises(UserError, match="there already"):
        main([*named[:2], "--with", named[0]])
    trained_like(arch, bins=8, classes=3).save(tmp_path / "narrow.npz")
    with pytest.raises(UserError, match=f"in windows of {trained_like(arch, bins=8).input_frames} frames, but"):
        main([*named[:2], "--with", str(tmp_path / "narrow.npz")])


@pytest.mark.usefixtures("tools")
def test_a_wrong_translation_is_not_written(tmp_path, monkeypatch):
    trained_like("lstm", hidden=4, bins=8).save(tmp_path / "m.npz")
    right = export._last

    def first_step(graph, x):
        name = right(graph, x)
        graph.constants[-1].CopyFrom(graph.onnx.numpy_helper.from_array(np.array(0, np.int64), "last"))
        return name

    monkeypatch.setattr(export, "_last", first_step)
    with pytest.raises(RunFailed, match="nothing written"):
        main([str(tmp_path / "m.npz"), str(tmp_path / "m.onnx")])
    assert not (tmp_path / "m.onnx").exists()


def no_space(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.usefixtures("tools")
def test_wrong_use(tmp_path, monkeypatch):
    model = build_model("lstm", hidden=4, bins=8)
    model.save(tmp_path / "m.npz")
    (tmp_path / "folder.onnx").mkdir()
    for arguments, said in [
        (("m.npz", "m.onnx"), r"m\.npz: the model holds no feature statistics"),
        (("m.npz", "m.pb"), r"something\.onnx"),
        (("absent.npz", "m.onnx"), "no such file"),
        (("m.npz", "absent/m.onnx"), "absent is not there"),
        (("m.npz", "folder.onnx"), "is no file"),
    ]:
        with pytest.raises(UserError, match=said):
            main([str(tmp_path / argument) for argument in arguments])
    model.scale = Standardisation(np.zeros(8, np.float32), np.ones(8, np.float32))
    model.save(tmp_path / "m.npz")
    monkeypatch.setattr(export, "replacing", no_space)
    with pytest.raises(RunFailed, match=r"m\.onnx: cannot be written \(No space left on device\)"):
        main([str(tmp_path / "m.npz"), str(tmp_path / "m.onnx")])


def test_missing_packages_are_asked_for_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"pip install 'npser\[onnx\]'"):
        main([str(tmp_path / "m.npz"), str(tmp_path / "m.onnx")])
