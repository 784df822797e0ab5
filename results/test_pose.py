"""Tests of pose.py: python -m pytest -q results/test_pose.py"""

import json
import math
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from torch import nn

# This comes first: importing test_models hides GPUs from the scripts.
from test_models import reproducible  # noqa: F401 - a fixture that every test here uses

# isort: split
import data
from alexcaps import AlexCapsNet
from results import pose

HERE = Path(__file__).parent


# -- Poses ----------------------------------------------------------------------------


def draw_stroke(width, lean, height=20):
    """A straight stroke, uint8 [28, 28], of this width and height in pixels.

    It leans to the right by `lean` degrees.
    """
    fine = (torch.arange(28 * 16) + 0.5) / 16 - 14  # 16 points per pixel
    y, x = torch.meshgrid(fine, fine, indexing="ij")
    slope = math.tan(math.radians(lean))
    inside = (x + slope * y).abs() <= width / 2 / math.cos(math.radians(lean))
    inside &= y.abs() <= height / 2
    pixels = nn.functional.avg_pool2d(inside[None].float(), 16)[0]
    return (255 * pixels).round().to(torch.uint8)


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("lean", [-30, 0, 10, 30])
def test_slant_and_stroke_width_of_a_known_stroke(width, lean):
    image = draw_stroke(width, lean).unsqueeze(0)
    assert pose.slant(image).item() == pytest.approx(lean, abs=0.5)
    # The stroke is a parallelogram of height h. Its area is h w / cos(lean), and its
    # perimeter is 2 (h + w) / cos(lean), since the two ends count too.
    for height in (20, 28):  # 28: up to the edge of the image
        image = draw_stroke(width, lean, height).unsqueeze(0)
        expected = width * height / (height + width)
        assert pose.stroke_width(image).item() == pytest.approx(expected, rel=0.08)


def test_views_move_the_digits_as_they_say():
    images = draw_stroke(3, 0, height=12).expand(200, 28, 28)
    written, turned, shifted = pose.make_views(images)
    indices = torch.arange(200)
    x = shifted.inputs(images, indices, AlexCapsNet) * AlexCapsNet.std + AlexCapsNet.mean
    places = torch.arange(28.0) - 13.5
    ink = x.squeeze(1)
    for name, axis in (("right", 1), ("down", 2)):
        centre = (ink.sum(axis) * places).sum(1) / ink.sum((1, 2))
        torch.testing.assert_close(centre, shifted.poses[name], atol=0.01, rtol=0)
    # An upright stroke that is turned counter-clockwise leans to the left
    x = turned.inputs(images, indices, AlexCapsNet) * AlexCapsNet.std + AlexCapsNet.mean
    lean = pose.slant(x.squeeze(1))
    assert (lean.sign() == -turned.poses["turn"].sign()).float().mean() > 0.98
    for name, most in pose.CHOSEN.items():
        values = turned.poses[name] if name == "turn" else shifted.poses[name]
        assert 0.95 * most < values.abs().max() <= most
    assert set(written.poses) | set(turned.poses) | set(shifted.poses) == set(pose.POSES)


# -- The probe ------------------------------------------------------------------------


def planted(n, k, share):
    """Features [n, k] that explain `share` of a pose [n], class by class."""
    torch.manual_seed(0)
    labels = torch.randint(10, [n])
    x = torch.randn(n, k, dtype=torch.float64) * torch.logspace(0, -2, k)
    directions = torch.randn(10, k, dtype=torch.float64)  # each class has its own
    signal = ((x / x.std(dim=0)) * directions[labels]).sum(dim=1)
    signal = signal / directions.norm(dim=1)[labels]
    noise = torch.randn(n, dtype=torch.float64)
    y = 5 * labels + math.sqrt(share) * signal + math.sqrt(1 - share) * noise
    return x, y, labels, torch.rand(n) < 0.5


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_the_probe_finds_a_planted_share(share):
    assert pose.probe(*planted(20_000, 16, share)) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("k", [1, 16, 40])
def test_the_probe_is_ridge_regression(k):
    """Against scikit-learn, with its principal components if there are more than 16."""
    x, y, labels, fit = planted(1000, k, 0.7)
    errors = []
    squares = []
    for digit in range(10):
        first = (labels == digit) & fit
        second = (labels == digit) & ~fit
        a = x[first].numpy()
        b = x[second].numpy()
        if k > 16:
            components = PCA(16, svd_solver="full").fit(a)
            a = components.transform(a)
            b = components.transform(b)
        centre = a.mean(axis=0)
        scale = a.std(axis=0, ddof=1)
        model = Ridge(alpha=1.0).fit((a - centre) / scale, y[first].numpy())
        errors.append(y[second].numpy() - model.predict((b - centre) / scale))
        squares.append((y[second] - y[first].mean()).numpy())
    errors = np.concatenate(errors)
    squares = np.concatenate(squares)
    expected = 1 - (errors**2).sum() / (squares**2).sum()
    assert pose.probe(x, y, labels, fit) == pytest.approx(expected, abs=1e-9)


# -- Networks -------------------------------------------------------------------------


class Dots(nn.Module):
    """A planted network for one class: the capsule's numbers 1 and 2 say where the ink
    lies, and the decoder draws a dot there."""

    side = 28
    mean = AlexCapsNet.mean
    std = AlexCapsNet.std

    def __init__(self, digit):
        super().__init__()
        self.digit = digit
        self.weight = nn.Parameter(torch.zeros(1))  # says on which device the network is
        self.places = torch.arange(28.0) - 13.5

    def forward(self, x):
        ink = x.squeeze(1) * self.std + self.mean
        total = ink.sum(dim=(1, 2))
        capsules = torch.zeros(len(x), 10, 16)
        capsules[:, self.digit, 0] = 0.5
        capsules[:, self.digit, 1] = (ink.sum(dim=1) * self.places).sum(dim=1) / total / 100
        capsules[:, self.digit, 2] = (ink.sum(dim=2) * self.places).sum(dim=1) / total / 100
        return capsules

    def scores(self, capsules):
        return capsules.norm(dim=2)

    def decoder(self, capsules, digits):
        x, y = 100 * capsules[torch.arange(len(digits)), digits, 1:3].T
        across = (-((self.places - x[:, None]) ** 2) / 4).exp()
        along = (-((self.places - y[:, None]) ** 2) / 4).exp()
        return (along[:, :, None] * across[:, None, :]).unsqueeze(1)


def test_knobs_move_the_picture_as_they_say():
    strokes = [draw_stroke(2 + k % 3, 10 * (k % 5) - 20, height=14) for k in range(60)]
    images = torch.stack(strokes)
    model = Dots(3)
    drawn = pose.turn_knobs(model, images, 3)
    centres = {}
    for name in ("right", "down"):
        values, pictures = drawn[name]
        assert values.tolist() == [-3, -2, -1, 0, 1, 2, 3]
        total = pictures.sum(dim=(1, 2))
        x = (pictures.sum(dim=1) * model.places).sum(dim=1) / total
        y = (pictures.sum(dim=2) * model.places).sum(dim=1) / total
        centres[name] = (x - x[3], y - y[3])
    still = torch.zeros(7)
    steps = torch.arange(-3.0, 4)
    for found, expected in zip(centres["right"], (steps, still), strict=True):
        torch.testing.assert_close(found, expected, atol=0.1, rtol=0)
    for found, expected in zip(centres["down"], (still, steps), strict=True):
        torch.testing.assert_close(found, expected, atol=0.1, rtol=0)
    slants, _ = drawn["slant"]
    measured = pose.slant(images)
    assert slants[3].item() == pytest.approx(measured.mean().item(), abs=1e-4)
    assert (slants[6] - slants[3]).item() == pytest.approx(2 * measured.std().item(), abs=1e-4)


def test_what_a_probe_sees_of_a_capsule():
    images, labels = data.load("digits", "", "test")
    view = pose.make_views(images)[0]
    model = AlexCapsNet().eval()
    features, recognised = pose.look(model, images, labels, view)
    with torch.no_grad():
        capsules = model(data.images_to_input(images, model))
    true = torch.stack([capsules[k, label] for k, label in enumerate(labels)])
    torch.testing.assert_close(features[pose.CAPSULE], true)
    product = features[pose.LENGTH] * features[pose.DIRECTION]
    torch.testing.assert_close(product, true)
    torch.testing.assert_close(features[pose.DIRECTION].norm(dim=1), torch.ones(360))
    assert torch.equal(recognised, capsules.norm(dim=2).argmax(dim=1) == labels)
    with pytest.raises(data.UserError, match="a-run recognises too few digits"):
        pose.measure("a-run", model, images, labels)


# -- Seeds together -------------------------------------------------------------------


def run_of(network, kind, seed, r2, feature, training="3 epochs"):
    """What main collects about a run, with the same R² for each pose."""
    found = {"network": network, "kind": kind, "training": training, "seed": seed}
    found["accuracy"] = {"as written": 99.0}
    found["digits"] = {"as written": 9900}
    return found | {"r2": {feature: dict.fromkeys(pose.POSES, r2)}}


def test_seeds_are_pooled_with_their_intervals():
    runs = [run_of("no network", "no network", None, 0.9, pose.PIXELS, training="")]
    first = (0.5, 0.6, 0.7)
    second = (0.1, 0.2, 0.3)
    for seed in range(3):
        runs.append(run_of("A, 3 epochs", "capsules", seed, second[seed], pose.DIRECTION))
        kind = "capsules and decoder"
        runs.append(run_of("A, reconstruction 20", kind, seed, first[seed], pose.DIRECTION))
    runs.append(run_of("A, long", "capsules", 0, 0.4, pose.DIRECTION, training="20 epochs"))
    found = {"networks": pose.pool(runs)}
    found = json.loads(json.dumps(found))  # as it is read from the file
    names = [entry["network"] for entry in found["networks"]]
    assert names == ["no network", "A, 3 epochs", "A, reconstruction 20", "A, long"]
    summary = found["networks"][2]["r2"][pose.DIRECTION]["slant"]
    assert summary["values"] == list(first) and summary["n"] == 3
    # Three values with standard deviation 0.1: t(0.975, 2) = 4.3027
    half = 4.3027 * 0.1 / math.sqrt(3)
    assert summary["interval"] == pytest.approx([0.6 - half, 0.6 + half], abs=1e-4)
    assert found["networks"][3]["r2"][pose.DIRECTION]["slant"]["interval"] is None
    table = pose.pose_table(found)
    assert "0.60 (0.35 to 0.85)" in table and "| 0.40 " in table
    [gaps] = pose.differences(found).values()
    theirs = stats.ttest_ind(first, second).confidence_interval()
    assert gaps["turn"]["mean"] == pytest.approx(0.4)
    assert gaps["turn"]["interval"] == pytest.approx(list(theirs))
    assert "0.40" not in pose.short_table(found)  # trained for longer: not comparable


def test_the_kept_weights_are_probed_and_drawn(tmp_path, monkeypatch, capsys):
    """README's exercise 12, but with the small digits."""
    # A class needs 2 * COMPONENTS recognised digits, and few of the small 9s are recognised.
    # (So the probes see only 4 principal components here.)
    monkeypatch.setattr(pose, "COMPONENTS", 4)
    draw = mock.Mock(side_effect=pose.draw_knobs)
    monkeypatch.setattr(pose, "draw_knobs", draw)
    monkeypatch.setattr(pose, "load", lambda *_: data.load("digits", "", "train"))
    monkeypatch.setattr(pose, "MODELS", dict(pose.MODELS))
    run = HERE / "alexcaps-ddp-reconstruction"
    arguments = ["pose.py", str(run), "--digit", "7", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    pose.main()
    assert "direction (16)" in capsys.readouterr().out
    no_network, probed = json.loads((tmp_path / "pose.json").read_text())["networks"]
    assert list(no_network["r2"]) == [pose.PIXELS]
    assert probed["r2"][pose.DIRECTION]["slant"]["mean"] > 0.5
    drawn, title, file = draw.call_args.args
    assert "the mean capsule of a 7" in title
    assert drawn["turn"][1].shape == (7, 28, 28)
    assert file.exists()


@pytest.mark.parametrize(
    "changes, best, words",
    [
        ({}, None, "has no weights"),
        ({}, b"", "is damaged"),
        ({"dataset": "digits"}, b"", "was not trained on MNIST"),
    ],
)
def test_a_wrong_run_is_one_line(changes, best, words, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(HERE / "alexcaps-ddp", run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | changes))
    if best is not None:
        (run / "best.pt").write_bytes(best)
    monkeypatch.setattr("sys.argv", ["pose.py", str(run), "--out", str(tmp_path / "out")])
    monkeypatch.setattr(pose, "load", lambda *_: data.load("digits", "", "test"))
    monkeypatch.setattr(pose, "MODELS", dict(pose.MODELS))
    with pytest.raises(data.UserError, match=words) as error:
        pose.main()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
