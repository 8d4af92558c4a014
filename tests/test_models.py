"""The contract of `npser.models`: names and shapes, initial weights, model files, predictions, dropout."""

import json
import zipfile

import numpy as np
import pytest

from npser.corpus import PAPER_LABELS
from npser.errors import UserError
from npser.features import Standardisation
from npser.models import build_model, input_frames, load_model, parameter_count
from npser.optim import SGD
from npser.recipes import ARCHITECTURES

SMALL = {"filters": 4, "hidden": 8, "bins": 16}
FEATURES = 4 * 4 * 4  # 16 x 16 pooled twice, 4 filters


def small(arch="cnn", **settings):
    return build_model(arch, **{**SMALL, **settings})


def batch(model, size=5, seed=0):
    rng = np.random.default_rng(seed)
    bins = model.settings["bins"]
    return rng.standard_normal((size, model.input_frames, bins), np.float32), rng.integers(0, 7, size)


def copied(params):
    return {name: value.copy() for name, value in params.items()}


def assert_same(params, others):
    assert params.keys() == others.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(value, others[name], err_msg=name)


# --- architecture ------------------------------------------------------------------------------------------------


def dense_count(inputs, outputs):
    return inputs * outputs + outputs


def lstm_count(inputs, hidden):
    return 4 * hidden * (inputs + hidden + 1)


BLOCKS = (9 * 1 * 32 + 32) + (9 * 32 * 32 + 32)
COUNTS = {
    "cnn": BLOCKS + dense_count(32 * 32 * 32, 1024) + dense_count(1024, 7),
    "lstm": 3 * lstm_count(128, 128) + dense_count(128, 7),
    "tdcnn": BLOCKS + lstm_count(32 * 32 * 32, 1024) + lstm_count(1024, 1024) + dense_count(1024, 7),
}


@pytest.mark.parametrize(("arch", "million"), [("cnn", 33.57), ("lstm", 0.396), ("tdcnn", 146.8)])
def test_parameter_counts_are_the_papers(arch, million):
    assert parameter_count(arch) == COUNTS[arch]
    assert COUNTS[arch] / 1e6 == pytest.approx(million, rel=1e-3)


@pytest.mark.parametrize("arch", ["cnn", "lstm"])  # tdcnn at its full size: tests/test_torch.py
def test_parameter_count_counts_parameters(arch):
    assert sum(value.size for value in build_model(arch).params.values()) == parameter_count(arch)
    assert sum(value.size for value in build_model(arch, classes=4).params.values()) == parameter_count(arch, 4)


CONVOLUTIONS = {"conv1.w": (3, 3, 1, 4), "conv1.b": (4,), "conv2.w": (3, 3, 4, 4), "conv2.b": (4,)}
OUT = {"out.w": (8, 7), "out.b": (7,)}


def lstm_shapes(number, inputs):
    return {f"lstm{number}.wx": (inputs, 32), f"lstm{number}.wh": (8, 32), f"lstm{number}.b": (32,)}


@pytest.mark.parametrize(
    ("arch", "shapes"),
    [
        ("cnn", {**CONVOLUTIONS, "dense1.w": (FEATURES, 8), "dense1.b": (8,), **OUT}),
        ("lstm", {**lstm_shapes(1, 16), **lstm_shapes(2, 8), **lstm_shapes(3, 8), **OUT}),
        ("tdcnn", {**CONVOLUTIONS, **lstm_shapes(1, FEATURES), **lstm_shapes(2, 8), **OUT}),
    ],
)
@pytest.mark.parametrize(("backend", "dtype"), [("cpu", "float32"), ("reference", "float64")])
def test_names_shapes_and_types(arch, shapes, backend, dtype):
    """Model files carry them, so they are part of the interface, their order included."""
    model = small(arch, backend=backend, dtype=dtype)
    assert {name: value.shape for name, value in model.params.items()} == shapes
    assert list(model.params) == list(shapes)
    assert {value.dtype for value in model.params.values()} == {np.dtype(dtype)}
    x, y = batch(model)
    loss, gradients = model.loss_and_grads(x, y)
    assert isinstance(loss, float)
    assert {name: value.shape for name, value in gradients.items()} == shapes


def test_input_frames():
    assert [input_frames(arch) for arch in ARCHITECTURES] == [128, 128, 152]
    assert [small(arch).input_frames for arch in ARCHITECTURES] == [16, 16, 40]


@pytest.mark.parametrize(
    ("arch", "settings", "said"),
    [
        ("resnet", {}, "'resnet'.*cnn, lstm, tdcnn"),
        ("cnn", {"backend": "abacus"}, "'abacus'"),
        ("cnn", {"dtype": "float64"}, "'float64' with backend 'cpu'"),
        ("cnn", {"dtype": "float16", "backend": "reference"}, "'float16'"),
    ],
)
def test_build_model_refuses(arch, settings, said):
    with pytest.raises(ValueError, match=said):
        build_model(arch, **{**SMALL, **settings})


# --- initial weights ---------------------------------------------------------------------------------------------


def assert_uniform(w, limit):
    """Inside +-limit, reaching it nearly, with the mean and the variance of a uniform distribution."""
    assert np.abs(w).max() <= limit * (1 + 1e-6)
    assert np.abs(w).max() > limit * (1 - 50 / w.size)
    assert abs(w.mean()) < 5 * limit / np.sqrt(3 * w.size)
    assert w.var() == pytest.approx(limit**2 / 3, rel=5 / np.sqrt(w.size))


def test_glorot_weights_and_zero_biases():
    params = build_model("cnn", filters=32, hidden=200, bins=8, seed=1).params
    assert_uniform(params["conv1.w"], np.sqrt(6 / (9 * 1 + 9 * 32)))
    assert_uniform(params["conv2.w"], np.sqrt(6 / (9 * 32 + 9 * 32)))
    assert_uniform(params["dense1.w"], np.sqrt(6 / (2 * 2 * 32 + 200)))
    assert_uniform(params["out.w"], np.sqrt(6 / (200 + 7)))
    for name, value in params.items():
        assert name.endswith(".w") or not value.any(), name


def test_initial_lstm():
    """Every gate is a matrix of its own: Glorot's limit from its own width, its own orthogonal recurrence."""
    H = 24
    params = build_model("lstm", hidden=H, bins=16, seed=1).params
    gates = {name: np.split(value, 4, axis=-1) for name, value in params.items() if name.startswith("lstm")}
    for number, inputs in ((1, 16), (2, H), (3, H)):
        for gate in gates[f"lstm{number}.wx"]:
            assert_uniform(gate, np.sqrt(6 / (inputs + H)))
        for gate in gates[f"lstm{number}.wh"]:
            np.testing.assert_allclose(gate.T @ gate, np.eye(H), atol=1e-5)
        assert [set(gate.tolist()) for gate in gates[f"lstm{number}.b"]] == [{0.0}, {1.0}, {0.0}, {0.0}]  # i, f, g, o
    matrices = [gate for name in gates for gate in gates[name] if name.endswith("wh")]
    assert all(np.abs(a - b).max() > 0.1 for i, a in enumerate(matrices) for b in matrices[:i])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_seed_and_nothing_else_determines_the_weights(arch):
    np.random.seed(1)  # noqa: NPY002 - the global generator is what must not matter
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first = small(arch, seed=5)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002 - nor be used up
    np.random.seed(2)  # noqa: NPY002
    assert_same(small(arch, seed=5).params, first.params)
    assert_same(small(arch, seed=5, backend="reference").params, first.params)
    other = small(arch, seed=6).params
    for name, value in first.params.items():
        assert name.endswith(".b") or (value != other[name]).mean() > 0.99, name


# --- parameters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"dense9.w": np.zeros(3)}, r"cnn has no parameter 'dense9\.w': it has conv1\.w, .*out\.b"),
        ({"out.b": np.zeros(8)}, r"out\.b has shape \(7,\), not \(8,\)"),
        ({"out.b": np.zeros(1)}, r"out\.b has shape \(7,\), not \(1,\)"),  # which NumPy would broadcast
        ({"out.w": np.zeros((7, 8))}, r"out\.w has shape \(8, 7\), not \(7, 8\)"),
    ],
)
def test_set_params_refuses(params, said):
    model = small()
    before = copied(model.params)
    with pytest.raises(ValueError, match=said):
        model.set_params(params)
    assert_same(model.params, before)


def test_set_params_copies():
    model, other = small(seed=1), small(seed=2)
    before, w = copied(model.params), np.arange(7.0)
    model.set_params({"out.b": w})
    w[:] = -1
    np.testing.assert_array_equal(model.params["out.b"], np.arange(7))
    assert_same({**model.params, "out.b": before["out.b"]}, before)  # the rest stays
    model.set_params(other.params)
    assert_same(model.params, other.params)
    other.params["out.b"][:] = 9
    assert not (model.params["out.b"] == 9).any()
    x, _ = batch(model)
    other.params["out.b"][:] = model.params["out.b"]
    np.testing.assert_array_equal(model.predict_proba(x), other.predict_proba(x))


# --- model files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_save_and_load(arch, tmp_path):
    model = small(arch, seed=3, classes=4)
    x, _ = batch(model)
    model.train_step(x, np.arange(5) % 4, SGD(lr=0.1))
    model.labels, model.training = ("neutral", "anger", "fear", "Glück"), {"epochs": 3, "corpus": "demo"}
    model.scale = Standardisation(np.arange(16, dtype=np.float32), np.full(16, 0.5, np.float32))
    path = tmp_path / "m.npz"
    model.save(path)
    loaded = load_model(path)
    assert_same(loaded.params, model.params)
    np.testing.assert_array_equal(loaded.predict_proba(x), model.predict_proba(x))
    assert (loaded.arch, loaded.settings, loaded.labels) == (model.arch, model.settings, model.labels)
    assert (loaded.training, loaded.input_frames, loaded.backend) == (model.training, model.input_frames, "cpu")
    np.testing.assert_array_equal(loaded.scale.mean, model.scale.mean)
    np.testing.assert_array_equal(loaded.scale.deviation, model.scale.deviation)
    assert load_model(str(path), backend="reference").backend == "reference"
    loaded.save(tmp_path / "again.npz")
    assert_same(load_model(tmp_path / "again.npz").params, model.params)


def test_a_model_file_is_plain_arrays(tmp_path):
    """No pickle, which could run code; and every parameter under its name, for whoever reads it without npser."""
    model = small(dtype="float64", backend="reference")
    model.save(tmp_path / "model")  # no suffix is added
    with np.load(tmp_path / "model", allow_pickle=False) as file:
        arrays = dict(file)
    about = json.loads(str(arrays.pop("about")))
    assert about["labels"] == list(PAPER_LABELS)
    assert_same({name.removeprefix("params/"): value for name, value in arrays.items()}, model.params)
    loaded = load_model(tmp_path / "model", backend="reference")
    assert loaded.dtype == np.float64
    assert loaded.scale is None


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(path, contents) of a good model file, a tiny one."""
    path = tmp_path_factory.mktemp("model") / "good.npz"
    build_model("lstm", hidden=2, bins=2, classes=2, backend="reference").save(path)
    return path, path.read_bytes()


def refusal(path):
    """The one line with which load_model refuses the file."""
    with pytest.raises(UserError) as caught:
        load_model(path, backend="reference")
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    assert len(line) < 500
    return line


def altered(saved, path, **changes):
    """A model file with other arrays, or without those that are None."""
    with np.load(saved[0]) as file:
        arrays = {**file, **changes}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def about(saved, **changes):
    with np.load(saved[0]) as file:
        return np.array(json.dumps({**json.loads(str(file["about"])), **changes}))


def test_no_such_file(tmp_path):
    assert "no such file" in refusal(tmp_path / "absent.npz")


@pytest.mark.parametrize("contents", [b"", b"garbage", b"PK\x03\x04", b"RIFF" + bytes(2000), b"\x80\x04N."])
def test_garbage(tmp_path, contents):
    path = tmp_path / "m.npz"
    path.write_bytes(contents)
    assert "not a model file" in refusal(path)


@pytest.mark.parametrize("summary", [[1], {"uar": "x", "folds": 2}, {"uar": 0.5}, {"uar": float("nan"), "folds": 2}])
def test_a_score_that_is_none(saved, tmp_path, summary):
    assert "cross-validation score" in refusal(
        altered(saved, tmp_path / "m.npz", about=about(saved, cross_validation=summary))
    )


def test_compressed_members(saved, tmp_path):
    with np.load(saved[0]) as file:
        np.savez_compressed(tmp_path / "m.npz", **file)
    assert "compressed" in refusal(tmp_path / "m.npz")


def test_other_files(tmp_path):
    refusal(tmp_path)  # a folder
    np.save(tmp_path / "array.npy", np.zeros(3))
    refusal(tmp_path / "array.npy")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    refusal(tmp_path / "other.npz")
    with zipfile.ZipFile(tmp_path / "text.zip", "w") as file:
        file.writestr("about.npy", "text")
    refusal(tmp_path / "text.zip")


def test_contents_that_do_not_fit(saved, tmp_path):
    path = tmp_path / "m.npz"
    shape = refusal(altered(saved, path, **{"params/out.b": np.zeros(3, np.float32)}))
    assert "out.b has shape (3,), not (2,)" in shape
    for bad in (np.nan, np.inf):
        assert "not finite" in refusal(altered(saved, path, **{"params/out.b": np.float32([0, bad])}))
    assert "params/lstm2.wh" in refusal(altered(saved, path, **{"params/lstm2.wh": None}))
    refusal(altered(saved, path, **{"params/out.b": np.array(["a", "b"])}))
    refusal(altered(saved, path, **{"params/out.b": np.array([{}, {}], object)}))  # a pickle
    assert "format is 99" in refusal(altered(saved, path, about=about(saved, format=99)))
    assert "'resnet'" in refusal(altered(saved, path, about=about(saved, arch="resnet")))
    refusal(altered(saved, path, about=about(saved, settings={"colour": "red"})))
    refusal(altered(saved, path, about=about(saved, settings=3)))
    refusal(altered(saved, path, about=np.array("[1, 2")))
    refusal(altered(saved, path, about=np.array("[]")))
    refusal(altered(saved, path, about=None))


def test_truncated(saved, tmp_path):
    path = tmp_path / "m.npz"
    for length in range(0, len(saved[1]), 29):
        path.write_bytes(saved[1][:length])
        refusal(path)


def test_damaged(saved, tmp_path):
    """A flipped bit is refused, or does no harm (where it is in a field that nobody reads): never other weights, never
    a traceback. Everywhere in the zip's directory, and here and there in the arrays."""
    good = load_model(saved[0], backend="reference").params
    path, contents = tmp_path / "m.npz", saved[1]
    with zipfile.ZipFile(saved[0]) as file:
        directory = file.start_dir
    refused = 0
    for place in [*range(0, directory, 7), *range(directory, len(contents))]:
        for flip in (0x01, 0xFF):
            path.write_bytes(contents[:place] + bytes([contents[place] ^ flip]) + contents[place + 1 :])
            try:
                assert_same(load_model(path, backend="reference").params, good)
            except UserError:
                refused += 1
    assert refused > 100


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_float16_halves_the_file_and_rounds_the_parameters(arch, tmp_path):
    model = small(arch)
    model.save(tmp_path / "whole.npz")
    model.save(tmp_path / "half.npz", storage="float16")
    loaded = load_model(tmp_path / "half.npz")
    for name, value in model.params.items():
        assert loaded.params[name].dtype == np.float32
        np.testing.assert_array_equal(loaded.params[name], value.astype(np.float16).astype(np.float32))
    sizes = {}
    for name in ("whole", "half"):
        with zipfile.ZipFile(tmp_path / f"{name}.npz") as file:
            sizes[name] = sum(m.file_size for m in file.infolist() if m.filename.startswith("params/"))
    headers = 128 * len(model.params)
    assert (sizes["half"] - headers) * 2 == sizes["whole"] - headers


def test_float16_refuses_what_it_cannot_hold(tmp_path):
    model = small("lstm")
    model.set_params({"out.b": np.full_like(model.params["out.b"], 7e4)})
    with pytest.raises(ValueError, match=r"out\.b holds a value of 70000"):
        model.save(tmp_path / "m.npz", storage="float16")
    assert not (tmp_path / "m.npz").exists()
    with pytest.raises(ValueError, match="storage 'int8'"):
        model.save(tmp_path / "m.npz", storage="int8")


def test_a_file_says_features_corpus_and_score(tmp_path):
    model = small("lstm")
    model.training = {"corpus": "emodb", "segment_hop": 16}
    model.cross_validation = {"uar": 0.625, "folds": 50}
    model.save(tmp_path / "m.npz")
    with np.load(tmp_path / "m.npz") as file:
        content = json.loads(str(file["about"]))
    assert content["features"] == {"frame": 256, "hop": 128, "bins": 128, "floor": 1e-3}
    assert content["corpus"] == "emodb"
    assert load_model(tmp_path / "m.npz").cross_validation == {"uar": 0.625, "folds": 50}


def test_files_of_the_first_format_are_read(saved, tmp_path):
    with np.load(saved[0]) as file:
        content = json.loads(str(file["about"]))
    old = {key: content[key] for key in ("arch", "settings", "labels", "training")} | {"format": 1}
    path = altered(saved, tmp_path / "m.npz", about=np.array(json.dumps(old)))
    assert_same(load_model(path, "reference").params, load_model(saved[0], "reference").params)


def test_hostile_files(saved, tmp_path):
    """None of them may take memory or time; labels may not carry control characters to a terminal."""
    path = tmp_path / "m.npz"
    settings = load_model(saved[0], "reference").settings
    for large in (65536, 10**9, 10**30, True, 2.5, "2", -1):
        refusal(altered(saved, path, about=about(saved, settings=settings | {"hidden": large})))
    refusal(altered(saved, path, about=about(saved, settings=settings | {"bins": 65536})))
    with np.load(saved[0]) as file:
        arrays = dict(file)
    np.savez_compressed(path, **arrays | {"params/lstm1.wx": np.zeros((4000, 4000), np.float32)})
    assert "compressed" in refusal(path)
    for labels in (["a", "\x1b[2J"], ["a", "a"], ["a", ""], ["a", 3], "ab\n"):
        refusal(altered(saved, path, about=about(saved, labels=labels)))
    refusal(altered(saved, path, about=np.array("[" * 100_000)))
    refusal(altered(saved, path, about=about(saved, features={"frame": 512})))
    two = np.ones(2, np.float32)
    for scale in ((two, 0 * two), (two, np.ones(3)), (np.float32([np.nan, 1]), two)):
        refusal(altered(saved, path, **{"scale/mean": scale[0], "scale/deviation": scale[1]}))


# --- predictions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_predictions(arch):
    model = small(arch)
    x, _ = batch(model, size=9)
    before = x.copy()
    p = model.predict_proba(x)
    assert p.shape == (9, 7)
    assert p.dtype == np.float32
    assert (p > 0).all()
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(x, before)
    for batch_size in (1, 2, 4, 8, 9, 100):
        np.testing.assert_array_equal(model.predict_proba(x, batch_size), p)
    np.testing.assert_array_equal(model.predict_proba(x[::-1])[::-1], p)
    empty = model.predict_proba(x[:0])
    assert empty.shape == (0, 7)
    assert empty.dtype == np.float32


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("wrong", [(2, 15, 16), (2, 16, 15), (2, 40, 15), (16, 16), (2, 16, 16, 1), (2, 41, 16)])
def test_wrong_input_shapes(arch, wrong):
    model, x, y = small(arch), np.zeros(wrong, np.float32), np.zeros(2, int)
    before = copied(model.params)
    said = rf"x has shape .*, not \(B, {model.input_frames}, 16\)"
    with pytest.raises(ValueError, match=said):
        model.predict_proba(x)
    with pytest.raises(ValueError, match=said):
        model.loss_and_grads(x, y)
    with pytest.raises(ValueError, match=said):
        model.train_step(x, y, SGD())
    assert_same(model.params, before)


@pytest.mark.parametrize("y", [[], [0], [0, 1, 2], [[0, 1]], [0, 7], [-1, 0], [0.0, 1.0], [False, True]])
def test_wrong_targets(y):
    """NumPy would take 1 for 2 targets, -1 for the last class, and an empty batch for a loss of NaN."""
    model, x, y = small("cnn"), np.zeros((2, 16, 16), np.float32), np.array(y)
    before = copied(model.params)
    for call in (model.loss_and_grads, lambda x, y: model.train_step(x, y, SGD())):
        with pytest.raises(ValueError, match=r"^y (has shape|must hold classes)"):
            call(x[: len(y)] if not len(y) else x, y)
    assert_same(model.params, before)


# --- dropout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["cnn", "tdcnn"])
def test_dropout_is_off_outside_training(arch):
    model, without = small(arch, dropout=0.5), small(arch, dropout=0.0)
    x, y = batch(model)
    np.testing.assert_array_equal(model.predict_proba(x), without.predict_proba(x))
    loss, gradients = model.loss_and_grads(x, y)
    true_loss, true_gradients = without.loss_and_grads(x, y)
    assert loss == true_loss
    assert_same(gradients, true_gradients)
    assert model.train_step(x, y, SGD()) != without.train_step(x, y, SGD())


@pytest.mark.parametrize("arch", ["cnn", "tdcnn"])
def test_dropout_depends_on_the_update_number_alone(arch):
    """Not on what was computed before: a resumed run draws the masks of one that was never stopped."""
    fresh, used = small(arch, dropout=0.5, seed=4), small(arch, dropout=0.5, seed=4)
    x, y = batch(fresh)
    used.predict_proba(x)
    used.loss_and_grads(x, y)
    for n in (2, 0, 1, 1):
        used._logits(x, n)
    losses = []
    for n in (3, 0):
        a, b = SGD(), SGD()
        a.updates = b.updates = n
        used.set_params(fresh.params)
        losses.append(fresh.train_step(x, y, a))
        assert used.train_step(x, y, b) == losses[-1]
        assert_same(used.params, fresh.params)
    rest = [small(arch, dropout=0.5, seed=4)._logits(x, n) for n in range(5)]
    assert all((a != b).any() for i, a in enumerate(rest) for b in rest[:i])
    other = small(arch, dropout=0.5, seed=5)
    other.set_params(small(arch, seed=4).params)
    assert (other._logits(x, 0) != rest[0]).any()  # and on the model's seed


def test_dropout_layers_have_masks_of_their_own():
    model = small("cnn", dropout=0.5)
    convolutions, *rest = model.layers.layers
    dropouts = [layer for layer in [*convolutions.layers, *rest] if type(layer).__name__ == "Dropout"]
    ones = np.ones(64, np.float32)
    masks = [layer.forward(ones, 0) for layer in dropouts]
    assert len(masks) == 3  # after both poolings and after the dense layer
    assert all((a != b).any() for i, a in enumerate(masks) for b in masks[:i])
