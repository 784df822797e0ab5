"""Tests, on the CPU, in a few minutes:

    python -m pytest -q test_models.py

Formulas are held against float64 references written as plain loops; the scripts run as real
processes, under torchrun too, on scikit-learn's digits, so that no network is needed.
"""

import csv
import functools
import gzip
import hashlib
import http.server
import inspect
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats
from sklearn import metrics
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DistributedSampler, RandomSampler
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import rotate

if "TORCHELASTIC_RUN_ID" not in os.environ:  # left-over variables would make us wait for ranks
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(variable, None)

import capsules
import data
import evaluate
import train_ddp
import train_single
from alexcaps import AlexCapsNet
from rescaps import ResCapsNet
from results import benchmark, plain, tables
from results.benchmark import check_same, formulations

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on the CPU, whatever the machine has
HERE = Path(__file__).parent
DIGITS = ("--dataset", "digits")
SMALL = (*DIGITS, "--train-size", "96", "--batch-size", "16")  # 6 steps an epoch
OFFLINE = {f"{p}_proxy": "http://127.0.0.1:9" for p in ("http", "https")}  # a closed port


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)


def run_python(*arguments, start=False, timeout=240, **more):
    """Run a script of the repository as a user does; returns the finished process, or with
    `start` the running one."""
    command = [sys.executable, *map(str, arguments)]
    env = {"PYTHONPATH": str(HERE), **more.pop("env", os.environ)}
    options = {"cwd": HERE, "text": True, "env": env} | more
    if start:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, **pipes, **options)
    return subprocess.run(command, capture_output=True, timeout=timeout, check=False, **options)


def call(script, capsys, monkeypatch, *arguments):
    """Run a script's main in this process: (exit code, what it printed, its error output)."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    monkeypatch.setattr(train_single, "keep_freed_memory", lambda: None)  # it cannot be undone
    code, handler = 0, signal.getsignal(signal.SIGINT)
    try:
        train_single.run_main(script.main)
    except SystemExit as end:
        code = end.code or 0
    finally:
        signal.signal(signal.SIGINT, handler)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture
def single(capsys, monkeypatch):
    """single("--model", ...) runs train_single in this process."""
    return lambda *arguments: call(train_single, capsys, monkeypatch, *arguments)


def assert_one_line(code, error, *words):
    """A user's mistake: exit code 2, one line that holds "error: " and the words."""
    assert code == 2, error
    lines = error.strip().splitlines()
    assert len(lines) == 1 and "error: " in lines[0], error
    for word in words:
        assert word in error, error


def weights(run_dir, name="last.pt"):
    return torch.load(Path(run_dir) / name, weights_only=True)["model"]


def same_run(a, b):
    """Equal weights, and equal figures but for the times."""
    a, b = (torch.load(Path(run_dir) / "last.pt", weights_only=True) for run_dir in (a, b))
    histories = ([row | {"seconds": 0} for row in c["history"]] for c in (a, b))
    bits = all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    return a["model"].keys() == b["model"].keys() and bits and next(histories) == next(histories)


# ------------------------------------------------------------------------------------------------
# Capsule maths against plain loops in float64
# ------------------------------------------------------------------------------------------------


def squash_reference(s):
    norm = math.sqrt(sum(x * x for x in s))
    return [norm**2 / (1 + norm**2) * x / norm for x in s]


def routing_reference(votes, iterations):
    """votes[j][i][d] of one image -> (v[j][d], couplings[iteration][j][i])."""
    J, N, D = len(votes), len(votes[0]), len(votes[0][0])
    b = [[0.0] * N for _ in range(J)]
    history = []
    for _ in range(iterations):
        c = [[0.0] * N for _ in range(J)]
        for i in range(N):
            total = sum(math.exp(b[k][i]) for k in range(J))
            for j in range(J):
                c[j][i] = math.exp(b[j][i]) / total
        history.append(c)
        v = []
        for j in range(J):
            v.append(
                squash_reference(
                    [sum(c[j][i] * votes[j][i][d] for i in range(N)) for d in range(D)]
                )
            )
        for j in range(J):
            for i in range(N):
                b[j][i] += sum(votes[j][i][d] * v[j][d] for d in range(D))
    return v, history


def test_squash_equals_equation_1():
    s = torch.randn(5, 7, dtype=torch.float64) * torch.logspace(-3, 3, 5).double().unsqueeze(1)
    expected = torch.tensor([squash_reference(row) for row in s.tolist()], dtype=torch.float64)
    torch.testing.assert_close(capsules.squash(s), expected, rtol=1e-5, atol=1e-12)


def test_zero_vector_has_finite_value_and_gradient():
    for function in (capsules.squash, capsules.capsule_lengths):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            s = torch.zeros(2, 3, 8, dtype=dtype, requires_grad=True)
            out = function(s)
            out.sum().backward()
            assert out.abs().max() < 1e-5
            assert torch.isfinite(s.grad).all()


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
def test_routing_equals_procedure_1(iterations):
    votes = torch.randn(2, 4, 6, 3, dtype=torch.float64)  # [B, J, N, D]
    v, couplings = capsules.dynamic_routing(votes, iterations, return_couplings=True)
    assert len(couplings) == iterations
    for image in range(2):
        expected_v, expected_c = routing_reference(votes[image].tolist(), iterations)
        close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
        close(v[image], torch.tensor(expected_v).double())
        for c, e in zip(couplings, expected_c, strict=True):
            close(c[image], torch.tensor(e).double())


def test_couplings_of_a_primary_capsule_sum_to_one_over_digits():
    _, couplings = capsules.dynamic_routing(torch.randn(3, 10, 50, 16) * 3, 3, True)
    for c in couplings:
        torch.testing.assert_close(c.sum(dim=1), torch.ones(3, 50))
    assert couplings[-1].sum(dim=2).std() > 0.1  # ... and over capsules they do not


def test_margin_loss_equals_equation_4():
    lengths, labels = torch.rand(6, 10, dtype=torch.float64), torch.arange(6)
    total = 0.0
    for row, label in zip(lengths.tolist(), labels.tolist(), strict=True):
        for k, length in enumerate(row):
            if k == label:
                total += max(0.0, 0.9 - length) ** 2
            else:
                total += 0.5 * max(0.0, length - 0.1) ** 2
    assert capsules.margin_loss(lengths, labels).item() == pytest.approx(total / 6, rel=1e-12)


def test_gradients_of_the_real_code():
    small = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 2])
    assert torch.autograd.gradcheck(lambda v: capsules.dynamic_routing(v, 3), small)
    assert torch.autograd.gradcheck(capsules.squash, small)
    lengths = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: capsules.margin_loss(x, labels), lengths)
    layer = capsules.DigitCapsules(n=6, i=4, j=3, d=5).double()
    u = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u, _: layer(u), (u, layer.weight))


def test_votes_are_each_capsules_own_matrix_product():
    layer = capsules.DigitCapsules(n=6, i=4, j=3, d=5, iterations=1).double()
    u = torch.randn(2, 6, 4, dtype=torch.float64)
    W = layer.weight.view(6, 4, 3, 5)
    s = torch.zeros(2, 3, 5, dtype=torch.float64)
    for i in range(6):
        for j in range(3):
            s[:, j] += u[:, i] @ W[i, :, j] / 3
    torch.testing.assert_close(layer(u), capsules.squash(s))
    layer.iterations = 2  # and coupling [b, j, i] is that of primary capsule i
    couplings = layer(u, return_couplings=True)[1][1]
    votes = torch.einsum("bni,nijd->bjnd", u, W)
    agreement = torch.einsum("bjnd,bjd->bjn", votes, capsules.squash(s))
    torch.testing.assert_close(couplings, agreement.softmax(dim=1))


def test_a_primary_capsule_comes_from_one_place():
    layer = capsules.PrimaryCapsules(2, types=3, dim=4, kernel_size=1)
    x = torch.randn(1, 2, 5, 5)
    changed = x.clone()
    changed[0, :, 1, 2] += 1  # place 1 * 5 + 2 = 7: its 3 capsules must change, no others
    different = (layer(x) != layer(changed)).any(dim=2).squeeze(0)  # [N]
    assert different.nonzero().flatten().tolist() == [21, 22, 23]
    expected = capsules.squash(layer.conv(x)[0, 4:8, 1, 2])  # type 1: channels 4 to 7
    torch.testing.assert_close(layer(x)[0, 22], expected)


# ------------------------------------------------------------------------------------------------
# The two networks
# ------------------------------------------------------------------------------------------------

MODELS = pytest.mark.parametrize("network", [AlexCapsNet, ResCapsNet])


@pytest.mark.parametrize(
    ("network", "parameters", "capsules_in"),
    [(AlexCapsNet, 2_677_696, 128), (ResCapsNet, 2_022_240, 1296)],
)
def test_shapes_and_parameter_counts(network, parameters, capsules_in):
    model, x = network(), torch.randn(2, 1, network.side, network.side)
    assert sum(p.numel() for p in model.parameters()) == parameters
    u = model.primary(model.features(x))
    assert u.shape == (2, capsules_in, 8)
    assert model(x).shape == (2, 10, 16)
    v, couplings = model.eval()(x, return_couplings=True)
    torch.testing.assert_close(v, model(x))
    assert [c.shape for c in couplings] == [(2, 10, capsules_in)] * 3


@MODELS
def test_an_image_does_not_depend_on_its_batch(network):
    model, x = network().eval(), torch.randn(4, 1, network.side, network.side)
    with torch.no_grad():
        together, alone = model(x), torch.cat([model(image) for image in x.split(1)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@MODELS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite(network, dtype):
    model = network()
    for x in (0.0, 1.0, 255.0):
        images = torch.rand(2, 1, network.side, network.side) * x
        with torch.autocast("cpu", dtype):
            v = model(images)
        assert v.dtype == torch.float32  # routing and lengths left half precision
        capsules.margin_loss(capsules.capsule_lengths(v), torch.tensor([1, 2])).backward()
        assert torch.isfinite(v).all()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@MODELS
def test_bfloat16_gradients_point_where_float32_ones_do(network):
    """After a few steps and with BatchNorm's running statistics. At the very start ResCapsNet's
    first layers have gradients that are small differences of large sums over a black background:
    rounding turns some of them by up to 24 degrees (cosine 0.91)."""
    images, labels = data.load("digits", "", "train")
    model = network()
    optimizer = torch.optim.Adam(model.parameters())

    def backward(batch, half=False):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            lengths = capsules.capsule_lengths(model(data.prepare(images[batch], model)))
        capsules.margin_loss(lengths, labels[batch]).backward()

    for step in range(1, 13):
        backward(slice(32 * step, 32 * step + 32))
        optimizer.step()
    model.eval()
    gradients = []
    for half in (True, False):
        backward(slice(0, 32), half)
        layers = [list(m.parameters(recurse=False)) for m in model.modules()]
        gradients.append([torch.cat([p.grad.flatten() for p in ps]) for ps in layers if ps])
    for half, full in zip(*gradients, strict=True):
        assert F.cosine_similarity(half.double(), full.double(), dim=0) > 0.99


# ------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------


class Plain:
    """The least that prepare needs to know of a model."""

    side, mean, std = 28, 0.0, 1.0


def test_rotation_is_torchvisions_and_each_image_has_its_own_angle():
    images, _ = data.load("digits", "", "train")
    degrees = torch.tensor([-90.0, -33.0, 0.0, 7.5, 60.0])
    ours = data.prepare(images[:5], Plain, degrees)
    for i in range(5):
        x = images[i].view(1, 1, 28, 28).float() / 255
        theirs = rotate(x, degrees[i].item(), InterpolationMode.BILINEAR)
        assert (ours[i] - theirs[0]).abs().max() < 0.02
    assert (ours[1] - data.prepare(images[1:2], Plain, -degrees[1:2])[0]).abs().max() > 0.3


@pytest.mark.parametrize("side", [28, 78])
def test_a_shift_moves_right_and_down_before_the_rotation(side):
    class Wide(Plain):
        pass

    Wide.side = side
    images = torch.zeros(3, 28, 28, dtype=torch.uint8)
    images[:, 6:-6, 6:-6] = torch.randint(256, (3, 16, 16))  # far from the edges
    shifts = torch.tensor([[2.0, -3.0], [0.0, 0.0], [-1.0, 4.0]])
    moved = [image.roll((int(y), int(x)), (0, 1)) for image, (x, y) in zip(images, shifts)]
    moved = torch.stack(moved)  # rows down, columns to the right
    ours = data.prepare(images, Wide, shifts=shifts)
    torch.testing.assert_close(ours, data.prepare(moved, Wide), rtol=0, atol=1e-4)
    degrees = torch.tensor([30.0, -20.0, 75.0])
    turned = data.prepare(images, Wide, degrees, shifts)
    torch.testing.assert_close(turned, data.prepare(moved, Wide, degrees), rtol=0, atol=1e-4)


def test_resize_is_bilinear_and_corners_stay_black():
    images, _ = data.load("digits", "", "train")
    ours = data.prepare(images[:3], ResCapsNet)
    x = F.interpolate(images[:3].unsqueeze(1).float() / 255, (78, 78), mode="bilinear")
    x = (x - ResCapsNet.mean) / ResCapsNet.std
    inner = (slice(None), slice(None), slice(2, -2), slice(2, -2))  # edges blend with black
    torch.testing.assert_close(ours[inner], x[inner], rtol=1e-4, atol=1e-4)
    white = torch.full((1, 28, 28), 255, dtype=torch.uint8)
    turned = data.prepare(white, AlexCapsNet, torch.tensor([45.0]))
    assert turned[0, 0, 0, 0] == pytest.approx(-AlexCapsNet.mean / AlexCapsNet.std)


def test_parts_are_disjoint_stable_and_stratified():
    parts = {name: data.load("digits", "", name) for name in ("train", "validation", "test")}
    assert {name: len(y) for name, (_, y) in parts.items()} == {
        "train": 1237,
        "validation": 200,
        "test": 360,
    }
    seen = [image.numpy().tobytes() for x, _ in parts.values() for image in x]
    assert len(set(seen)) == 1797  # every digit is in exactly one part
    assert parts["test"][1].bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    torch.manual_seed(99)  # a run's seed changes nothing
    assert torch.equal(data.load("digits", "", "validation")[0], parts["validation"][0])


def test_samplers_agree_and_angles_depend_on_seed_and_epoch_alone():
    images, labels = data.load("digits", "", "train")
    dataset = data.DigitBatches(images, labels, AlexCapsNet, "cpu", rotate=10, shift=2)
    for seed, epoch in ((0, 1), (3, 2)):
        generator = torch.Generator().manual_seed(data.epoch_seed(seed, epoch))
        alone = list(RandomSampler(dataset, generator=generator))
        shares = []
        for rank in range(2):
            sampler = DistributedSampler(dataset, 2, rank, seed=data.epoch_seed(seed, 0))
            sampler.set_epoch(epoch)
            shares.append(list(sampler))
        zipped = [i for pair in zip(*shares, strict=True) for i in pair]
        assert zipped[: len(alone)] == alone
    dataset.set_epoch(0, 1)
    first = torch.cat([dataset.degrees.unsqueeze(1), dataset.shifts], dim=1)  # [n, 3]
    for drawn, limit in zip(first.T, (10, 2, 2), strict=True):
        assert drawn.abs().max() <= limit and drawn.min() < -0.9 * limit < 0.9 * limit < drawn.max()
    assert first.T.corrcoef().triu(1).abs().max() < 0.1  # each is drawn for itself
    dataset.set_epoch(0, 2)
    assert not torch.equal(dataset.degrees, first[:, 0])
    dataset.set_epoch(0, 1)
    assert torch.equal(dataset.degrees, first[:, 0]) and torch.equal(dataset.shifts, first[:, 1:])
    whole = dataset.__getitems__(list(range(10)))[0]
    torch.testing.assert_close(dataset.__getitems__([7])[0], whole[7:8])


FAKE_SIZES = {"train": 5200, "t10k": 100}


@pytest.fixture
def fake_mnist(tmp_path, monkeypatch):
    """A data folder with random images in MNIST's four files, whose checksums count as MNIST's."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    checksums = {}
    for name in data.MNIST_MD5:
        n, is_images = FAKE_SIZES[name.split("-")[0]], "images" in name
        header, item, most = (16, 784, 256) if is_images else (8, 1, 10)
        numbers = torch.randint(most, (n * item,), dtype=torch.uint8).numpy().tobytes()
        (raw / name).write_bytes(bytes(header) + numbers)
        checksums[name] = hashlib.md5((raw / name).read_bytes()).hexdigest()
    monkeypatch.setattr(data, "MNIST_MD5", checksums)
    return tmp_path / "data"


def test_mnist_is_read_and_split(fake_mnist):
    assert data.resolve_dataset("auto", fake_mnist) == ("mnist", "")
    parts = {part: data.load("mnist", fake_mnist, part) for part in ("train", "validation", "test")}
    assert [len(labels) for _, labels in parts.values()] == [200, 5000, 100]
    raw = fake_mnist / "MNIST" / "raw"
    images, labels = parts["test"]
    assert images.numpy().tobytes() == (raw / "t10k-images-idx3-ubyte").read_bytes()[16:]
    assert bytes(labels.tolist()) == (raw / "t10k-labels-idx1-ubyte").read_bytes()[8:]
    for path in list(raw.iterdir()):  # packed files will do
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
        path.unlink()
    assert data.resolve_dataset("mnist", fake_mnist) == ("mnist", "")
    assert torch.equal(data.load("mnist", fake_mnist, "test")[0], images)


def zero_middle(path):
    content = bytearray(path.read_bytes())
    content[100:200] = bytes(100)
    path.write_bytes(content)


def pack_half(path):
    packed = gzip.compress(path.read_bytes(), 1)
    path.with_name(f"{path.name}.gz").write_bytes(packed[:1000])
    path.unlink()


@pytest.mark.parametrize("choice", ["auto", "mnist"])
@pytest.mark.parametrize("spoil", [zero_middle, pack_half, lambda path: os.truncate(path, 9)])
def test_another_file_of_that_name_is_not_mnist(fake_mnist, tmp_path, single, choice, spoil):
    spoil(fake_mnist / "MNIST" / "raw" / "train-images-idx3-ubyte")
    code, _, error = single("--model", "alexcaps", "--dataset", choice, "--data-dir", fake_mnist,
                            "--run-dir", tmp_path / "run")  # fmt: skip
    assert_one_line(code, error, "train-images-idx3-ubyte", "is not MNIST's", "--data-dir")
    assert not (tmp_path / "run").exists()


def test_a_file_that_goes_bad_later_is_not_read(fake_mnist):
    assert data.resolve_dataset("mnist", fake_mnist)[0] == "mnist"
    zero_middle(fake_mnist / "MNIST" / "raw" / "train-labels-idx1-ubyte")
    with pytest.raises(data.UserError, match="not MNIST's"):
        data.load("mnist", fake_mnist, "train")


def test_what_is_missing_and_what_is_there_are_named(fake_mnist, monkeypatch):
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    raw = fake_mnist / "MNIST" / "raw"
    name = "train-images-idx3-ubyte"
    (raw / name).rename(raw / "train-images.idx3-ubyte")
    (raw / "t10k-labels-idx1-ubyte").rename(fake_mnist / "t10k-labels-idx1-ubyte")
    with pytest.raises(data.UserError) as error:
        data.resolve_dataset("mnist", fake_mnist)
    text = str(error.value)
    missing, found = text.split(" (but it has ")
    assert name in missing and "t10k-labels-idx1-ubyte" in missing and "t10k-images" not in missing
    assert "MNIST/raw/train-images.idx3-ubyte" in found and " t10k-labels-idx1-ubyte" in found
    assert "download failed" in text and "--dataset digits" in text and "\n" not in text
    assert data.resolve_dataset("auto", fake_mnist) == ("digits", text.split("; put")[0])


def test_download_from_a_mirror(fake_mnist, tmp_path, monkeypatch):
    """The download itself, from a small server that stands in for the mirrors."""
    import torchvision

    source, resources = fake_mnist / "MNIST" / "raw", []
    for name in data.MNIST_MD5:
        content = bytearray((source / name).read_bytes())
        shape = (28, 28) if "images" in name else ()  # torchvision reads the header of what it gets
        n = FAKE_SIZES[name.split("-")[0]]
        start = struct.pack(f">{2 + len(shape)}i", 2051 if shape else 2049, n, *shape)
        content[: len(start)] = start
        packed = gzip.compress(content, 1)
        (source / f"{name}.gz").write_bytes(packed)
        data.MNIST_MD5[name] = hashlib.md5(content).hexdigest()
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=source)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        mnist = torchvision.datasets.MNIST
        monkeypatch.setattr(mnist, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(mnist, "resources", resources)
        assert data.resolve_dataset("mnist", tmp_path / "new") == ("mnist", "")
        server.shutdown()
    assert len(data.load("mnist", tmp_path / "new", "test")[1]) == 100
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["MNIST"]  # no leftovers


def test_a_silent_network_is_given_up(tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setattr(data, "SILENCE_SECONDS", 0.3)
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, never answers
        mirror = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [mirror])
        name, reason = data.resolve_dataset("auto", tmp_path)
    assert name == "digits" and "timed out" in reason
    assert list(tmp_path.iterdir()) == [] and socket.getdefaulttimeout() is None


def test_images_must_be_bytes():
    with pytest.raises(TypeError, match="uint8"):
        data.prepare(torch.rand(2, 28, 28), Plain)


# ------------------------------------------------------------------------------------------------
# train_single.py
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["alexcaps", "rescaps"])
def test_dry_run(model, tmp_path, single, monkeypatch):
    """One step of everything, into a folder of its own, which the next dry run replaces."""
    held = tmp_path / "runs" / f"{model}-single-digits" / "last.pt"  # a run of that name stays
    held.parent.mkdir(parents=True)
    held.write_text("a run")
    command = ("--model", model, *DIGITS, "--dry-run")
    process = run_python(HERE / "train_single.py", *command, cwd=tmp_path)
    assert process.returncode == 0 and process.stderr == "", process.stderr
    monkeypatch.chdir(tmp_path)
    code, printed, error = single(*command)
    assert code == 0 and "test it: python evaluate.py runs/dry-run" in printed, error
    checkpoint = torch.load(tmp_path / "runs" / "dry-run" / "last.pt")
    assert checkpoint["config"]["train_images"] == 32 and len(checkpoint["history"]) == 1
    assert checkpoint["optimizer"]["state"][0]["step"] == 1
    assert held.read_text() == "a run"


def test_offline_first_run(tmp_path):
    """No network, no data: digits, said at the start and at the end, and in the folder's name."""
    process = run_python(
        *(HERE / "train_single.py", "--model", "alexcaps", "--data-dir", tmp_path / "data"),
        *("--train-size", 64, "--epochs", 1, "--seed", 3),
        cwd=tmp_path,
        env={**os.environ, **OFFLINE},
    )
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[0] == "loading PyTorch ..." and "MNIST could not be had" in lines[1]
    assert "1,797 small digits, not MNIST" in lines[3] and "not MNIST" in lines[-1]
    epoch = next(line for line in lines if line.startswith("epoch"))
    figures = r"loss 0\.\d{4} acc [\d.]{5}"
    form = rf"epoch  1/1 \| train {figures} \| val {figures} \| \d+ s \*"
    assert re.fullmatch(form, epoch) and len(epoch) <= 80
    run = tmp_path / "runs" / "alexcaps-single-digits-seed3"
    config = json.loads((run / "config.json").read_text())
    assert config["dataset"] == "digits" and config["train_images"] == 64
    rows = (run / "metrics.csv").read_text().splitlines()
    assert rows[0] == ",".join(train_single.ROW) and len(rows) == 2
    assert max(len(number.split(".")[-1]) for number in rows[1].split(",")) <= 6
    assert {p.name for p in run.iterdir()} == {*train_single.RUN_FILES, ".lock"} - {"report.json"}


@pytest.mark.parametrize("script", [train_single, train_ddp])
def test_help_fits_a_terminal(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, printed, _ = call(script, capsys, monkeypatch, "--help")
    assert code == 0 and "--resume RUN" in printed
    assert "None" not in printed and "default" not in printed
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "vgg"], ["vgg"]),
        ([], ["--model"]),
        (["--model", "alexcaps", "--dataset", "cifar"], ["cifar"]),
        *[
            (["--model", "alexcaps", flag, value], [flag, value])
            for flag, values in {
                "--epochs": ["0", "-1", "1.5", "nan"],
                "--batch-size": ["0", "-4"],
                "--routing-iterations": ["0", "inf"],
                "--lr": ["0", "-0.1", "nan", "inf", "x"],
                "--rotate": ["-1", "nan", "181"],
                "--shift": ["-1", "nan"],
                "--seed": ["-1"],
                "--train-size": ["0"],
            }.items()
            for value in values
        ],
        *[
            (["--model", "alexcaps", *DIGITS, "--device", name], ["--device", name])
            for name in ("cuda:77", "toaster", "meta", "mps", "xpu")
        ],
        (["--model", "alexcaps", "--run-dir", ""], ["--run-dir", "empty"]),
        (["--model", "alexcaps", "--data-dir="], ["--data-dir", "empty"]),
        (["--model", "alexcaps", "--compil"], ["--compil"]),
    ],
)
def test_wrong_use_is_one_line_and_writes_nothing(flags, words, tmp_path, single, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = single(*flags)
    assert_one_line(code, error, *words)
    assert list(tmp_path.iterdir()) == []


def test_mnist_without_network_never_falls_back(tmp_path, single, monkeypatch):
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    code, _, error = single("--model", "alexcaps", "--dataset", "mnist", "--data-dir",
                            tmp_path / "data", "--run-dir", tmp_path / "run")  # fmt: skip
    assert_one_line(code, error, "MNIST", "download failed", "--dataset digits")
    assert not (tmp_path / "run").exists()


def test_tilde_is_the_home_folder(tmp_path, single, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    flags = ("--model", "alexcaps", *SMALL, "--epochs", 1, "--data-dir=~/data", "--run-dir=~/run")
    assert single(*flags)[0] == 0
    assert (tmp_path / "home" / "run" / "last.pt").exists() and not (tmp_path / "~").exists()
    assert (
        torch.load(tmp_path / "home/run/last.pt")["config"]["data_dir"] == f"{tmp_path}/home/data"
    )
    assert single("--resume=~/run")[0] == 0


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    process = run_python(*(HERE / "train_single.py", "--model", "alexcaps", *DIGITS, "--run-dir"),
                         tmp_path / "file" / "run")  # fmt: skip
    assert_one_line(process.returncode, process.stderr, str(tmp_path / "file"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two epochs of AlexCapsNet on 96 digits, without a break: the run that others must equal."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    process = run_python(HERE / "train_single.py", "--model", "alexcaps", *SMALL, "--epochs", 2,
                         "--run-dir", run_dir)  # fmt: skip
    assert process.returncode == 0, process.stderr
    return run_dir


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run that a test may spoil."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_run_is_never_overwritten_unasked(copy, single):
    before = contents(copy)
    flags = ("--model", "alexcaps", *SMALL, "--epochs", 1, "--run-dir", copy)
    for keep in ("best.pt", "metrics.csv", "config.json"):  # archived runs are runs, too
        code, _, error = single(*flags)
        assert_one_line(code, error, "holds a run", "--overwrite", "--resume")
        assert contents(copy) == before
        before.pop("last.pt", None)
        (copy / "last.pt").unlink(missing_ok=True)
        assert (copy / keep).exists()
    assert single(*flags, "--overwrite")[0] == 0
    assert len(torch.load(copy / "last.pt")["history"]) == 1


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))
import train_single
train_single.run_main(train_single.main)
"""


def test_a_disk_that_refuses_loses_nothing(copy):
    """Neither a run that goes on nor one that is to be replaced."""
    before = contents(copy)
    new = ("--model", "alexcaps", *SMALL, "--run-dir", copy, "--overwrite")
    for flags in (("--resume", copy, "--epochs", 3), new):
        process = run_python("-c", LIMITED, *flags)
        assert_one_line(process.returncode, process.stderr, "cannot write", "last.pt")
        assert contents(copy) == before


def test_two_runs_in_one_folder(copy, single):
    """The second is refused as long as the first one lives, and not a moment longer."""
    before = contents(copy)
    first = run_python("-c", HOLD_LOCK, copy, start=True)
    assert first.stdout.readline() == "locked\n"
    new = ("--model", "alexcaps", *SMALL, "--run-dir", copy, "--overwrite")
    for flags in (("--resume", copy), new):
        code, _, error = single(*flags)
        assert_one_line(code, error, "another training is writing", "torchrun train_ddp.py")
    assert contents(copy) == before
    first.kill()
    first.communicate()
    assert single("--resume", copy)[0] == 0


HOLD_LOCK = """
import pathlib, sys, time
import train_single
train_single.Run.claim(run := type("", (), {})(), pathlib.Path(sys.argv[1]), True)
print("locked", flush=True)
time.sleep(100)
"""


def test_links_in_a_folder_lead_nowhere(tmp_path, single):
    """A stranger's folder may hold links; what they point to is not ours to write."""
    outside, run = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    run.mkdir()
    for name in (*train_single.RUN_FILES, "metrics.csv.tmp"):
        (outside / name).write_text("precious")
        (run / name).symlink_to(outside / name)
    flags = ("--model", "alexcaps", *SMALL, "--epochs", 1, "--run-dir", run, "--overwrite")
    assert single(*flags)[0] == 0
    assert {path.read_text() for path in outside.iterdir()} == {"precious"}
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(outside / "lock")
    assert_one_line(*single(*flags)[::2], ".lock")
    assert not (outside / "lock").exists()


def damage_middle(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(run, change):
    checkpoint = torch.load(run / "last.pt")
    change(checkpoint)
    torch.save(checkpoint, run / "last.pt")


def moments(checkpoint):
    return checkpoint["optimizer"]["state"][3]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


NOT_OURS = "is no checkpoint of this network"


@pytest.mark.parametrize(
    ("spoil", "flags", "words"),
    [
        (lambda run: None, ["--lr", "0.01"], ["--lr does not go with --resume"]),
        (lambda run: None, ["--train-size=96"], ["--train-size does not go"]),
        (lambda run: None, ["--overwrite"], ["--overwrite does not go"]),
        (lambda run: None, ["--epochs", "1"], ["--epochs is less than the 2"]),
        (lambda run: (run / "last.pt").unlink(), [], ["No such file", "last.pt"]),
        (lambda run: os.truncate(run / "last.pt", 10_000), [], ["last.pt is damaged"]),
        (lambda run: damage_middle(run / "last.pt"), [], ["last.pt is damaged"]),
        (lambda run: (run / "last.pt").write_text("?"), [], ["last.pt is damaged"]),
        (lambda run: torch.save({"a": 1}, run / "last.pt"), [], ["last.pt is damaged, or no"]),
        (lambda run: torch.save([1], run / "last.pt"), [], ["last.pt is damaged, or no"]),
        (lambda run: torch.save(Evil(), run / "last.pt"), [], ["last.pt is damaged"]),
        (lambda run: (run / "last.pt").write_bytes(pickle.dumps(Evil())), [], ["damaged"]),
        *[
            (lambda run, change=change: edit(run, change), [], [words])
            for change, words in [
                (lambda c: c.update(model=ResCapsNet().state_dict()), NOT_OURS),
                (lambda c: c.pop("scheduler"), NOT_OURS),
                (lambda c: c.update(optimizer=None), NOT_OURS),
                (lambda c: moments(c).update(exp_avg=torch.zeros(1)), NOT_OURS),
                (lambda c: moments(c).update(exp_avg_sq=torch.zeros(64).half()), NOT_OURS),
                (lambda c: moments(c).pop("step"), NOT_OURS),
                (lambda c: c["optimizer"]["param_groups"][0].update(lr="x"), NOT_OURS),
                (lambda c: c["history"][0].update(val_accuracy="x"), NOT_OURS),
                (lambda c: c["history"].append(7), NOT_OURS),
                (lambda c: c["config"].update(batch_size=[1]), "--batch-size"),
                (lambda c: c["config"].update(model="vgg"), "--model"),
                (lambda c: c["config"].update(script="ddp"), "train_ddp.py"),
                (lambda c: c["config"].update(world_size=2), "2 process(es)"),
                (lambda c: c.update(config=None), "damaged"),
            ]
        ],
    ],
)
def test_resume_refuses(spoil, flags, words, copy, single, monkeypatch):
    monkeypatch.chdir(copy)
    spoil(copy)
    before = contents(copy)
    code, _, error = single("--resume", copy, *flags)
    assert_one_line(code, error, *words)
    assert contents(copy) == before  # nothing lost, nothing made


def test_a_moved_run_goes_on(copy, single, finished):
    """last.pt alone is needed; what else may change is in --help."""
    for name in ("metrics.csv", "config.json", "best.pt"):
        (copy / name).unlink()
    assert single("--resume", copy)[0] == 0  # a finished run: its files are written again
    assert (copy / "metrics.csv").read_text() == (finished / "metrics.csv").read_text()
    code, printed, _ = single("--resume", copy, "--epochs", 3, "--data-dir", "elsewhere")
    assert code == 0 and "epochs done: 2" in printed
    assert len((copy / "metrics.csv").read_text().splitlines()) == 4
    config = json.loads((copy / "config.json").read_text())
    assert (config["epochs"], config["data_dir"], config["lr"]) == (3, "elsewhere", 1e-3)


# Each wrapper spoils the product from outside: the scripts have no hooks for tests.
KILL_IN_EPOCH_2 = """
import os, signal, sys
import train_single
real, calls = train_single.margin_loss, []
def margin_loss(*arguments):
    calls.append(1)
    if len(calls) == 11:  # 6 training steps and 1 validation batch, then the 4th step of epoch 2
        os.kill(os.getpid(), signal.{signal})
    return real(*arguments)
train_single.margin_loss = margin_loss
train_single.run_main(train_single.main)
"""
KILL_IN_WRITE = """
import os, signal
import train_single
real, calls = os.replace, []
def replace(source, target):
    if target.name == "{name}":
        calls.append(1)
        if len(calls) == {call}:
            os.truncate(source, 1000)
            os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
os.replace = replace
train_single.run_main(train_single.main)
"""


@pytest.mark.parametrize(
    ("wrapper", "code", "epochs"),
    [
        (KILL_IN_EPOCH_2.format(signal="SIGKILL"), -signal.SIGKILL, 1),
        (KILL_IN_EPOCH_2.format(signal="SIGINT"), 130, 1),
        (KILL_IN_WRITE.format(name="last.pt", call=3), -signal.SIGKILL, 1),  # of epochs 0, 1, 2
        (KILL_IN_WRITE.format(name="config.json", call=1), -signal.SIGKILL, 0),
        (KILL_IN_WRITE.format(name="metrics.csv", call=3), -signal.SIGKILL, 2),
    ],
    ids=["kill", "ctrl-c", "kill-in-write", "kill-before-config", "kill-after-last"],
)
def test_any_stop_resumes_bit_for_bit(wrapper, code, epochs, finished, tmp_path, single):
    run_dir = tmp_path / "a run"
    process = run_python("-c", wrapper, "--model", "alexcaps", *SMALL, "--epochs", 2,
                         "--run-dir", run_dir)  # fmt: skip
    assert process.returncode == code, process.stderr
    if code > 0:
        command = f"stopped; to go on: python train_single.py --resume '{run_dir}'"
        assert process.stderr.strip() == command
    assert len(torch.load(run_dir / "last.pt")["history"]) == epochs
    assert single("--resume", run_dir)[0] == 0
    assert same_run(run_dir, finished)
    assert len((run_dir / "metrics.csv").read_text().splitlines()) == 3
    assert not list(run_dir.glob(".*.tmp"))


@pytest.mark.parametrize(("call_number", "part"), [(9, "training"), (14, "validation")])
def test_a_loss_that_is_not_finite_stops_the_run(call_number, part, tmp_path, single, monkeypatch):
    """6 training steps and 1 batch of validation an epoch: both calls are in epoch 2."""
    real, calls = train_single.margin_loss, []

    def margin_loss(*arguments):
        calls.append(1)
        return real(*arguments) * (math.nan if len(calls) == call_number else 1)

    monkeypatch.setattr(train_single, "margin_loss", margin_loss)
    code, _, error = single("--model", "alexcaps", *SMALL, "--epochs", 2, "--run-dir", tmp_path)
    assert_one_line(code, error, "the loss is nan", "--lr", "--precision bf16")
    assert len(torch.load(tmp_path / "last.pt")["history"]) == 1
    if part == "training":
        assert len(calls) <= 13  # before the validation


def test_the_sums_are_looked_at_by_time_and_not_in_every_step(monkeypatch):
    """A clock on which a step takes 1/128 s: looks every half second, and after the last step."""
    now, looks = [0.0], []
    monkeypatch.setattr(train_single.time, "perf_counter", lambda: now[0])
    sums = torch.zeros(3, dtype=torch.float64)

    def look(numbers):
        looks.append(int(numbers[2]))
        return numbers.tolist()

    for _ in train_single.watch(range(150), sums, "", look):
        sums += torch.tensor([0.5, 1, 1])
        now[0] += 1 / 128
    assert looks == [1, 2, 66, 130, 150]


def test_best_is_the_earliest_of_equal_epochs():
    config = {"model": "alexcaps", "routing_iterations": 1, "seed": 0, "lr": 1e-3}
    run = train_single.Run(config | {"compile": False, "precision": "fp32"}, torch.device("cpu"))
    for hits in (90, 95, 95, 94):
        run.optimizer.step()
        run.finish_epoch(torch.tensor([50.0, 1, 2]), torch.tensor([5.0, hits, 100]), 1.234)
    assert run.best["epoch"] == 2 and run.best is run.history[1]
    assert [row["lr"] for row in run.history] == [1e-3, 1e-3, 7e-4, 7e-4]
    assert list(run.history[0].values()) == [1, 25.0, 50.0, 0.05, 90.0, 1e-3, 1.23]


def test_compiled_and_plain_checkpoints_are_the_same(copy, single, finished, monkeypatch):
    """By the compiler that traces all but generates no code, which would take half a minute."""
    traced = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    code, _, error = single("--resume", copy, "--epochs", 3, "--compile")
    assert code == 0, error
    assert weights(copy).keys() == weights(finished).keys()  # no "_orig_mod."


def test_torchrun_is_for_the_other_script(tmp_path):
    process = torchrun(HERE / "train_single.py", "--model", "alexcaps", *SMALL, "--run-dir",
                       tmp_path / "run")  # fmt: skip
    assert process.returncode == 1  # torchrun's own
    assert process.stderr.count("error: ") == 1 and "start train_ddp.py" in process.stderr
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------
# A pretended accelerator: what a GPU would not forgive, found without one
# ------------------------------------------------------------------------------------------------

ATEN, CPU = torch.ops.aten, torch.device("cpu")


class Pretended(torch.Tensor):
    """A tensor on the device "pretended:0": it holds a CPU tensor, which does the computing.

    As on a GPU, nothing mixes it with a tensor on the CPU, except a number without dimensions.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # else .cpu() gives this class
    downloads = uploads = 0  # how often the CPU waited: for results, or to hand over data

    @staticmethod
    def __new__(cls, held):
        layout = held.shape, held.stride(), held.storage_offset()
        place = {"dtype": held.dtype, "device": torch.device("pretended", 0)}
        tensor = torch.Tensor._make_wrapper_subclass(cls, *layout, **place)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        """PyTorch brings each operation on such a tensor here: do it on what is held."""
        kwargs = dict(kwargs or {})
        if (parts := op.decompose(*args, **kwargs)) is not NotImplemented:
            return parts  # a compound operation, which only inference_mode brings
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        target = kwargs.pop("device", None)
        if op is ATEN.copy_.default:  # (to, from, non_blocking=False), the one that may mix
            target = args[0].device
            cls.uploads += args[1].device == CPU and not any(args[2:])
        elif any(x.device == CPU and x.dim() > 0 for x in tensors):
            raise RuntimeError(f"{op} mixes devices: {[(x.device, x.shape) for x in tensors]}")
        # The CPU waits for a copy, for .item(), and to know how many numbers a mask selects.
        waits = target == CPU or torch.Tag.data_dependent_output in op.tags
        if torch.Tag.dynamic_output_shape in op.tags:
            waits = op is not ATEN.index.Tensor or tensors[1].dtype is torch.bool
        cls.downloads += waits
        args, kwargs = tree_map_only(cls, lambda x: x.held, (args, kwargs))
        result = op(*args, **kwargs)
        if target == CPU:
            return result
        known = {id(x.held): x for x in tensors if isinstance(x, cls)}  # += returns the same one
        return tree_map_only(torch.Tensor, lambda x: known.get(id(x), cls(x)), result)


def pretended_worker():
    """Train, validate and predict on the CPU and on the pretended device, and compare."""
    backend_registration._setup_privateuseone_for_python_backend("pretended")
    torch.pretended.get_amp_supported_dtype = list  # autocast asks, even to be switched off
    tolist, dispatch = torch.Tensor.tolist, Pretended.__torch_dispatch__
    torch.Tensor.tolist = lambda x: tolist(x.cpu())  # it does so itself, but refuses our class
    # What does not come to __torch_dispatch__: new tensors, and what torch.tensor puts into them
    library, key = torch.library.Library("aten", "IMPL"), "PrivateUse1"
    for name, op in (("empty.memory_format", ATEN.empty), ("empty_strided", ATEN.empty_strided)):
        make = functools.partial(lambda op, *a, device, **k: Pretended(op(*a, **k)), op)
        library.impl(name, make, key)
    copy = ATEN.copy_.default
    library.impl("_copy_from", lambda x, to, *a: dispatch(copy, (), (to, x, *a)), key)

    train_single.VALIDATION_BATCH = 50  # of 200 images: 4 steps, as in training
    flags = ["--model", "alexcaps", *DIGITS, "--train-size", "64", "--batch-size", "16"]
    config = vars(train_single.build_parser("").parse_args([*flags, "--dry-run"]))
    images, results = data.load("digits", "", "validation")[0][:32], []
    for device in (CPU, torch.device("pretended", 0)):
        run = train_single.Run(config | train_single.FIXED, device)
        train_set, validation_set = train_single.make_datasets(config, device)
        clock = itertools.count()  # read at both starts and in each look, each time 1/8 s later
        train_single.time.perf_counter = lambda clock=clock: next(clock) / 8
        Pretended.downloads = Pretended.uploads = 0
        trained = train_single.train_one_epoch(run, train_set)
        validated = train_single.validate(run.model, validation_set)
        looks = next(clock) - 2
        if device != CPU:
            waits = Pretended.downloads, Pretended.uploads, looks
            assert Pretended.downloads == looks < 8, waits  # once per look, not in every step
            assert Pretended.uploads == looks + 2, waits  # its two numbers; the angles, the shifts
        scores = evaluate.predict(run.model, images, 16, angle=10)
        results.append([trained.cpu(), validated.cpu(), scores])
    # That close, hits and images are equal: they are whole numbers.
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_a_pretended_accelerator_computes_the_same():
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"PyTorch {torch.__version__} cannot have a device made in Python")
    # In a process of its own: a device, once registered, stays.
    process = run_python("-c", "import test_models; test_models.pretended_worker()")
    assert process.returncode == 0, process.stderr


# ------------------------------------------------------------------------------------------------
# train_ddp.py
# ------------------------------------------------------------------------------------------------


def torchrun(*arguments, processes=2, no_python=False, launcher=(), **more):
    """A real torchrun job on this machine, on a free port; no_python: `-c CODE` as the script."""
    options = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = ["--no-python", sys.executable] if no_python else []
    return run_python(*options, *launcher, *script, *arguments, **more)


WORKER = """
import sys
import torch.distributed as dist
import train_ddp, test_models
train_ddp.join()
getattr(test_models, sys.argv[1])(*sys.argv[2:])
dist.destroy_process_group()
"""


def digits_run(network, accumulation=1, batch_size=32, images=320):
    """A run, its datasets: SGD training with frozen BatchNorm on the first digits, rotation on.

    SGD, because Adam divides gradients by their size: it would turn the rounding of gradients that
    are zero into whole steps. Frozen, because each rank's BatchNorm sees only its own half.
    """
    flags = ["--model", network, *DIGITS, "--train-size", str(images)]
    config = vars(train_single.build_parser("").parse_args(flags)) | train_single.FIXED
    config |= {"accumulation_steps": accumulation, "batch_size": batch_size, "sync_bn": False}
    run = train_single.Run(config, torch.device("cpu"))
    lr = 1.0 if images < 100 else 0.01  # a step of 1.0: the parameters move by their gradient
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=lr)
    for module in run.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval().train = lambda mode=True, module=module: module
    return run, *train_single.make_datasets(config, torch.device("cpu"))


def one_process(network, images, batch_size=64):
    """The reference: train_single's epoch -> (parameters after it, its sums, validation's)."""
    run, train_set, validation_set = digits_run(network, batch_size=batch_size, images=images)
    trained = train_single.train_one_epoch(run, train_set)
    validated = train_single.validate(run.model, validation_set)
    return [p.detach().clone() for p in run.model.parameters()], trained, validated


# (network, accumulation steps, batch size per rank, images): all equal one process at batch 64.
# The last: 3 micro-batches of 16 per rank in groups of 2, the last group one micro-batch of 5.
CASES = [
    ("alexcaps", 1, 32, 64),
    ("alexcaps", 2, 16, 320),
    ("rescaps", 1, 32, 64),
    ("rescaps", 2, 16, 64),
    ("alexcaps", 2, 16, 74),
]


def train_cases(out):
    """A worker: rank 0 saves what each case ends with."""
    results = []
    for network, accumulation, batch_size, images in CASES:
        run, train_set, validation_set = digits_run(network, accumulation, batch_size, images)
        trained = train_ddp.train_one_epoch(run, train_ddp.wrap(run), train_set)
        validated = train_ddp.validate(run.model, validation_set)
        results.append(([p.detach() for p in run.model.parameters()], trained, validated))
    if train_ddp.RANK == 0:
        torch.save(results, out)


def validation_counts(out):
    """A worker: rank 0 saves the sums of validation of an untrained AlexCapsNet."""
    run, _, validation_set = digits_run("alexcaps")
    sums = train_ddp.validate(run.model, validation_set)
    if train_ddp.RANK == 0:
        torch.save(sums, out)


def test_two_ranks_equal_one_process(tmp_path):
    process = torchrun("-c", WORKER, "train_cases", tmp_path / "out.pt", no_python=True)
    assert process.returncode == 0, process.stderr
    for case, (parameters, *sums) in zip(CASES, torch.load(tmp_path / "out.pt"), strict=True):
        network, _, _, images = case
        expected, *expected_sums = one_process(network, images)
        start = [p.detach() for p in digits_run(network)[0].model.parameters()]
        for p, q, s in zip(parameters, expected, start, strict=True):
            largest = (q - s).abs().max().item()
            assert largest > 1e-5, case
            if images < 100:  # one step (two in the last case): gradients
                torch.testing.assert_close(p - s, q - s, rtol=1e-4, atol=1e-4 * largest)
            else:  # five steps: parameters
                torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
        for ours, theirs in zip(sums, expected_sums, strict=True):  # of training, of validation
            assert ours[1:].tolist() == theirs[1:].tolist(), case
            assert ours[0].item() == pytest.approx(theirs[0].item(), abs=2e-4)


def test_three_ranks_count_every_validation_image_once(tmp_path):
    process = torchrun("-c", WORKER, "validation_counts", tmp_path / "out.pt", processes=3,
                       no_python=True)  # fmt: skip
    assert process.returncode == 0, process.stderr
    run, _, validation_set = digits_run("alexcaps")
    expected = train_single.validate(run.model, validation_set)
    sums = torch.load(tmp_path / "out.pt")
    assert sums[1:].tolist() == expected[1:].tolist() and sums[2] == 200  # 200 / 3 is no integer
    assert sums[0].item() / 200 == pytest.approx(expected[0].item() / 200, abs=1e-6)


TWO_RANKS = ("--model", "alexcaps", *SMALL, "--precision", "fp32", "--epochs", "2")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Two epochs on two ranks (96 digits, 16 per rank: 3 steps an epoch)."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    process = torchrun(HERE / "train_ddp.py", *TWO_RANKS, "--run-dir", run_dir)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("epoch  2/2") == 1  # rank 0 alone prints
    return run_dir


KILL_RANK_1 = """
import os, signal
import train_ddp
real, calls = train_ddp.margin_loss, []
def margin_loss(*arguments):
    calls.append(1)
    again = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
    if train_ddp.RANK == 1 and len(calls) == {step} and not again:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
train_ddp.margin_loss = margin_loss
train_ddp.train_single.run_main(train_ddp.main, quiet=train_ddp.RANK > 0)
"""


@pytest.mark.parametrize("step", [2, 5], ids=["epoch-1", "epoch-2"])
def test_a_killed_rank_is_restarted_to_the_same_weights(step, undisturbed, tmp_path, finished):
    """Its own run is resumed, never the stranger's that --overwrite was to replace."""
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    process = torchrun("-c", KILL_RANK_1.format(step=step), *TWO_RANKS, "--overwrite",
                       "--run-dir", run_dir, no_python=True,
                       launcher=["--max-restarts=1"])  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert same_run(run_dir, undisturbed)
    assert f"epochs done: {step // 3}" in process.stdout.split("run folder")[2]


def test_a_dying_rank_ends_the_job(tmp_path):
    process = torchrun("-c", KILL_RANK_1.format(step=2), *TWO_RANKS, "--run-dir", tmp_path / "run",
                       no_python=True, timeout=60)  # fmt: skip
    assert process.returncode == 1 and "SIGKILL" in process.stderr
    assert torch.load(tmp_path / "run" / "last.pt")["history"] == []


def test_a_stopped_torchrun_leaves_a_resumable_run(undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    flags = [a if a != "2" else "500" for a in TWO_RANKS]
    options = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    job = run_python(*options, "train_ddp.py", *flags, "--run-dir", run_dir, start=True)
    while not job.stdout.readline().startswith("epoch  1"):
        assert job.poll() is None
    job.send_signal(signal.SIGINT)
    _, error = job.communicate(timeout=60)
    assert job.returncode != 0
    command = f"to go on: torchrun --nproc_per_node=2 train_ddp.py --resume {run_dir}"
    assert error.count(command) == 1
    assert '/train_ddp.py", line' not in error, error
    epoch = len(torch.load(run_dir / "last.pt")["history"])
    assert epoch >= 1
    process = torchrun(HERE / "train_ddp.py", "--resume", run_dir, "--epochs", epoch + 1)
    assert process.returncode == 0, process.stderr
    if epoch == 1:
        assert same_run(run_dir, undisturbed)


def test_two_agents_are_two_machines(undisturbed, tmp_path):
    """Two torchrun agents of one rank each, as on two machines, meet over c10d; a rank dies in
    epoch 2, and both agents start theirs again."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    run_dir = tmp_path / "run"
    options = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
               "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--max-restarts=1",
               "--rdzv-id=two-agents", "--no-python", sys.executable, "-c",
               KILL_RANK_1.format(step=5))  # fmt: skip
    threads = os.environ | {"OMP_NUM_THREADS": "2"}  # each agent believes to be alone
    jobs = [
        run_python(*options, *TWO_RANKS, "--run-dir", run_dir, start=True, env=threads)
        for _ in range(2)
    ]
    outputs = [job.communicate(timeout=100) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert any("epochs done: 1" in printed for printed, _ in outputs)
    for a, b in zip(weights(run_dir).values(), weights(undisturbed).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # other threads per rank


def test_validation_row_of_two_ranks_is_that_of_the_saved_model(tmp_path):
    """ResCapsNet: rank 0's BatchNorm buffers are validated and saved, in float32 after bf16."""
    run_dir = tmp_path / "run"
    process = torchrun(HERE / "train_ddp.py", "--model", "rescaps", *DIGITS, "--train-size", 64,
                       "--epochs", 1, "--run-dir", run_dir)  # fmt: skip
    assert process.returncode == 0, process.stderr
    checkpoint = torch.load(run_dir / "last.pt")
    assert checkpoint["config"]["precision"] == "bf16"
    model = ResCapsNet().to(memory_format=torch.channels_last)
    model.load_state_dict(checkpoint["model"])
    images, labels = data.load("digits", "", "validation")
    dataset = data.DigitBatches(images, labels, ResCapsNet, "cpu")
    loss, hits, n = train_single.validate(model, dataset).tolist()
    row = checkpoint["history"][-1]
    assert row["val_accuracy"] == round(100 * hits / n, 3)
    assert row["val_loss"] == pytest.approx(loss / n, abs=2e-6)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model", "alexcaps", *SMALL, "--sync-bn"), "--sync-bn needs GPUs"),  # rank 0 decides
        (("--model", "alexcaps", *SMALL, "--overwrite"), "another training is writing"),  # prepare
    ],
)
def test_mistakes_under_torchrun_are_printed_once(flags, words, tmp_path, finished):
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    before = contents(run_dir)
    first = run_python("-c", HOLD_LOCK, run_dir, start=True)
    assert first.stdout.readline() == "locked\n"
    process = torchrun(HERE / "train_ddp.py", *flags, "--run-dir", run_dir)
    first.kill()
    first.communicate()
    assert process.returncode == 1  # torchrun's own
    assert process.stderr.count("error: ") == 1 and words in process.stderr
    assert 'train_ddp.py", line' not in process.stderr  # no traceback of ours
    assert contents(run_dir) == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--precision", "fp8"], ["fp8"]),
        (["--precision", "fp16", "--device", "cpu"], ["fp16", "bf16"]),
        (["--sync-bn", "--device", "cpu"], ["--sync-bn"]),
        (["--accumulation-steps", "0"], ["--accumulation-steps"]),
        (["--device", "cuda:1"], ["cuda:1"]),
    ],
)
def test_wrong_use_of_train_ddp(flags, words, tmp_path, capsys, monkeypatch):
    code, _, error = call(train_ddp, capsys, monkeypatch, "--model", "alexcaps", *DIGITS, *flags,
                          "--run-dir", tmp_path / "run")  # fmt: skip
    assert_one_line(code, error, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sync-bn", "--compile"], "--compile"),
        (["--device", "cuda:1"], "each rank takes its own"),
    ],
)
def test_wrong_use_on_a_gpu(flags, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_single, "find_device", lambda name: torch.device(name or "cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # of GPUs that no driver can use
    code, _, error = call(train_ddp, capsys, monkeypatch, "--model", "alexcaps", *DIGITS, *flags,
                          "--run-dir", tmp_path / "run")  # fmt: skip
    assert_one_line(code, error, words)
    assert list(tmp_path.iterdir()) == []


def test_one_process_without_torchrun_and_scripts_keep_apart(copy, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")  # left over from something else: not believed alone
    code, printed, _ = call(train_ddp, capsys, monkeypatch, *TWO_RANKS, "--epochs", 1,
                            "--run-dir", tmp_path / "run")  # fmt: skip
    assert code == 0 and "AlexCapsNet in fp32 on" in printed
    one = torch.load(tmp_path / "run" / "last.pt")["history"][0]
    assert one["val_loss"] == torch.load(copy / "last.pt")["history"][0]["val_loss"]
    code, _, error = call(train_ddp, capsys, monkeypatch, "--resume", copy)
    assert_one_line(code, error, "train_single.py")


LEFT_OVER = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_rank_says_what_it_waits_for_and_can_be_stopped(stop, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = os.environ | LEFT_OVER | {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    job = run_python(HERE / "train_ddp.py", *TWO_RANKS, "--run-dir", tmp_path, start=True, env=env)
    assert job.stdout.readline() == "loading PyTorch ...\n"
    assert job.stdout.readline() == "rank 0 waits for the others at localhost\n"
    time.sleep(0.5)  # now it does
    job.send_signal(stop)
    assert job.communicate(timeout=10)[1] == "" and job.returncode == -stop


@pytest.mark.parametrize(
    ("omp", "launched", "ranks", "threads"),
    [("1", True, 2, 2), (None, True, 2, 2), ("3", True, 2, 5), ("1", False, 1, 5)],
)
def test_threads_of_a_rank(omp, launched, ranks, threads, monkeypatch):
    """1 is torchrun's default, which wastes cores; another number, or 1 alone, is the user's."""
    monkeypatch.setattr(train_ddp, "LAUNCHED", launched)
    monkeypatch.setattr(train_ddp, "LOCAL_WORLD_SIZE", ranks)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        assert train_ddp.pick_device({"device": "cpu"}) == torch.device("cpu")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------
# evaluate.py: figures against hand counts, pictures, comparison, bad input
# ------------------------------------------------------------------------------------------------

PICTURES = ("confusion_matrix", "roc", "curves", "mistakes", "rotation", "routing")


@pytest.fixture
def evaluated(capsys, monkeypatch):
    """evaluated(RUN, ...) runs evaluate.py in this process, on the CPU, with few rotated digits."""
    monkeypatch.setattr(evaluate, "ROTATED", 1)
    return lambda *arguments: call(evaluate, capsys, monkeypatch, *arguments, "--device", "cpu")


def test_metrics_by_hand():
    """Two images of each digit, all right but one 4, which is taken for a 9."""
    labels = np.repeat(np.arange(10), 2)
    lengths = np.full((20, 10), 0.1)
    lengths[np.arange(20), labels] = 0.9
    lengths[9, 4], lengths[9, 9] = 0.5, 0.9
    report = evaluate.classification_metrics(lengths, labels)
    assert (report["test_images"], report["errors"], report["accuracy"]) == (20, 1, 95.0)
    assert report["confusion"][4] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    # 9: of 2 * 18 pairs (a 9, another digit) 34 are in the right order and 2 are ties
    assert report["auc"][4] == 1 and report["auc"][9] == pytest.approx(35 / 36, abs=1e-6)
    assert evaluate.wilson(19, 20) == pytest.approx((76.39, 99.11), abs=0.01)
    assert evaluate.wilson(10, 10) == pytest.approx((72.25, 100), abs=0.01)


@pytest.mark.parametrize("network", [AlexCapsNet, ResCapsNet])
def test_flops_against_a_count_by_hand(network):
    """A convolution: 2 * places * channels in * out * kernel area; a product: 2 * m * k * n."""

    def conv(places, channels_in, channels_out, kernel):
        return 2 * places * channels_in * channels_out * kernel**2

    if network is AlexCapsNet:
        n = 128
        convolutions = conv(28 * 28, 1, 64, 5) + conv(13 * 13, 64, 192, 5)
        convolutions += conv(6 * 6, 192, 384, 3) + conv(6 * 6, 384, 256, 3)
        convolutions += conv(6 * 6, 256, 256, 3) + conv(2 * 2, 256, 256, 1)
    else:
        n = 1296
        block = conv(78 * 78, 32, 32, 1) + conv(78 * 78, 32, 32, 3)
        convolutions = conv(78 * 78, 1, 32, 3) + 3 * block + conv(9 * 9, 32, 128, 9)
    votes, sums = 2 * n * 8 * 160, 2 * n * 160  # the sums of iterations 2 and 3 are products, too
    assert evaluate.count_flops(network().eval()) == convolutions + votes + 2 * sums


def test_couplings_sum_to_one():
    """Over the digits, so the ten mean couplings of a capsule to its own digit start at 0.1."""
    images, labels = data.load("digits", "", "test")
    chosen = evaluate.first_of_each_class(labels, 2)
    assert labels[chosen].tolist() == sorted([*range(10)] * 2)
    summary = evaluate.routing_summary(AlexCapsNet().eval(), images[chosen], labels[chosen], 4)
    assert summary["coupling_to_true"][0] == pytest.approx(0.1)
    assert np.shape(summary["coupling_maps"]) == (10, 4)
    assert np.sum(summary["coupling_histograms"], axis=1) == pytest.approx([100, 100], abs=0.1)


class ByHand(torch.nn.Module):
    """Scores by a linear layer, without capsules; or couplings of 4 places, two capsules each."""

    side, mean, std = 28, 0.0, 1.0

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(28 * 28, 10)

    def forward(self, x, return_couplings=False):
        start = torch.full((len(x), 10, 8), 0.1)  # [B, J, N]
        end = start.clone()
        end[3, 3, 4:6] = 0.9  # of image 3, the capsules of place 2, to digit 3
        return (x, [start, end]) if return_couplings else self.linear(x.flatten(1))


def test_maps_and_histograms_of_couplings_by_hand():
    images, labels = torch.zeros(10, 28, 28, dtype=torch.uint8), torch.arange(10)
    summary = evaluate.routing_summary(ByHand(), images, labels, places=4)
    expected = np.full((10, 4), 0.1)
    expected[3, 2] = 0.9
    np.testing.assert_allclose(summary["coupling_maps"], expected, atol=1e-5)
    assert summary["coupling_to_true"] == pytest.approx([0.1, (78 * 0.1 + 2 * 0.9) / 80])
    true, others = np.array(summary["coupling_histograms"])
    assert (true[170:190].sum(), true.sum(), others[10:30].sum()) == (2.5, 100, 100)


def test_any_network_is_predicted_and_turned():
    images, labels = data.load("digits", "", "test")
    model, plain = ByHand().eval(), lambda scores: scores
    expected = model(data.prepare(images, model, torch.full([len(images)], 30.0)))
    found = evaluate.predict(model, images, 100, angle=30, scores=plain)
    torch.testing.assert_close(found, expected)
    chosen = evaluate.first_of_each_class(labels, evaluate.ROTATED)
    rotation = evaluate.rotation_accuracy(model, images, labels, scores=plain)
    hits = (found.argmax(dim=1) == labels)[chosen].double().mean().item()
    assert rotation["accuracy"]["30"] == pytest.approx(100 * hits, abs=1e-3)
    assert rotation["images"] == len(chosen) and len(rotation["accuracy"]) == len(evaluate.ANGLES)


def test_usual_settings_are_the_scripts_own():
    usual = vars(train_single.build_parser("").parse_args([])) | train_single.FIXED
    assert {name: usual.get(name, False) for name in evaluate.USUAL} == evaluate.USUAL


@pytest.fixture(scope="module")
def reported(finished, tmp_path_factory):
    """The finished run, evaluated by a real process that cannot print ±; and what it printed."""
    run = Path(shutil.copytree(finished, tmp_path_factory.mktemp("reported") / "run"))
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    process = run_python(HERE / "evaluate.py", run, "--device", "cpu", env=env)
    assert process.returncode == 0, process.stderr
    return run, process.stdout


def test_one_run_from_end_to_end(reported, tmp_path, evaluated, monkeypatch):
    run, printed = reported
    report = json.loads((run / "report.json").read_text())
    assert f"test accuracy {report['accuracy']:.2f} %" in printed
    # every test image exactly once, against scikit-learn on another path through the network
    model = AlexCapsNet().eval()
    model.load_state_dict(weights(run, "best.pt"))
    images, labels = data.load("digits", "", "test")
    with torch.no_grad():
        lengths = model(data.prepare(images, model)).norm(dim=2)
    assert report["test_images"] == len(labels) == np.sum(report["confusion"]) == 360
    accuracy = metrics.accuracy_score(labels, lengths.argmax(dim=1))
    assert report["accuracy"] == pytest.approx(100 * accuracy, abs=1e-3)
    auc = metrics.roc_auc_score(np.eye(10)[labels], lengths, average=None)
    np.testing.assert_allclose(report["auc"], auc, atol=1e-4)
    pictures = {name: (run / f"{name}.png").read_bytes() for name in PICTURES}
    for name in PICTURES:
        with Image.open(run / f"{name}.png") as picture:
            assert 600 <= picture.width <= 1600 and 300 <= picture.height <= 1500
            assert np.asarray(picture.convert("L")).std() > 5, f"{name} is blank"
    # without weights, all is drawn anew from what is kept: the same pictures, and only in --out
    archive = Path(shutil.copytree(run, tmp_path / "archive"))
    for name in ("best.pt", "last.pt", *(f"{name}.png" for name in PICTURES)):
        (archive / name).unlink()
    before = contents(archive)
    monkeypatch.setattr(evaluate, "measure", None)  # nothing is computed
    code, _, error = evaluated(archive, "--out", tmp_path / "out")
    assert code == 0, error
    for name in PICTURES:
        assert (tmp_path / "out" / f"{name}.png").read_bytes() == pictures[name], name
    assert contents(archive) == before


def test_what_cannot_be_written_is_known_before_any_work(
    reported, tmp_path, evaluated, monkeypatch
):
    run, _ = reported
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(evaluate, "load_network", lambda *_: pytest.fail("worked first"))
    for runs in ([run], [run, shutil.copytree(run, tmp_path / "b")], [run, "--image", "x.png"]):
        code, _, error = evaluated(*runs, "--out", tmp_path / "file" / "out")
        assert_one_line(code, error, "cannot write to", "--out")


def seed(run, folder, number, accuracy, **changes):
    """A copy of an evaluated run with another seed and accuracy, and without weights."""
    shutil.copytree(run, folder)
    (folder / "best.pt").unlink()
    config = json.loads((folder / "config.json").read_text()) | {"seed": number, "batch_size": 32}
    config |= {"train_size": None} | changes
    (folder / "config.json").write_text(json.dumps(config))
    report = json.loads((folder / "report.json").read_text()) | {"accuracy": accuracy}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_seeds_make_one_row(reported, tmp_path, evaluated):
    run, out = reported[0], tmp_path / "out"
    folders = [seed(run, tmp_path / str(k), k, a) for k, a in enumerate((99.0, 99.2, 99.7))]
    folders.append(seed(run, tmp_path / "other", 0, 90.0, lr=0.01))
    code, printed, error = evaluated(*folders, "--out", out)
    assert code == 0, error
    with open(out / "comparison.csv", newline="") as file:
        rows = {row["n"]: row for row in csv.DictReader(file)}
    assert float(rows["3"]["accuracy"]) == pytest.approx(99.3)
    # squared distances to 99.3: 0.09 + 0.01 + 0.16, over n - 1 = 2
    assert float(rows["3"]["accuracy_std"]) == pytest.approx(math.sqrt(0.13))
    assert rows["1"]["accuracy_std"] == "" and "lr 0.01" in rows["1"]["name"]
    assert "99.30 ± 0.36" in printed and (out / "comparison.md").read_text() in printed
    assert max(map(len, printed.splitlines())) <= 100
    assert (out / "comparison.png").exists()


@pytest.mark.parametrize("file", ["config.json", "metrics.csv", "report.json"])
def test_a_damaged_archive_is_one_line(file, reported, tmp_path, evaluated, monkeypatch):
    """Every entry missing or wrong, one after the other: never a traceback."""
    monkeypatch.setattr(evaluate, "draw_all", lambda *_: None)
    archive = seed(reported[0], tmp_path / "archive", 0, 99.0)
    whole = (archive / file).read_text()
    if file == "metrics.csv":
        lines = whole.splitlines()
        cells = lines[1].split(",")
        broken = [("all", text) for text in ("", "epoch,loss\n1,2\n", lines[0])]
        for k in range(1, len(cells)):
            for value in ("", "nan", "-1", "x", "inf"):
                changed = ",".join([*cells[:k], value, *cells[k + 1 :]])
                broken.append((str(k), "\n".join([lines[0], changed, *lines[2:]])))
    else:
        entries = json.loads(whole)
        broken = [("all", text) for text in ("", "{", "[]", "[1]", "null")]
        for name in entries:
            rest = {k: v for k, v in entries.items() if k != name}
            kind = 1 if name in (*evaluate.WORDS, "data_dir") else "x"
            wrong = [rest | {name: value} for value in (None, kind, [1], {}, -1, math.nan)]
            broken += [(name, json.dumps(entry)) for entry in (rest, *wrong)]
    believed = set()
    for name, text in broken:
        (archive / file).write_text(text)
        code, _, error = evaluated(archive, "--out", tmp_path / "out")
        if code:
            assert_one_line(code, error)
        else:
            believed.add(name)
    # what evaluate.py does not ask for
    assert believed <= {"device", "dry_run", "train_size", "effective_batch", "sync_bn"}


def test_a_report_of_another_run_is_not_believed(reported, tmp_path, evaluated):
    run = seed(reported[0], tmp_path / "run", 0, 99.0)
    report = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps(report | {"kept_val_accuracy": 3.0}))
    code, _, error = evaluated(run, "--out", tmp_path / "out")
    assert_one_line(code, error, "report.json", "best epoch")
    code, _, error = evaluated(run, run)
    assert_one_line(code, error, "given twice")
    (run / "best.pt").write_bytes(b"?")
    code, _, error = evaluated(run, "--out", tmp_path / "out")
    assert_one_line(code, error, "best.pt is damaged")


def test_links_in_a_run_lead_nowhere(reported, tmp_path, evaluated, monkeypatch):
    """A stranger's folder may link to files outside: they stay as they are, pictures too."""
    archive, outside = seed(reported[0], tmp_path / "archive", 0, 99.0), tmp_path / "outside"
    outside.mkdir()
    for name in ("report.json", "lengths.npy", "roc.png"):
        shutil.move(archive / name, outside / name)
        (archive / name).symlink_to(outside / name)
    np.save(outside / "lengths.npy", np.load(outside / "lengths.npy").astype(np.float32))
    before = contents(outside)
    torch.set_float32_matmul_precision("high")
    assert evaluated(archive)[0] == 0
    assert torch.get_float32_matmul_precision() == "highest"
    assert contents(outside) == before and not (archive / "roc.png").is_symlink()


def test_figures_come_before_pictures(reported, tmp_path, evaluated, monkeypatch):
    def fail(*_):
        raise data.UserError("the disk is full")

    monkeypatch.setattr(evaluate, "draw_all", fail)
    code, printed, error = evaluated(seed(reported[0], tmp_path / "run", 0, 99.0))
    assert_one_line(code, error, "the disk is full")
    assert "test accuracy 99.00 %" in printed and "macro avg" in printed


def test_lengths_and_plain_reports_are_checked(reported, tmp_path, evaluated, monkeypatch):
    run, drawn, file = seed(reported[0], tmp_path / "run", 0, 99.0), [], tmp_path / "plain.json"
    monkeypatch.setattr(evaluate, "draw_all", lambda *arguments: drawn.append(arguments))
    file.write_text((run / "report.json").read_text())
    code, _, error = evaluated(run, "--plain", file)
    assert code == 0 and drawn[0][-1] == evaluate.at_angles(json.loads(file.read_text())), error
    words = {"rotation": {"images": 9, "accuracy": dict.fromkeys(map(str, evaluate.ANGLES), "x")}}
    for text in ("", "[]", '{"rotation": [1]}', json.dumps(words)):
        file.write_text(text)
        assert_one_line(*evaluated(run, "--plain", file)[::2], "cannot be drawn")
    whole = np.load(run / "lengths.npy")
    assert whole.dtype == np.float16 and whole.shape == (360, 10)
    for wrong in (whole[:, ::-1], whole[:-1], whole[0], np.array({}, dtype=object), None):
        (run / "lengths.npy").unlink()
        if wrong is not None:
            np.save(run / "lengths.npy", wrong)
        assert_one_line(*evaluated(run)[::2], "lengths.npy" if wrong is None else "cannot be drawn")
    np.savez(run / "several.npz", whole)
    for content in (b"", (run / "several.npz").read_bytes()):
        (run / "lengths.npy").write_bytes(content)
        assert_one_line(*evaluated(run)[::2], "cannot be drawn")


def test_runs_without_a_report_are_evaluated_first(reported, tmp_path, evaluated, monkeypatch):
    monkeypatch.setattr(evaluate, "draw_all", lambda *_: None)
    new = Path(shutil.copytree(reported[0], tmp_path / "new"))
    known = json.loads((new / "report.json").read_text()), np.load(new / "lengths.npy")
    monkeypatch.setattr(evaluate, "measure", lambda *_: known)
    (new / "report.json").unlink()
    old, before = seed(reported[0], tmp_path / "old", 1, 90.0), contents(new)
    code, printed, error = evaluated(new, old, "--out", tmp_path / "out")
    assert code == 0 and "macro avg" in printed, error
    assert contents(new) == before and (tmp_path / "out" / "new" / "report.json").exists()
    monkeypatch.chdir(tmp_path)
    assert evaluated(new, old)[0] == 0
    assert (new / "report.json").exists() and (tmp_path / "runs" / "comparison").is_dir()
    monkeypatch.setattr(evaluate, "evaluate_run", None)  # now it has one
    assert evaluated(new, old)[0] == 0
    (old / "report.json").unlink()
    assert_one_line(*evaluated(new, old)[::2], "old has no best.pt")


def test_pictures_compare_whole_runs(reported, tmp_path, monkeypatch):
    """As lines over epochs and over time, an epoch as long as the fastest; bands hold seeds."""
    names, drawn = ("a", "b", "unfinished"), []
    changes = ({}, {}, {"epochs": 9})
    runs = [
        evaluate.read_run(seed(reported[0], tmp_path / name, k, 99.0, **change))
        for k, (name, change) in enumerate(zip(names, changes, strict=True))
    ]
    for row, accuracy, seconds in zip(runs[0]["history"], (90.0, 98.0), (60.0, 30.0), strict=True):
        row["val_accuracy"], row["seconds"] = accuracy, seconds
    for row in runs[1]["history"]:
        row["val_accuracy"], row["seconds"] = 94.0, 30.0
    rows = evaluate.make_rows(runs)
    assert [row["n"] for row in rows] == [2, 1] or [row["n"] for row in rows] == [1, 2]
    monkeypatch.setattr(evaluate, "save", lambda figure, *_: drawn.append(figure))
    evaluate.draw_comparison(rows, tmp_path / "x.png")
    left, right = (axis.lines for axis in drawn[0].axes)
    assert len(left) == len(right) == 1
    assert left[0].get_ydata() == pytest.approx([0.92, 0.96])
    assert right[0].get_xdata() == pytest.approx([0.5, 1.0])  # minutes
    assert drawn[0].axes[0].get_yscale() == "logit"
    evaluate.plt.close(drawn[0])
    evaluate.draw_comparison([row for row in rows if row["epochs"] == 9], tmp_path / "x.png")
    assert len(drawn) == 1  # nothing is whole, so nothing is drawn


def test_a_table_names_only_what_differs():
    row = {"test_images": 10_000, "dataset": "mnist", "accuracy": 99.5, "accuracy_std": 0.04}
    row |= {"n": 3, "seconds": 80.0, "hardware": "H100"}
    names = [
        "AlexCapsNet, 2 processes in bf16, 3 epochs of 20,000 images",
        "AlexCapsNet, 2 processes in bf16, shift 2, routing iterations 5, 3 epochs of 20,000 images",
    ]
    text = evaluate.comparison_text([row | {"name": name} for name in names])
    assert "mnist, AlexCapsNet, 2 processes in bf16, 3 epochs of 20,000 images" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 100
    assert lines[2].startswith("| H100 ") and "| 99.50 ± 0.04 | 99.34-99.62 | 80.0" in lines[3]


def test_own_digits_become_mnists(tmp_path, reported, evaluated):
    """A 7, off-centre, in any size and colour format: the same 28x28 picture of it."""
    pixels = np.full((90, 140), 250, dtype=np.uint8)
    pixels[20:26, 70:100] = 10  # its bar
    for y in range(26, 70):
        pixels[y, 97 - (y - 26) // 2 : 103 - (y - 26) // 2] = 10
    light = Image.fromarray(pixels)
    images = {"dark": light, "light": Image.fromarray(255 - pixels), "rgb": light.convert("RGB")}
    images["large"] = light.resize((560, 360))
    images["deep"] = Image.fromarray(pixels.astype(np.uint16) * 256)
    transparent = Image.new("RGBA", light.size)  # black ink on nothing
    transparent.putalpha(Image.fromarray(255 - pixels))
    images["rgba"] = transparent
    seen = {}
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
        seen[name] = evaluate.read_digit(tmp_path / f"{name}.png").astype(float)
    ys, xs = seen["dark"].nonzero()
    assert (np.ptp(ys), np.ptp(xs)) == (19, pytest.approx(12, abs=1))  # in 20x20, 50 by 33
    centre = (np.indices((28, 28)) * seen["dark"]).sum(axis=(1, 2)) / seen["dark"].sum()
    assert np.abs(centre - 13.5).max() < 1
    for name, digit in seen.items():
        assert np.abs(digit - seen["dark"]).mean() < 8, name
    run, out = reported[0], tmp_path / "out"
    code, printed, error = evaluated(run, "--out", out, "--image", tmp_path / "dark.png")
    assert code == 0 and "dark.png: " in printed and (out / "own-digits.png").exists(), error
    (tmp_path / "text.png").write_text("no image")
    code, _, error = evaluated(run, "--out", out, "--image", tmp_path / "text.png")
    assert_one_line(code, error, "text.png is no image")
    Image.new("L", (50, 50), "white").save(tmp_path / "empty.png")
    code, _, error = evaluated(run, "--out", out, "--image", tmp_path / "empty.png")
    assert_one_line(code, error, "no digit can be seen")


# ------------------------------------------------------------------------------------------------
# results/benchmark.py
# ------------------------------------------------------------------------------------------------


def test_capsule_formulations_agree():
    torch.manual_seed(0)
    found, precisions = formulations(3, torch.device("cpu"), compiled=False, n=20), []
    assert set(found) == {"ours", "einsum", "tiled weights"}
    v, du, dw = found["ours"]()
    assert v.shape == (3, 10, 16) and du.shape == (3, 20, 8) and dw.shape == (20, 8, 160)
    torch.set_float32_matmul_precision("high")  # as training does on a GPU; checked is without TF32
    run = found["einsum"]
    found["einsum"] = lambda: precisions.append(torch.get_float32_matmul_precision()) or run()
    check_same(found)
    assert precisions == ["highest"] == [torch.get_float32_matmul_precision()]
    for wrong in ((v * 1.01, du, dw), (v, du * 1.01, dw), (v, du, dw.flip(0))):
        found["tiled weights"] = lambda wrong=wrong: wrong
        with pytest.raises(AssertionError):  # the check can fail
            check_same(found)


def test_quick_benchmark_writes_json(tmp_path, capsys, monkeypatch):
    """In parts, each of which leaves the file's other parts alone; results/ stays as it is."""
    monkeypatch.setattr(train_single, "keep_freed_memory", lambda: None)
    before = (HERE / "results" / "speed-cpu.json").read_bytes()
    file = tmp_path / "speed-cpu.json"
    file.write_text('{"steps": {"hardware": "", "torch": "", "rows": []}}')
    for part in ("capsules", "data", "scaling"):
        command = ["benchmark", "--quick", "--device", "cpu", "--only", part]
        monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path)])
        benchmark.main()
    result = json.loads(file.read_text())
    assert list(result) == ["steps", "capsules", "data", "scaling"]
    assert tables.speed_text(result) in capsys.readouterr().out
    layers = result["capsules"]["rows"]  # 3 formulations, freed memory given back or kept
    assert len(layers) == 6 and all(row["ms"] > 0 for row in layers)
    assert [row["network"] for row in result["data"]["rows"]] == ["alexcaps", "rescaps"]
    rows = result["scaling"]["rows"]
    kinds = [(row["network"], row["precision"]) for row in rows]
    assert kinds == list(itertools.product(("alexcaps", "rescaps"), ("fp32", "bf16")))
    for row in rows:
        assert all(len(row[name]) == 2 and min(row[name]) > 0 for name in ("one", "apart", "ddp"))
    text = file.read_text()
    assert socket.gethostname() not in text and str(HERE) not in text and "CPU" not in text
    monkeypatch.setattr(sys, "argv", ["benchmark", "--quick", "--device", "cpu", "--only", "steps"])
    benchmark.main()
    assert (HERE / "results" / "speed-cpu.json").read_bytes() == before


def test_scaling_pins_each_process_to_a_core_of_its_own(monkeypatch, tmp_path):
    pinned, spawned = [], []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {7, 3, 5})
    monkeypatch.setattr(
        torch.multiprocessing, "spawn", lambda f, args, nprocs: spawned.append(args)
    )
    with pytest.raises(FileNotFoundError):  # nobody wrote rows
        benchmark.scaling_rows(torch.device("cpu"), quick=True)
    assert spawned[0][0] == [3, 5, 7]
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: pinned.append(cores))
    monkeypatch.setattr(torch, "set_num_threads", pinned.append)
    monkeypatch.setattr(train_single, "keep_freed_memory", lambda: 1 / 0)
    for rank in (0, 1):
        with pytest.raises(ZeroDivisionError):  # far enough
            benchmark.measure_scaling(rank, spawned[0][0], True, str(tmp_path))
    assert pinned == [{3}, 1, {5}, 1]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert benchmark.scaling_rows(torch.device("cpu"), quick=True) == []  # one core is not two


@pytest.mark.parametrize(
    "network, name", [(AlexCapsNet, "plain-alexcaps"), (ResCapsNet, "plain-rescaps")]
)
def test_a_plain_network_has_the_capsule_networks_convolutions(network, name):
    torch.manual_seed(0)
    capsule_net = network().eval()
    torch.manual_seed(0)
    net = plain.NETWORKS[name](3).eval()
    ours, theirs = net.state_dict(), capsule_net.state_dict()
    assert {k for k in ours if k not in theirs} == {"digits.bias"}
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs if not k.startswith("digits"))
    images = torch.randn(2, 1, net.side, net.side)
    x = capsule_net.primary.conv(capsule_net.features(images)).clamp(min=0).flatten(1)
    torch.testing.assert_close(net(images), x @ ours["digits.weight"].T + ours["digits.bias"])


def test_a_plain_network_is_trained_and_evaluated_by_the_scripts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "ROTATED", 1)
    for script, name in itertools.product(
        (train_single, train_ddp), ("capsule_lengths", "margin_loss")
    ):
        monkeypatch.setattr(script, name, getattr(script, name))  # to be restored afterwards
    run = tmp_path / "run"
    train = "train_single.py", "--model", "plain-alexcaps", *SMALL, "--epochs", 1, "--run-dir", run
    with mock.patch.dict(train_single.MODELS):
        for command in (train, ("evaluate.py", run)):
            code, _, error = call(plain, capsys, monkeypatch, *command)
            assert code == 0, error
        code, _, error = call(plain, capsys, monkeypatch, "train_single.py", "--model", "alexcaps")
        assert code == 2 and "invalid choice" in error  # it would get the plain networks' loss
    net, row = plain.PlainAlexNet().eval(), torch.load(run / "last.pt")["history"][0]
    net.load_state_dict(weights(run, "best.pt"))
    scores = {}
    for part in ("validation", "test"):
        images, labels = data.load("digits", "", part)
        with torch.no_grad():
            scores[part] = net(data.prepare(images, net)), labels
    assert row["val_loss"] == pytest.approx(F.cross_entropy(*scores["validation"]).item(), rel=1e-4)
    report = json.loads((run / "report.json").read_text())
    wrong = (scores["test"][0].argmax(dim=1) != scores["test"][1]).sum().item()
    assert report["errors"] == wrong and report["test_images"] == 360
    auc = metrics.roc_auc_score(np.eye(10)[scores["test"][1]], scores["test"][0], average=None)
    assert report["auc"] == pytest.approx(auc, abs=1e-4)
    assert report["parameters"] == sum(p.numel() for p in net.parameters())
    assert len(report["rotation"]["accuracy"]) == 13 and "coupling_to_true" not in report
    assert_one_line(
        *call(plain, capsys, monkeypatch, "train.py")[::2], "train_single.py, train_ddp.py"
    )


# ------------------------------------------------------------------------------------------------
# results/tables.py
# ------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_textbooks():
    a, b = [99.1, 99.3, 99.2], [98.9, 99.0, 98.6]
    theirs = stats.ttest_ind(a, b).confidence_interval()
    assert tables.over_seeds(a, b) == pytest.approx((11 / 30, *theirs))
    # by hand: deviations 0.1 and 0.1, squares 0.02 over 2 + 1 - 2 degrees; t(0.975, 1) = 12.7062
    half = 12.7062 * math.sqrt(0.02 * (1 / 2 + 1))
    assert tables.over_seeds([1.1, 1.3], [1.0]) == pytest.approx(
        (0.2, 0.2 - half, 0.2 + half), rel=1e-5
    )
    assert tables.of_mean(b)[1:] == pytest.approx(stats.ttest_1samp(b, 0).confidence_interval())
    # Newcombe 1998, table II (b), method 10: 9 of 10 minus 3 of 10
    assert tables.over_images(90, 30, 10) == pytest.approx((60, 17.05, 80.90), abs=0.01)
    # a ratio's interval is that of the logarithms' difference
    found = tables.ratio("", [2.0, 2.2], [1.0, 1.1])
    logs = tables.over_seeds(np.log([2.0, 2.2]).tolist(), np.log([1.0, 1.1]).tolist())
    assert found[1:4] == pytest.approx(np.exp(logs)) and found.n == "2 + 2"


def row(accuracy, after_one=98.0, seconds=100.0, **settings):
    """A row as evaluate.make_rows makes it, as far as claims look at it."""
    usual = {"train_images": 55_000, "world_size": 1, "batch_size": 32, "precision": "fp32"}
    usual |= {"epochs": 20, "hardware": "a CPU", "flops_per_image": 200}
    runs = [{"history": [{"val_accuracy": after_one + k / 100}]} for k in range(len(accuracy))]
    values = {"accuracy": accuracy, "seconds": [seconds + k / 100 for k in range(len(accuracy))]}
    return usual | {"runs": runs, "values": values} | settings


def test_verdicts_respect_intervals():
    """Agree where 0 to 2 holds: within, outside, on either bound, and several estimates at once."""
    within, outside, low, high = (1, 0.5, 1.5), (3, 2.5, 3.5), (0.2, -0.1, 0.5), (1.9, 1.5, 2.3)
    for word, *cases in (
        ("agree", [within], [within, within]),
        ("disagree", [outside], [(-1, -1.5, -0.5)], [within, low, outside]),
        ("undecided", [low], [high], [(1, -1, 3)], [within, low]),
        ("not measured", []),
    ):
        for case in cases:
            estimates = [tables.Estimate("", *figures, "") for figures in case]
            assert tables.verdict(estimates, 0, 2) == word, case


def test_claims_get_verdicts():
    """Each kind of verdict, of runs that tell all; then what runs that are unlike do not tell."""
    ddp = {"world_size": 2, "precision": "bf16"}
    kept = {
        "alexcaps-single": row([99.5, 99.6, 99.7], 99.0, flops_per_image=400, seconds=240),
        "rescaps-single": row([99.0, 99.1, 99.2], 98.0),
        "alexcaps-ddp": row([99.5, 99.6, 99.7], 98.6, **ddp),
        "rescaps-ddp": row([99.0], 98.5, seconds=50, flops_per_image=100, **ddp),
    }
    pairs = {"one": [100.0, 101.0, 99.0], "apart": [190.0] * 3, "ddp": [160.0, 164.0, 158.0]}
    scaling = [{"network": "alexcaps", "precision": "bf16"} | pairs]
    scaling += [{"network": "rescaps", "precision": "fp32"} | pairs]

    def judged(kept, scaling=()):
        return {claim["key"]: claim for claim in tables.judged_claims(kept, scaling)}

    claims = judged(kept, scaling)
    for word, keys in {
        "agree": ["fast", "rescaps", "time", "alexcaps ddp", "scarce"],
        "disagree": ["end", "alexcaps"],
        "undecided": ["ddp"],
        "not measured": ["rescaps ddp"],
    }.items():
        assert [key for key, claim in claims.items() if claim["verdict"] == word] == keys
    # three seeds each, standard deviation 0.1: t(0.975, 4) = 2.776 times 0.1 sqrt(2 / 3)
    assert claims["end"]["short"] == "single: -0.50 points (-0.73 to -0.27)"
    assert claims["fast"]["n"] == "3 + 3; 3 + 1" and claims["alexcaps ddp"]["n"] == "3 rounds"
    assert claims["alexcaps ddp"]["short"].startswith("bf16: 0.80 (0.7")
    alex = {"alexcaps-single": kept["alexcaps-single"]}
    unlike = {"end": ("epochs", 10), "fast": ("train_images", 20), "time": ("hardware", "a GPU")}
    for key, (name, value) in unlike.items():
        claims = judged(alex | {"rescaps-single": row([99.0], **{name: value})})
        assert (claims[key]["verdict"], claims[key]["short"]) == ("not measured", ""), key
    one = {"alexcaps-single": row([99.5]), "rescaps-single": row([99.4])}
    claims = judged(one)
    assert claims["end"]["n"] == "1 + 1, 10,000 images" and claims["end"]["verdict"] == "undecided"
    assert claims["time"]["n"] == "1 + 1, no interval"


def run_to_keep(folder, curve=(98.0, 99.0), accuracy=99.0, **changes):
    """A finished and evaluated run without weights."""
    folder.mkdir(parents=True)
    config = json.loads((HERE / "results" / "alexcaps-single" / "config.json").read_text())
    config |= {"epochs": len(curve), "data_dir": str(folder)} | changes
    report = {"kept_epoch": 1 + curve.index(max(curve)), "accuracy": accuracy, "errors": 100}
    report |= {"test_images": 10_000, "parameters": 1, "flops_per_image": 1}
    angles = {str(angle): 100 - abs(angle) for angle in evaluate.ANGLES}
    report |= {"interval_95": [98, 99], "rotation": {"images": 1000, "accuracy": angles}}
    lines = [",".join(["epoch", *train_single.COLUMNS])]
    lines += [f"{k},0.1,99.0,0.1,{value},0.001,60.0" for k, value in enumerate(curve, start=1)]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    (folder / "lengths.npy").write_bytes(b"lengths")
    return tables.read(folder)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty results/; the plain networks are known, as in tables.main."""
    monkeypatch.setattr(tables, "HERE", tmp_path / "results")
    with mock.patch.dict(train_single.MODELS, plain.NETWORKS):
        yield tmp_path / "results"


def test_kept_runs_are_not_replaced_by_lesser_ones(tmp_path, results):
    def keep(run, overwrite=False):
        tables.keep(run, tables.place(run, overwrite))

    whole = run_to_keep(tmp_path / "a" / "alexcaps-single", (98.0, 99.0, 98.5))
    keep(whole)
    keep(whole)  # an equal one may
    kept = results / "alexcaps-single"
    assert {p.name for p in kept.iterdir()} == {p.name for p in whole["folder"].iterdir()}
    assert str(tmp_path) not in (kept / "config.json").read_text()
    before = contents(kept)
    short = run_to_keep(tmp_path / "b" / "alexcaps-single", (98.0, 99.0))
    small = run_to_keep(tmp_path / "c" / "alexcaps-single", (98.0,) * 9, train_images=20_000)
    for lesser in (short, small):
        with pytest.raises(data.UserError, match="--overwrite"):
            keep(lesser)
        assert contents(kept) == before
    keep(short, overwrite=True)
    assert len((kept / "metrics.csv").read_text().splitlines()) == 3
    for change in ({"dataset": "digits"}, {"epochs": 3}):  # of which two are finished
        other = run_to_keep(tmp_path / str(change), **change)
        with pytest.raises(data.UserError, match="not of MNIST, or not finished"):
            keep(other)
    seed = run_to_keep(tmp_path / "alexcaps-single-seed1", seed=1, accuracy=99.2)
    keep(seed)
    assert not (results / "alexcaps-single-seed1" / "lengths.npy").exists()
    (rows,) = tables.kept_rows(results).items()  # two seeds, one row
    assert rows[0] == "alexcaps-single" and rows[1]["values"]["accuracy"] == [99.0, 99.2]
    (seed["folder"] / "report.json").write_text('{"kept_epoch": 1}')
    with pytest.raises(data.UserError, match="another epoch; run evaluate.py"):
        tables.read(seed["folder"])


def test_ablation_stands_beside_its_first_row(tmp_path, results):
    folder = tmp_path / "runs" / "ablation"
    for name, curve, changes in (
        ("baseline-seed0", (98.0, 99.0), {}),
        ("baseline-seed1", (98.0, 99.2), {"seed": 1}),
        ("routing-1-seed0", (98.0, 98.6), {"routing_iterations": 1}),
        ("plain-seed0", (98.0, 98.0), {"model": "plain-alexcaps"}),
    ):
        run = run_to_keep(folder / name, curve, **changes)
        tables.keep(run, tables.place(run, overwrite=False))
    assert tables.kept_rows(results) == {}  # they have a folder of their own
    found = tables.ablation_tables(tables.kept_rows(results / "ablation"))
    lines = [re.sub(" +", " ", line) for line in found["ablation"].splitlines()[2:]]
    for line, start in zip(
        lines,
        (
            "nothing | 2 | 99.10 ± 0.14",
            "--model plain-alexcaps | 1 | 98",
            "--routing-iterations 1 | 1 | 98.60",
        ),
        strict=True,
    ):
        assert line.startswith(f"| {start}")
    half = 12.7062 * 0.1 * math.sqrt(2 * 1.5)  # t(0.975, 1); deviations of 0.1 and 0.1
    assert f"| -1.10 ({-1.1 - half:+.2f} to {-1.1 + half:+.2f}) " in found["differences"]


def test_a_table_without_its_place_is_an_error(tmp_path):
    (tmp_path / "page").write_text("<!-- results: a -->\nold\n<!-- end -->\n")
    assert "old" not in tables.fill(tmp_path / "page", {"a": "new"})
    with pytest.raises(data.UserError, match="0 places"):
        tables.fill(tmp_path / "page", {"b": "new"})


# ------------------------------------------------------------------------------------------------
# README.md
# ------------------------------------------------------------------------------------------------


def test_pages_are_what_results_holds():
    with mock.patch.dict(train_single.MODELS, plain.NETWORKS):
        pages = tables.pages()
        runs = [run for row in tables.kept_rows(HERE / "results").values() for run in row["runs"]]
        comparison = evaluate.comparison_text(evaluate.make_rows(runs))
    assert [page.relative_to(HERE).as_posix() for page in pages] == [
        "README.md",
        "results/README.md",
    ]
    for page, text in pages.items():
        assert page.read_text() == text, f"python -m results.tables would change {page}"
    assert (HERE / "results" / "comparison.md").read_text() == comparison
    tables_of_readme = re.findall(
        r"<!-- results: .*?<!-- end -->", (HERE / "README.md").read_text(), re.DOTALL
    )
    assert max(len(line) for part in tables_of_readme for line in part.splitlines()) <= 100


def test_results_name_no_machine():
    files = [p for p in (HERE / "results").rglob("*") if p.suffix in (".json", ".csv", ".md")]
    assert len(files) > 20
    for file in files:
        text = file.read_text()
        assert not re.search(r"[\"' =](/|~)\w|launch|git_commit|\bpid\b", text), file
        if file.name == "config.json":
            assert json.loads(text)["data_dir"] == "data" and json.loads(text)["hardware"], file


def test_readme_quotes_the_code():
    rows = re.findall(r"\| .* \| `([\w.]+)` \| `(.+?)` \|", (HERE / "README.md").read_text())
    assert len(rows) > 5
    for name, code in rows:
        function = functools.reduce(getattr, name.split("."), capsules)
        assert code in inspect.getsource(function), (name, code)


def test_readme_marks_and_links_exist():
    text = (HERE / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (HERE / link).exists(), link
    for name in re.findall(r"`(test_\w+)", text):
        assert f"def {name}" in (HERE / "test_models.py").read_text(), name
