"""Tests of the course files, in 3 to 8 minutes on 2 CPU cores:

    python -m pytest -q                              these tests and those of results/
    python -m pytest -q test_models.py -k equation   a few of them

Read the first two parts, down to "Helpers for real processes": they show how to check
a formula. Most formulas are compared with a reference in float64, written as plain loops.
The later tests run the scripts as a user does, also under torchrun, on scikit-learn's
digits. They need no internet.

pytest calls every function whose name begins with test_. With `parametrize`, it does so
once for each value. A fixture is a function: if a test has an argument of its name, pytest
calls it and passes its result. A fixture with autouse=True runs before every test.
"""

import contextlib
import csv
import errno
import functools
import gzip
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.datasets import MNIST
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import rotate

# Without torchrun, train_ddp.py refuses a stale RANK and WORLD_SIZE, so they go first. Under
# torchrun they are real: the ranks of WORKER (below) import this file, too.
if not torch.distributed.is_torchelastic_launched():
    for variable in ("RANK", "WORLD_SIZE"):
        os.environ.pop(variable, None)

import capsules
import data
import evaluate
import train_ddp
import train_single
from alexcaps import AlexCapsNet
from rescaps import ResCapsNet

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # use the CPU, whatever the machine has
CPU = torch.device("cpu")
HERE = Path(__file__).parent
both_networks = pytest.mark.parametrize("network", [AlexCapsNet, ResCapsNet])


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)


# -- Capsule maths against plain loops in float64 --------------------------------------------------


def squash_reference(s):
    norm = math.sqrt(sum(x * x for x in s))
    return [norm**2 / (1 + norm**2) * x / norm for x in s]


def routing_reference(votes, iterations):
    """votes[j][i][d] of one image -> (v[j][d], couplings[iteration][j][i])."""
    J = len(votes)
    N = len(votes[0])
    D = len(votes[0][0])
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
            s = [0.0] * D
            for i, d in itertools.product(range(N), range(D)):
                s[d] += c[j][i] * votes[j][i][d]
            v.append(squash_reference(s))
        for j, i, d in itertools.product(range(J), range(N), range(D)):
            b[j][i] += votes[j][i][d] * v[j][d]
    return v, history


def assert_equals_list(found, expected):
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_squash_equals_equation_1():
    sizes = torch.logspace(-3, 3, 5, dtype=torch.float64)  # vectors of very different lengths
    s = torch.randn(5, 7, dtype=torch.float64) * sizes.unsqueeze(1)
    assert_equals_list(capsules.squash(s), [squash_reference(row) for row in s.tolist()])


@pytest.mark.parametrize("function", [capsules.squash, capsules.capsule_lengths])
def test_zero_vector_has_finite_value_and_gradient(function):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        s = torch.zeros(2, 3, 8, dtype=dtype, requires_grad=True)
        out = function(s)
        out.sum().backward()
        assert out.abs().max() == 0
        assert torch.isfinite(s.grad).all()


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
def test_routing_equals_procedure_1(iterations):
    votes = torch.randn(2, 4, 6, 3, dtype=torch.float64)  # [B, J, N, D]
    v, couplings = capsules.dynamic_routing(votes, iterations)
    assert len(couplings) == iterations
    for image in range(2):
        expected_v, expected_c = routing_reference(votes[image].tolist(), iterations)
        assert_equals_list(v[image], expected_v)
        for c, expected in zip(couplings, expected_c, strict=True):
            assert_equals_list(c[image], expected)


def test_margin_loss_equals_equation_4():
    lengths = torch.rand(6, 10, dtype=torch.float64)
    labels = torch.arange(6)
    total = 0.0
    for row, label in zip(lengths.tolist(), labels.tolist(), strict=True):
        for k, length in enumerate(row):
            if k == label:
                total += max(0.0, 0.9 - length) ** 2
            else:
                total += 0.5 * max(0.0, length - 0.1) ** 2
    loss = capsules.margin_loss(lengths, labels).item()
    assert loss == pytest.approx(total / 6, rel=1e-12)


def test_gradients_equal_finite_differences():
    """gradcheck compares backward's gradients with (f(x + eps) - f(x - eps)) / (2 eps).

    float32 would be too coarse for such small differences.
    """
    small = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 2])
    assert torch.autograd.gradcheck(lambda votes: capsules.dynamic_routing(votes)[0], small)
    assert torch.autograd.gradcheck(capsules.squash, small)
    lengths = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: capsules.margin_loss(x, labels), lengths)
    layer = capsules.DigitCapsules(N=6, I=4, J=3, D=5).double()
    u = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)

    # gradcheck changes only a function's arguments, so the weight must be one of them.
    def forward(u, weight):
        return torch.func.functional_call(layer, {"weight": weight}, (u,))

    assert torch.autograd.gradcheck(forward, (u, layer.weight))


def test_votes_are_each_capsules_own_matrix_product():
    B, N, I, J, D = 2, 6, 4, 3, 5
    layer = capsules.DigitCapsules(N, I, J, D, iterations=1).double()
    u = torch.randn(B, N, I, dtype=torch.float64)
    W = layer.weight.view(N, I, J, D)
    s = torch.zeros(B, J, D, dtype=torch.float64)
    for i, j in itertools.product(range(N), range(J)):
        s[:, j] += u[:, i] @ W[i, :, j] / J  # in iteration 1 all couplings are 1/J
    torch.testing.assert_close(layer(u), capsules.squash(s))
    # After iteration 1, coupling [b, j, i] belongs to primary capsule i.
    layer.iterations = 2
    v, couplings = layer.route(u)
    votes = torch.einsum("bni,nijd->bjnd", u, W)
    agreement = torch.einsum("bjnd,bjd->bjn", votes, capsules.squash(s))
    torch.testing.assert_close(couplings[1], agreement.softmax(dim=1))
    s = torch.einsum("bjn,bjnd->bjd", couplings[1], votes)
    torch.testing.assert_close(v, capsules.squash(s))


def test_a_primary_capsule_comes_from_one_place():
    layer = capsules.PrimaryCapsules(2, types=3, I=4, kernel_size=1)
    x = torch.randn(1, 2, 5, 5)
    changed = x.clone()
    # At place 1 * 5 + 2 = 7, the three capsules must change: 7 * 3 + type = 21, 22 and 23.
    # All others must not.
    changed[0, :, 1, 2] += 1
    different = (layer(x) != layer(changed)).any(dim=2).squeeze(0)  # [N]
    assert different.nonzero().flatten().tolist() == [21, 22, 23]
    expected = capsules.squash(layer.conv(x)[0, 4:8, 1, 2])  # type 1: channels 4 to 7
    torch.testing.assert_close(layer(x)[0, 22], expected)


def decoder_reference(capsule, digit, layers, J=10):
    """The decoder's 784 pixels for one image, from the capsule of `digit`.

    `layers` holds a (weight, bias) for each linear layer.
    """
    D = len(capsule)
    values = [0.0] * (J * D)
    values[digit * D : (digit + 1) * D] = capsule  # all other capsules are masked
    for number, (weight, bias) in enumerate(layers, start=1):
        sums = []
        for row, b in zip(weight, bias, strict=True):
            sums.append(sum(w * x for w, x in zip(row, values, strict=True)) + b)
        if number < len(layers):
            values = [max(0.0, x) for x in sums]  # ReLU
        else:
            values = [1 / (1 + math.exp(-x)) for x in sums]  # sigmoid
    return values


def mean_of_windows(picture, side=28):
    """A picture [S, S] -> its 784 pixels at 28x28, row by row.

    Each pixel is the mean of the window that it covers. If S / 28 is not a whole number,
    windows overlap: each one contains every pixel that it touches.
    """
    S = len(picture)
    pixels = []
    for y, x in itertools.product(range(side), range(side)):
        rows = range(y * S // side, math.ceil((y + 1) * S / side))
        columns = range(x * S // side, math.ceil((x + 1) * S / side))
        window = [picture[r][c] for r, c in itertools.product(rows, columns)]
        pixels.append(sum(window) / len(window))
    return pixels


@both_networks
def test_reconstruction_loss_equals_a_plain_loop(network):
    """Margin loss + W * mean squared error of the true digit's picture, [S17] 4.1."""
    model = network(reconstruction=20.0).double()
    pictures = torch.rand(2, 1, network.side, network.side, dtype=torch.float64)
    images = (pictures - network.mean) / network.std
    labels = torch.tensor([3, 9])
    v = model(images)
    linear = [m for m in model.decoder.layers if isinstance(m, torch.nn.Linear)]
    layers = [(m.weight.tolist(), m.bias.tolist()) for m in linear]
    squares = 0.0
    for k, digit in enumerate(labels.tolist()):
        drawn = decoder_reference(v[k, digit].tolist(), digit, layers)
        wanted = mean_of_windows(pictures[k, 0].tolist())
        squares += sum((a - b) ** 2 for a, b in zip(drawn, wanted, strict=True))
    margin = capsules.margin_loss(v.norm(dim=2), labels).item()
    expected = margin + 20 * squares / (2 * 784)
    assert model.loss(v, images, labels).item() == pytest.approx(expected, rel=1e-12)


def test_the_decoder_sees_one_capsule_and_sends_its_gradient_there():
    decoder = capsules.Decoder(J=3, D=4)
    v = torch.randn(2, 3, 4, requires_grad=True)
    decoder(v, torch.tensor([0, 2])).sum().backward()
    changed = v.grad.abs().sum(dim=2) > 0  # [B, J]
    assert changed.tolist() == [[True, False, False], [False, False, True]]


@both_networks
def test_a_decoder_leaves_the_rest_of_the_network_as_it_is(network):
    torch.manual_seed(1)
    plain_network = network().state_dict()
    torch.manual_seed(1)
    with_decoder = network(reconstruction=0.392).state_dict()
    added = with_decoder.keys() - plain_network.keys()
    assert len(added) == 6
    assert all(name.startswith("decoder.") for name in added)
    for name, weight in plain_network.items():
        assert torch.equal(weight, with_decoder[name]), name


# -- The two networks ------------------------------------------------------------------------------


# A multiply-add counts as 2 FLOPs.
ALEXCAPS_MULTIPLY_ADDS = (
    5 * 5 * 1 * 64 * 28**2  # convolutions
    + 5 * 5 * 64 * 192 * 13**2
    + 3 * 3 * 192 * 384 * 6**2
    + 3 * 3 * 384 * 256 * 6**2
    + 3 * 3 * 256 * 256 * 6**2
    + 256 * 256 * 2**2
    + 128 * 8 * 160  # votes
    + 2 * 10 * 128 * 16  # couplings times votes, in iterations 2 and 3
)


@pytest.mark.parametrize(
    ("network", "parameters", "flops", "n"),
    [
        (AlexCapsNet, 2_677_696, 2 * ALEXCAPS_MULTIPLY_ADDS, 128),
        (ResCapsNet, 2_022_240, 435_200_256, 1296),
    ],
)
def test_shapes_and_counts(network, parameters, flops, n, capsys):
    model = network()
    x = torch.randn(2, 1, network.side, network.side)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert evaluate.count_flops(model) == flops
    assert model.primary(model.features(x)).shape == (2, n, 8)
    assert model(x).shape == (2, 10, 16)
    capsules.print_shapes(model)
    printed = capsys.readouterr().out
    assert printed.count("[2, 10, 16]") == 1
    assert f"{parameters:,} parameters" in printed


@both_networks
@torch.no_grad()
def test_first_weights_let_training_start(network):
    """Primary capsules have lengths near 1. Digit capsules are below the margin m- = 0.1."""
    model = network()
    images, _ = data.load("digits", "", "test")
    x = data.images_to_input(images[:32], model)
    u = model.primary(model.features(x)).norm(dim=2)
    v = model(x).norm(dim=2)
    assert u.min() > 0.75
    assert 0.03 < v.mean() < 0.05  # with three seeds it was 0.032 to 0.043
    assert v.max() < 0.1


@both_networks
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(network):
    model = network().eval()
    x = torch.randn(2, 1, network.side, network.side)
    alone = torch.cat([model(image) for image in x.split(1)])
    torch.testing.assert_close(model(x), alone, rtol=1e-4, atol=1e-5)


@both_networks
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite(network, dtype):
    model = network(reconstruction=20.0)
    # At 0 all capsules are zero vectors. At 255, AlexCapsNet's capsules would overflow if
    # they were squared in float16.
    for scale in (0, 255):
        images = scale * torch.rand(1, 1, network.side, network.side)
        with torch.autocast("cpu", dtype):
            v = model(images)
            loss = model.loss(v, images, torch.tensor([1]))
            assert model.scores(v.to(dtype)).dtype == torch.float32
            assert model.decoder(v, torch.tensor([1])).dtype == torch.float32
        loss.backward()
        assert torch.isfinite(v).all()
        assert loss.isfinite()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_routing_leaves_half_precision():
    """Votes are computed in bfloat16, and all the rest as if autocast were off."""
    layer = capsules.DigitCapsules(20, 8)
    u = torch.randn(3, 20, 8)
    with torch.autocast("cpu", torch.bfloat16):
        v = layer(u)
        votes = torch.bmm(u.transpose(0, 1), layer.weight)  # [N, B, J*D]
    assert votes.dtype == torch.bfloat16
    votes = votes.unflatten(2, (10, 16)).permute(1, 2, 0, 3)  # [B, J, N, D]
    torch.testing.assert_close(v, capsules.dynamic_routing(votes)[0], rtol=1e-5, atol=1e-6)


# -- Helpers for real processes --------------------------------------------------------------------


PATIENCE = 1200  # seconds after which a process counts as hung, also on a very busy machine
ALEX = ("--model", "alexcaps", "--dataset", "digits")
SMALL = (*ALEX, "--train-size", 96, "--batch-size", 16)  # 6 steps an epoch
CLOSED_PORT = "http://127.0.0.1:9"
OFFLINE = {"http_proxy": CLOSED_PORT, "https_proxy": CLOSED_PORT, "no_proxy": ""}
STARTED = []  # the processes that tests have started in the background


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left():
    """A test that fails may leave a process behind. torchrun ends its ranks if it is asked."""
    yield
    for process in STARTED:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def environment(variables):
    """The environment of a process: ours, with these variables."""
    return os.environ | {"PYTHONPATH": str(HERE)} | variables


def run_python(*arguments, start=False, timeout=PATIENCE, cwd=HERE, **variables):
    """Run a script of the repository as a user does, and return the finished process.

    With `start`, return the running process. `variables` are those of its environment.
    """
    command = [sys.executable, *map(str, arguments)]
    options = {"cwd": cwd, "text": True, "env": environment(variables)}
    if start:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, **pipes, **options)
        STARTED.append(process)
        return process
    return subprocess.run(command, capture_output=True, timeout=timeout, check=False, **options)


def torchrun(*arguments, launcher=(), **more):
    """A real torchrun job of two processes; the script may be `-c CODE`."""
    options = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    # Not every machine can resolve its own name.
    options += ["--local-addr=127.0.0.1", *launcher]
    if arguments[0] == "-c":
        options += ["--no-python", sys.executable]
    return run_python(*options, *arguments, **more)


def call(script, *arguments):
    """Run a script's main in this process -> (exit code, stdout, stderr)."""
    output = io.StringIO()
    error = io.StringIO()
    code = 0
    handler = signal.getsignal(signal.SIGINT)
    with (
        mock.patch.object(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)]),
        mock.patch.object(train_single, "keep_freed_memory"),  # it cannot be undone
        mock.patch.object(evaluate, "ROTATED", 1),  # digits of a class: quick
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(error),
    ):
        try:
            train_single.run_main(script.main)
        except SystemExit as end:
            code = end.code or 0
        finally:
            signal.signal(signal.SIGINT, handler)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return code, output.getvalue(), error.getvalue()


single = functools.partial(call, train_single)
ddp = functools.partial(call, train_ddp)
evaluated = functools.partial(call, evaluate)


def output_of(result):
    """What a command printed that `call` ran and that must succeed."""
    code, printed, error = result
    assert code == 0, error
    return printed


def assert_one_line(result, *words):
    """Check what `call` returns for a user's mistake: exit code 2 and one error line.

    The line must contain the words.
    """
    code, _, error = result
    assert code == 2, error
    assert len(error.strip().splitlines()) == 1, error
    assert "error: " in error, error
    for word in words:
        assert word in error, error


def new_run(device=CPU, **settings):
    """A new run, which is not in any folder yet."""
    config = train_single.DEFAULTS | settings
    return train_single.Run(config, Path("unused"), device)


def weights(run_dir, name="last.pt"):
    return torch.load(Path(run_dir) / name, weights_only=True)["model"]


def assert_same_run(one, other):
    """Two runs have equal weights, bit for bit, and equal figures except for the times."""
    for name in ("last.pt", "best.pt"):
        first = torch.load(one / name, weights_only=True)
        second = torch.load(other / name, weights_only=True)
        for row in (*first["history"], *second["history"]):
            row["seconds"] = 0
        assert first["history"] == second["history"], name
        assert first["model"].keys() == second["model"].keys(), name
        for layer, tensor in first["model"].items():
            assert torch.equal(tensor, second["model"][layer]), (name, layer)


def change_checkpoint(run, change):
    """Load last.pt, let change(checkpoint) act on it, and save it again."""
    checkpoint = torch.load(run / "last.pt")
    change(checkpoint)
    torch.save(checkpoint, run / "last.pt")


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# -- Data ------------------------------------------------------------------------------------------


def net_of(side):
    """All that images_to_input needs to know about a network."""
    return types.SimpleNamespace(side=side, mean=0.0, std=1.0)


def test_rotation_is_torchvisions_and_each_image_has_its_own_angle():
    images, _ = data.load("digits", "", "train")
    degrees = torch.tensor([-90.0, -33.0, 0.0, 7.5, 60.0])
    net = net_of(side=28)
    ours = data.images_to_input(images[:5], net, degrees)
    for i in range(5):
        x = images[i].view(1, 1, 28, 28).float() / 255
        theirs = rotate(x, degrees[i].item(), InterpolationMode.BILINEAR)
        assert (ours[i] - theirs[0]).abs().max() < 0.02
    other_way = data.images_to_input(images[1:2], net, -degrees[1:2])
    assert (ours[1] - other_way[0]).abs().max() > 0.3


def test_images_must_be_uint8():
    with pytest.raises(TypeError, match="uint8"):
        data.images_to_input(torch.rand(2, 28, 28), net_of(side=28))


@pytest.mark.parametrize("side", [28, 78])
def test_a_shift_moves_right_and_down_before_the_rotation(side):
    net = net_of(side)
    images = torch.zeros(3, 28, 28, dtype=torch.uint8)
    images[:, 6:-6, 6:-6] = torch.randint(256, (3, 16, 16))  # far from the edges
    shifts = torch.tensor([[2.0, -3.0], [0.0, 0.0], [-1.0, 4.0]])
    rolled = []
    for image, (x, y) in zip(images, shifts.int().tolist(), strict=True):
        rolled.append(image.roll((y, x), (0, 1)))  # rows down, columns to the right
    moved = torch.stack(rolled)
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-4)
    shifted = data.images_to_input(images, net, shifts=shifts)
    close(shifted, data.images_to_input(moved, net))
    degrees = torch.tensor([30.0, -20.0, 75.0])
    turned = data.images_to_input(images, net, degrees, shifts)
    close(turned, data.images_to_input(moved, net, degrees))


def test_resize_is_bilinear():
    images, _ = data.load("digits", "", "train")
    ours = data.images_to_input(images[:3], ResCapsNet)
    x = F.interpolate(images[:3].unsqueeze(1).float() / 255, (78, 78), mode="bilinear")
    x = (x - ResCapsNet.mean) / ResCapsNet.std
    ours = ours[:, :, 2:-2, 2:-2]  # edges blend with black
    x = x[:, :, 2:-2, 2:-2]
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_corners_that_turn_into_the_picture_are_black():
    white = torch.full((1, 28, 28), 255, dtype=torch.uint8)
    turned = data.images_to_input(white, AlexCapsNet, torch.tensor([45.0]))
    assert turned[0, 0, 0, 0] == pytest.approx(-AlexCapsNet.mean / AlexCapsNet.std)


def test_parts_are_disjoint_stable_and_stratified():
    names = ("train", "validation", "test")
    parts = {name: data.load("digits", "", name) for name in names}
    assert [len(labels) for _, labels in parts.values()] == [1237, 200, 360]
    seen = set()
    for images, _ in parts.values():
        seen.update(image.numpy().tobytes() for image in images)
    assert len(seen) == 1797  # every digit is in exactly one part
    _, labels = parts["test"]
    assert labels.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    torch.manual_seed(99)  # a run's seed changes nothing
    images, _ = data.load("digits", "", "validation")
    assert torch.equal(images, parts["validation"][0])


def test_angles_and_shifts_fill_their_ranges():
    images, labels = data.load("digits", "", "train")
    dataset = data.DigitDataset(images, labels, AlexCapsNet, "cpu", rotate=10, shift=2)
    dataset.set_epoch(0, 1)
    first = torch.cat([dataset.degrees.unsqueeze(1), dataset.shifts], dim=1)  # [n, 3]
    for drawn, limit in zip(first.T, (10, 2, 2), strict=True):
        assert drawn.abs().max() <= limit
        assert drawn.min() < -0.9 * limit
        assert drawn.max() > 0.9 * limit
    correlation = first.T.corrcoef()  # of angle, shift right and shift down
    torch.testing.assert_close(correlation, torch.eye(3), rtol=0, atol=0.1)


def epoch_of_ddp(run, dataset):
    """An epoch of train_ddp.py in this process, without other ranks."""
    with mock.patch.object(train_ddp, "summed", torch.clone):
        return train_ddp.train_one_epoch(run, run.model, dataset)


def test_order_angles_and_shifts_depend_on_seed_and_epoch(monkeypatch):
    """All four pairs (seed, epoch) differ, and both scripts draw the same."""
    orders = []
    real = data.DigitDataset.__getitems__

    def read(dataset, indices):
        orders.append(tuple(indices))
        return real(dataset, indices)

    monkeypatch.setattr(data.DigitDataset, "__getitems__", read)
    drawn = []
    for seed, epochs_done in itertools.product((0, 1), (0, 1)):
        settings = {"dataset": "digits", "train_size": 24, "batch_size": 24, "shift": 2.0}
        run = new_run(model="alexcaps", seed=seed, **settings)
        run.history = epochs_done * [{}]
        for train in (train_single.train_one_epoch, epoch_of_ddp):
            train_set, _ = train_single.make_datasets(run.config, CPU)
            train(run, train_set)
            draws = torch.cat([train_set.degrees.unsqueeze(1), train_set.shifts], dim=1)
            drawn.append(tuple(draws.flatten().tolist()))
    for found in (orders, drawn):
        assert found[0::2] == found[1::2]  # train_single.py's and train_ddp.py's
        assert len(set(found)) == 4
    assert sorted(orders[0]) == list(range(24))


def test_augmentation_is_not_forgotten():
    images, labels = data.load("digits", "", "train")
    dataset = data.DigitDataset(images, labels, AlexCapsNet, "cpu", rotate=10)
    with pytest.raises(RuntimeError, match="set_epoch"):
        dataset.__getitems__([0, 1])


def test_weights_depend_on_the_seed():
    first = new_run(model="alexcaps", seed=0).model.digits.weight
    again = new_run(model="alexcaps", seed=0).model.digits.weight
    other = new_run(model="alexcaps", seed=1).model.digits.weight
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """tmp_path/MNIST/raw with random images in MNIST's files.

    Their checksums replace those of MNIST.
    """
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in data.MNIST_MD5:
        n = 100 if "t10k" in name else 5200
        if "images" in name:
            header = struct.pack(">4i", 2051, n, 28, 28)
            numbers = torch.randint(256, (n, 28, 28), dtype=torch.uint8)
        else:
            header = struct.pack(">2i", 2049, n)
            numbers = torch.randint(10, (n,), dtype=torch.uint8)
        (raw / name).write_bytes(header + numbers.numpy().tobytes())
        checksum = hashlib.md5((raw / name).read_bytes()).hexdigest()
        monkeypatch.setitem(data.MNIST_MD5, name, checksum)
    return raw


def pack(path, bytes_kept=None):
    packed = gzip.compress(path.read_bytes(), 1)
    path.with_name(f"{path.name}.gz").write_bytes(packed[:bytes_kept])
    path.unlink()


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def flip_a_bit(path):
    path.write_bytes(flipped(path.read_bytes()))


def test_mnist_is_read_and_split(raw, tmp_path):
    assert data.resolve_dataset("auto", tmp_path) == ("mnist", "")
    names = ("train", "validation", "test")
    parts = {name: data.load("mnist", tmp_path, name) for name in names}
    assert [len(labels) for _, labels in parts.values()] == [200, 5000, 100]
    images, labels = parts["test"]
    content = (raw / "t10k-images-idx3-ubyte").read_bytes()
    assert images.numpy().tobytes() == content[16:]
    content = (raw / "t10k-labels-idx1-ubyte").read_bytes()
    assert labels.byte().numpy().tobytes() == content[8:]
    flip_a_bit(raw / "train-labels-idx1-ubyte")  # a file damaged later is refused, too
    with pytest.raises(data.UserError, match="not a file of MNIST"):
        data.load("mnist", tmp_path, "train")
    for path in raw.glob("t10k*ubyte"):  # compressed files work, too
        pack(path)
    assert torch.equal(data.load("mnist", tmp_path, "test")[0], images)


@pytest.mark.parametrize("choice", ["auto", "mnist"])
@pytest.mark.parametrize(
    "spoil", [flip_a_bit, lambda p: pack(p, 1000), lambda p: os.truncate(p, 9)]
)
def test_another_file_of_that_name_is_not_mnist(spoil, choice, raw, tmp_path):
    spoil(raw / "train-images-idx3-ubyte")
    flags = ("--dataset", choice, "--data-dir", tmp_path, "--run-dir", tmp_path / "run")
    result = single("--model", "alexcaps", *flags)
    words = ("train-images-idx3-ubyte", "is not a file of MNIST", "--data-dir")
    assert_one_line(result, *words)
    assert not (tmp_path / "run").exists()


@contextlib.contextmanager
def mirrors(monkeypatch, *handlers):
    """Small servers stand in for the mirrors of MNIST, after one that does not answer."""
    monkeypatch.setenv("no_proxy", "*")
    urls = [f"{CLOSED_PORT}/"]
    with contextlib.ExitStack() as stack:
        for handler in handlers:
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
            stack.enter_context(server)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            urls.append(f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setattr(MNIST, "mirrors", urls)
        yield


class Mirror(http.server.BaseHTTPRequestHandler):
    """Sends `piece` again and again, with pauses, until the client hangs up."""

    piece = b""
    pause = 0.0  # seconds

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            while True:
                self.wfile.write(self.piece)
                time.sleep(self.pause)

    def log_message(self, *_):
        pass


class WrongFile(Mirror):
    """Sends five bytes instead of any file."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"wrong")


def test_download_from_a_mirror(raw, tmp_path, monkeypatch):
    """The first mirror does not answer, the second has a wrong file, the third is right."""
    for name in data.MNIST_MD5:
        pack(raw / name)
    checksums = []
    for file in raw.glob("*.gz"):
        checksums.append((file.name, hashlib.md5(file.read_bytes()).hexdigest()))
    monkeypatch.setattr(MNIST, "resources", checksums)
    files = functools.partial(http.server.SimpleHTTPRequestHandler, directory=raw)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with mirrors(monkeypatch, WrongFile, files):
        assert data.resolve_dataset("mnist", tmp_path / "new") == ("mnist", "")
    assert len(data.load("mnist", tmp_path / "new", "test")[1]) == 100
    found = {path.name for path in (tmp_path / "new" / "MNIST" / "raw").iterdir()}
    assert found == {*data.MNIST_MD5}  # no leftovers


def test_a_wrong_file_from_every_mirror(tmp_path, monkeypatch):
    with mirrors(monkeypatch, WrongFile):
        name, reason = data.resolve_dataset("auto", tmp_path)
    assert name == "digits"
    assert "it sent a wrong or incomplete file" in reason
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_part_of_a_download(raw, tmp_path, monkeypatch):
    contents_of = {}
    for name in data.MNIST_MD5:
        contents_of[f"{name}.gz"] = gzip.compress((raw / name).read_bytes(), 1)

    def full(path, content):
        path.open("wb").write(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data, "download_from_mirrors", lambda _, name, *more: contents_of[name])
    monkeypatch.setattr(Path, "write_bytes", full)
    name, reason = data.resolve_dataset("auto", tmp_path / "new")
    assert name == "digits"
    assert "No space left" in reason
    assert list((tmp_path / "new" / "MNIST" / "raw").iterdir()) == []


def test_a_silent_network_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SILENCE_SECONDS", 0.3)
    monkeypatch.setenv("no_proxy", "*")
    # This server accepts connections, but never answers.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mirror = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(MNIST, "mirrors", [mirror])
        name, reason = data.resolve_dataset("auto", tmp_path)
    assert name == "digits"
    assert "timed out" in reason
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("piece", "pause", "seconds", "word"),
    [
        (bytes(100_000), 0, 300, "more than 10,000,000 bytes"),
        (b"x", 0.05, 0.5, "not complete after 0.5 s"),
    ],
    ids=["endless", "a byte at a time"],
)
def test_a_mirror_that_never_ends_is_given_up(piece, pause, seconds, word, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DOWNLOAD_SECONDS", seconds)
    monkeypatch.setattr(Mirror, "piece", piece)
    monkeypatch.setattr(Mirror, "pause", pause)
    with mirrors(monkeypatch, Mirror):
        name, reason = data.resolve_dataset("auto", tmp_path)
    assert name == "digits"
    assert word in reason
    assert list(tmp_path.iterdir()) == []


def test_one_missing_file_is_enough_to_need_a_download(raw, tmp_path, monkeypatch):
    (raw / "t10k-labels-idx1-ubyte").unlink()
    asked = mock.Mock()
    monkeypatch.setattr(data, "download_mnist", asked)
    assert data.resolve_dataset("mnist", tmp_path) == ("mnist", "")
    assert asked.call_count == 1


# -- train_single.py -------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["alexcaps", "rescaps"])
def test_dry_run(model, tmp_path, monkeypatch):
    """It does one step of everything, and replaces only an earlier dry run."""
    monkeypatch.chdir(tmp_path)
    usual = Path("runs", f"{model}-single-digits", "last.pt")
    dry = Path("runs/dry-run/last.pt")
    for file in (usual, dry):
        file.parent.mkdir(parents=True)
        file.write_text("a run")
    code, printed, error = single("--model", model, "--dataset", "digits", "--dry-run")
    assert (code, error) == (0, "")
    assert "test it: python evaluate.py runs/dry-run" in printed
    checkpoint = torch.load(dry)
    assert checkpoint["config"]["train_images"] == 32
    assert len(checkpoint["history"]) == 1
    assert checkpoint["optimizer"]["state"][0]["step"] == 1
    assert usual.read_text() == "a run"


def test_offline_first_run(tmp_path):
    """Without internet and data it trains on digits.

    The first, the third and the last line say so, and so does the folder's name.
    """
    data_dir = ("--data-dir", tmp_path / "data")
    short = ("--train-size", 64, "--epochs", 1, "--seed", 3)
    train = (HERE / "train_single.py", "--model", "alexcaps", *data_dir, *short)
    process = run_python(*train, cwd=tmp_path, **OFFLINE)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    lines = process.stdout.splitlines()
    assert "MNIST is not available" in lines[0]
    assert "1,797 small digits, not MNIST" in lines[2]
    assert "not MNIST" in lines[-1]
    epoch = next(line for line in lines if line.startswith("epoch"))
    figures = r"loss 0\.\d{4} acc [\d.]{5}"
    form = rf"epoch  1/1 \| train {figures} \| val {figures} \| \d+ s \*"
    assert re.fullmatch(form, epoch)
    assert len(epoch) <= 80
    run = tmp_path / "runs" / "alexcaps-single-digits-seed3"
    found = {p.name for p in run.iterdir()} - {".lock"}
    assert found == {"last.pt", "best.pt", "metrics.csv", "config.json"}


def test_digits_do_not_replace_mnist_if_mnist_is_wanted(tmp_path):
    with mock.patch.dict(os.environ, OFFLINE):
        result = single("--model", "alexcaps", "--dataset", "mnist", "--data-dir", tmp_path)
    words = ("lacks MNIST/raw/train-images", "download failed", "--dataset digits")
    assert_one_line(result, *words)


def test_a_run_on_mnist_is_trained_and_evaluated(raw, tmp_path, monkeypatch):
    """raw holds random images, of which 100 are test images."""
    monkeypatch.chdir(tmp_path)
    flags = ("--model", "alexcaps", "--train-size", 64, "--epochs", 1, "--data-dir", ".")
    printed = output_of(single(*flags))
    assert "NOTE" not in printed
    assert "64 images of mnist, 32 per step, learning rate 0.001" in printed
    run = Path("runs/alexcaps-single")
    output_of(evaluated(run))
    assert json.loads((run / "report.json").read_text())["test_images"] == 100


@pytest.mark.parametrize("script", [train_single, train_ddp, evaluate])
def test_help_is_the_docstring_and_the_flags(script):
    printed = output_of(call(script, "--help"))
    assert script.__doc__.splitlines()[0] in printed
    assert "--device" in printed


WRONG_VALUES = {
    "--epochs": "0 -1 1.5 nan",
    "--batch-size": "0 -4",
    "--seed": "-1",
    "--routing-iterations": "0 inf",
    "--lr": "0 -0.1 nan inf x",
    "--reconstruction": "-1 nan 101",
    "--rotate": "-1 nan 181",
    "--shift": "-1 nan",
    "--train-size": "0",
    "--device": "cuda:77 toaster meta mps xpu",
    "--model": "vgg",
    "--dataset": "cifar",
}
WRONG_FLAGS = [f"{flag}={value}" for flag in WRONG_VALUES for value in WRONG_VALUES[flag].split()]
WRONG_FLAGS += ["--compil", "--run-dir=", "--data-dir="]


@pytest.mark.parametrize("flag", WRONG_FLAGS)
def test_a_wrong_flag_is_one_line_and_writes_nothing(flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, _, value = flag.partition("=")
    assert_one_line(single(*ALEX, flag), name, value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "--model is missing"),
        ((*ALEX, "--dry-run", "--epochs", 3), "--epochs cannot be used with --dry-run"),
        ((*ALEX, "--dry-run", "--train-size", 5), "--train-size cannot be used with --dry-run"),
    ],
)
def test_flags_that_do_not_fit_together_are_one_line(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_line(single(*flags), words)
    assert list(tmp_path.iterdir()) == []


def test_settings_reach_network_optimizer_and_data(tmp_path):
    values = {"lr": 0.01, "routing_iterations": 2, "rotate": 7.0, "shift": 3.0, "batch_size": 8}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    folder = tmp_path / "run"
    output_of(single(*ALEX, *flags, "--dry-run", "--run-dir", folder))
    config = json.loads((folder / "config.json").read_text())
    assert config | values == config
    run = train_single.Run(config, folder, CPU)
    train_set, validation_set = train_single.make_datasets(config, CPU)
    assert run.model.digits.iterations == 2
    assert run.optimizer.param_groups[0]["lr"] == 0.01
    assert (train_set.rotate, train_set.shift, len(train_set)) == (7, 3, 8)
    assert (validation_set.rotate, validation_set.shift) == (0, 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two uninterrupted epochs of AlexCapsNet on 96 digits: a reference for others."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    output_of(single(*SMALL, "--epochs", 2, "--run-dir", run_dir))
    return run_dir


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run that a test may spoil."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


RUN_FILES = ("last.pt", "best.pt", "metrics.csv", "config.json", "report.json")


@pytest.mark.parametrize("name", RUN_FILES)
def test_one_file_of_a_run_protects_its_folder(name, tmp_path):
    """An archived run has no last.pt, for example."""
    (tmp_path / name).write_text("of a run")
    result = single(*SMALL, "--run-dir", tmp_path)
    assert_one_line(result, "holds a run", "--overwrite", "--resume")
    assert (tmp_path / name).read_text() == "of a run"


def test_a_run_is_replaced_if_asked(copy):
    (copy / "report.json").write_text("a report")
    output_of(single(*SMALL, "--epochs", 1, "--run-dir", copy, "--overwrite"))
    assert len(torch.load(copy / "last.pt")["history"]) == 1
    assert not (copy / "report.json").exists()


def test_a_file_is_on_the_disk_before_it_replaces_another(tmp_path, monkeypatch):
    """After a power failure, a file has its old or its new content."""
    file = tmp_path / "file"
    file.write_bytes(b"old")
    done = []
    real = os.fsync

    def fsync(descriptor):
        done.append((file.read_bytes(), os.fstat(descriptor).st_size))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    train_single.write_file(file, b"newer")
    assert done == [(b"old", 5)]
    assert file.read_bytes() == b"newer"


@pytest.mark.parametrize("new", [False, True], ids=["goes on", "is to be replaced"])
def test_a_disk_that_refuses_loses_nothing(new, copy):
    before = contents(copy)
    flags = ("--resume", copy, "--epochs", 3)
    if new:
        flags = (*SMALL, "--run-dir", copy, "--overwrite")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, limits[1]))  # bytes in a file
    try:
        assert_one_line(single(*flags), "cannot write", ".pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(copy) == before


def test_two_runs_in_one_folder(copy):
    """The second is refused as long as the first one holds the folder."""
    before = contents(copy)
    first = train_single.FolderLock(copy)
    words = ("another training run is writing", "wait for it")
    for flags in (("--resume", copy), (*SMALL, "--run-dir", copy, "--overwrite")):
        assert_one_line(single(*flags), *words)
    assert contents(copy) == before
    first.file_lock.release()  # as the kernel does when a process ends
    output_of(single("--resume", copy))


class AnyCode:
    """Loading its pickle ends the program with exit code 7."""

    def __reduce__(self):
        return sys.exit, (7,)


def change_layers(run):
    layers = ResCapsNet().state_dict()
    change_checkpoint(run, lambda checkpoint: checkpoint.update(model=layers))


def change_settings(run, **settings):
    change_checkpoint(run, lambda checkpoint: checkpoint["config"].update(settings))


# {damage: (how a run is damaged, what the error line must say)}
DAMAGE = {
    "no last.pt": (lambda run: (run / "last.pt").unlink(), "there is no run in"),
    "half": (lambda run: os.truncate(run / "last.pt", 10_000), "last.pt is damaged"),
    "a flipped bit": (lambda run: flip_a_bit(run / "last.pt"), "last.pt is damaged"),
    "any code": (lambda run: torch.save(AnyCode(), run / "last.pt"), "last.pt is damaged"),
    "foreign": (lambda run: torch.save({"a": 1}, run / "last.pt"), "last.pt is not a checkpoint"),
    "other layers": (change_layers, "not a checkpoint of this network"),
    "a decoder in the settings, but no weights": (
        lambda run: change_settings(run, reconstruction=20.0),
        "not a checkpoint of this network",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused(damage, copy):
    spoil, words = DAMAGE[damage]
    spoil(copy)
    before = contents(copy)
    assert_one_line(single("--resume", copy), words)
    assert contents(copy) == before  # nothing is lost, nothing is added


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--lr=0.01", "--lr cannot be used with --resume"),
        ("--overwrite", "--overwrite cannot be used"),
        ("--epochs=1", "--epochs is less than the 2"),
    ],
)
def test_a_resumed_run_keeps_what_it_began_with(flag, words, copy):
    before = contents(copy)
    assert_one_line(single("--resume", copy, flag), words)
    assert contents(copy) == before


def test_last_pt_is_enough_to_resume(copy, finished):
    """The run is finished, so only its files are written again."""
    for name in ("metrics.csv", "config.json", "best.pt"):
        (copy / name).unlink()
    output_of(single("--resume", copy))
    for name in ("metrics.csv", "config.json"):
        assert (copy / name).read_text() == (finished / name).read_text()


def test_a_resumed_run_may_change_a_few_settings(copy, finished, monkeypatch):
    """More epochs, compiled. To save half a minute, the compiler only traces the network."""
    traced = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    monkeypatch.setenv("CXX", sys.executable)  # it stands in for a compiler
    flags = ("--epochs", 3, "--data-dir", "elsewhere", "--compile")
    assert "epochs done: 2" in output_of(single("--resume", copy, *flags))
    assert weights(copy).keys() == weights(finished).keys()  # no "_orig_mod."
    config = json.loads((copy / "config.json").read_text())
    assert config["epochs"] == 3
    assert config["data_dir"] == "elsewhere"
    assert config["lr"] == 1e-3
    with open(copy / "metrics.csv", newline="") as file:
        rates = [row["lr"] for row in csv.DictReader(file)]
    assert rates == ["0.001", "0.001", "0.0007"]


def test_compiling_without_a_compiler_is_one_line(copy, monkeypatch):
    """The run stays, and can go on uncompiled."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    before = contents(copy)
    result = single("--resume", copy, "--epochs", 3, "--compile")
    assert_one_line(result, "needs a C++ compiler, no-such-compiler", "--no-compile")
    assert contents(copy) == before
    change_settings(copy, compile=True)
    assert_one_line(single("--resume", copy), "needs a C++ compiler")
    output_of(single("--resume", copy, "--no-compile"))


@pytest.mark.parametrize("names", [["gcc", "clang"], ["clang"], []])
def test_compiling_on_a_gpu_needs_a_c_compiler(names, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: name if name in names else None)
    gpu = torch.device("cuda")
    if names:
        train_single.check_compiler(gpu)
    else:
        with pytest.raises(data.UserError, match="needs a C compiler, gcc"):
            train_single.check_compiler(gpu)


def test_a_run_of_an_older_version_goes_on(copy):
    """Its settings lack what newer versions added."""

    def forget(checkpoint):
        for name in ("reconstruction", "sync_bn"):
            del checkpoint["config"][name]

    change_checkpoint(copy, forget)
    output_of(single("--resume", copy, "--epochs", 3))
    assert torch.load(copy / "last.pt")["config"]["reconstruction"] == 0


def test_a_run_with_a_decoder_resumes_bit_for_bit(with_decoder, tmp_path):
    """with_decoder has one epoch."""
    flags = (*SMALL, "--reconstruction", 20, "--run-dir")
    output_of(single(*flags, tmp_path / "whole", "--epochs", 2))
    broken = Path(shutil.copytree(with_decoder, tmp_path / "broken"))
    output_of(single("--resume", broken, "--epochs", 2))
    assert_same_run(tmp_path / "whole", broken)
    assert "decoder.layers.0.weight" in weights(tmp_path / "whole")
    change_settings(tmp_path / "whole", reconstruction=0.0)
    result = single("--resume", tmp_path / "whole")
    assert_one_line(result, "not a checkpoint of this network")


def act_during_training(action, monkeypatch):
    """Let action() happen after the run has locked its folder, before it saves an epoch."""
    validate = train_single.validate

    def validate_after_action(*arguments):
        action()
        return validate(*arguments)

    monkeypatch.setattr(train_single, "validate", validate_after_action)


@pytest.mark.parametrize("what", ["moved", "removed"])
def test_a_run_that_lost_its_folder_stops(what, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def act():
        if what == "moved":
            folder.rename(tmp_path / "elsewhere")
        else:
            shutil.rmtree(folder)

    act_during_training(act, monkeypatch)
    result = single(*SMALL, "--epochs", 1, "--run-dir", folder)
    assert_one_line(result, f"{folder} was moved or removed")
    assert not folder.exists()


def test_a_run_does_not_write_into_a_new_run_of_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    before = {}

    def begin_another():
        folder.rename(tmp_path / "elsewhere")
        stranger = new_run(model="alexcaps")
        stranger.folder = folder
        stranger.lock = train_single.FolderLock(folder)
        stranger.save()
        before.update(contents(folder))

    act_during_training(begin_another, monkeypatch)
    result = single(*SMALL, "--epochs", 1, "--run-dir", folder)
    assert_one_line(result, f"{folder} was moved or removed")
    assert before
    assert contents(folder) == before


@pytest.mark.parametrize("error_number", [errno.ENOLCK, errno.ENOSYS])
def test_disks_without_locks_are_refused_in_one_line(error_number, tmp_path, monkeypatch):
    """After ENOSYS, filelock would use a marker file if it might. kill -9 leaves it behind."""
    reason = os.strerror(error_number)

    def refuse(*_):
        raise OSError(error_number, reason)

    monkeypatch.setattr("fcntl.flock", refuse)
    result = single(*SMALL, "--run-dir", tmp_path / "run")
    assert_one_line(result, "cannot be locked", reason, "another disk")


# Each wrapper breaks a script from outside: the scripts have no hooks for tests.
IN_EPOCH_2 = """
import os, signal
import capsules, train_single
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
real = capsules.margin_loss
calls = []
def margin_loss(*arguments):
    calls.append(1)
    if len(calls) == 11:  # 6 training steps and 1 validation batch, then the 4th step of epoch 2
        os.kill(os.getpid(), signal.SIGINT)
    return real(*arguments)
capsules.margin_loss = margin_loss
train_single.run_main(train_single.main)
"""
IN_WRITE = """
import os, signal
import train_single
real = os.replace
calls = []
def replace(source, target):
    if target.name == "FILE":
        calls.append(1)
        if len(calls) == COUNT:
            os.truncate(source, 1000)  # as if only this much had reached the disk
            os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
os.replace = replace
train_single.run_main(train_single.main)
"""


def killed_in_write(file, count):
    """The script dies when it has written the file for the count-th time, before the rename."""
    return IN_WRITE.replace("FILE", file).replace("COUNT", str(count))


STOPS = {  # name: (wrapper, exit code, finished epochs)
    "ctrl c": (IN_EPOCH_2, 130, 1),
    # All files but best.pt are written before epoch 1, after epoch 1 and after epoch 2.
    "kill in write": (killed_in_write("last.pt", 3), -signal.SIGKILL, 1),
    # Epoch 1 is the best so far. best.pt is written again when the run is resumed.
    "kill before best.pt": (killed_in_write("best.pt", 1), -signal.SIGKILL, 1),
    "kill before config": (killed_in_write("config.json", 1), -signal.SIGKILL, 0),
    "kill after last.pt": (killed_in_write("metrics.csv", 3), -signal.SIGKILL, 2),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """(folder, exit code, errors) of each of the STOPS; they run side by side."""
    folder = tmp_path_factory.mktemp("stopped")
    jobs = {}
    for name, (wrapper, _, _) in STOPS.items():
        command = ("-c", wrapper, *SMALL, "--epochs", 2, "--run-dir", folder / name)
        # Threads that wait leave the cores to the other jobs.
        jobs[name] = run_python(*command, start=True, OMP_WAIT_POLICY="PASSIVE")
    results = {}
    for name, job in jobs.items():
        _, errors = job.communicate(timeout=PATIENCE)
        results[name] = (folder / name, job.returncode, errors)
    return results


@pytest.mark.parametrize("name", STOPS)
def test_any_stop_resumes_bit_for_bit(name, stopped, finished):
    run_dir, code, error = stopped[name]
    _, expected_code, epochs = STOPS[name]
    assert code == expected_code, error
    if code > 0:
        # The name of the folder has a space, so the command quotes it.
        command = f"stopped; to continue: python train_single.py --resume '{run_dir}'"
        assert error.strip() == command
    assert len(torch.load(run_dir / "last.pt")["history"]) == epochs
    output_of(single("--resume", run_dir))
    assert_same_run(run_dir, finished)
    assert len((run_dir / "metrics.csv").read_text().splitlines()) == 1 + 2
    assert not list(run_dir.glob(".*.tmp"))


def in_a_shell(line, cwd, **variables):
    """Run a shell command that starts with `python`, which stands for the tests' Python."""
    line = line.replace("python", shlex.quote(sys.executable), 1)
    options = {"cwd": cwd, "text": True, "timeout": PATIENCE, "env": environment(variables)}
    return subprocess.run(["sh", "-c", line], capture_output=True, check=False, **options)


# The arguments of a run of one epoch, as one would type them
SHORT = shlex.join([str(HERE / "train_single.py"), *map(str, SMALL), "--epochs=1"])


def test_closed_streams_do_not_stop_a_run(tmp_path):
    done = in_a_shell(f"python {SHORT} --run-dir run >&- 2>&-", cwd=tmp_path)
    assert done.returncode == 0
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 2


def test_a_full_disk_behind_stdout_is_one_line(reported, tmp_path):
    """A comparison is printed at the very end, when Python empties its buffer."""
    if not Path("/dev/full").exists():
        pytest.skip("only Linux has /dev/full")
    run, _ = reported
    other = archived(run, tmp_path / "other", seed=1)
    line = f"python {HERE / 'evaluate.py'} {run} {other} --out out > /dev/full"
    # An empty value switches the buffer on, whatever the user has set.
    done = in_a_shell(line, cwd=tmp_path, PYTHONUNBUFFERED="")
    assert_one_line((done.returncode, done.stdout, done.stderr), "No space left")


def test_any_name_of_a_run_folder_works(tmp_path):
    """The name looks like a flag, and stdout cannot show it."""
    line = f"python {SHORT} --run-dir=-ä"
    trained = in_a_shell(line, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert trained.returncode == 0, trained.stderr
    assert "test it: python evaluate.py './-\\xe4'" in trained.stdout
    assert (tmp_path / "-ä" / "best.pt").exists()


def test_a_notebook_keeps_its_own_handler_of_interrupts(monkeypatch):
    """run_main puts the handler back, also after Ctrl-C, before it calls `leave`."""
    monkeypatch.setattr(train_single, "keep_freed_memory", lambda: None)
    handlers = []
    before = signal.getsignal(signal.SIGINT)

    def main():
        # as train_ddp.main sets a handler of its own
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    def note_handler(code):
        handlers.append(signal.getsignal(signal.SIGINT))

    leave = mock.Mock(side_effect=note_handler)
    train_single.run_main(main, leave=leave)
    leave.assert_called_once_with(130)
    assert handlers == [before]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate ..."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ..."),
    ],
)
def test_a_full_memory_is_one_line(error):
    script = mock.Mock(__name__="script")
    script.main.side_effect = error
    assert_one_line(call(script), "llocat", "--batch-size")


def test_a_bug_keeps_its_traceback():
    script = mock.Mock(__name__="script")
    script.main.side_effect = RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match="shapes"):
        call(script)


@pytest.mark.parametrize("train", [train_single.train_one_epoch, epoch_of_ddp])
def test_batchnorm_learns_in_every_epoch(train):
    """Validation switches it to its running statistics. The next epoch must switch it back."""
    run = new_run(model="rescaps", dataset="digits", train_size=4, batch_size=4)
    train_set, validation_set = train_single.make_datasets(run.config, CPU)
    norms = [m for m in run.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for _ in range(2):
        before = norms[0].running_mean.clone()
        train(run, train_set)
        trained = norms[0].running_mean.clone()
        assert not torch.equal(trained, before)
        train_single.validate(run.model, validation_set, indices=range(4))
        assert torch.equal(norms[0].running_mean, trained)


# In epoch 2, calls 8 to 13 of the loss are training steps, and call 14 is the validation.
BAD_LOSSES = [(9, math.nan), (13, math.inf), (14, math.nan)]


@pytest.mark.parametrize(("call_number", "value"), BAD_LOSSES)
def test_a_loss_that_is_not_finite_stops_the_run(call_number, value, tmp_path, monkeypatch):
    real = capsules.margin_loss
    calls = []

    def margin_loss(*arguments):
        calls.append(1)
        loss = real(*arguments)
        if len(calls) == call_number:
            loss = loss * value
        return loss

    monkeypatch.setattr(capsules, "margin_loss", margin_loss)
    result = single(*SMALL, "--epochs", 2, "--run-dir", tmp_path)
    assert_one_line(result, f"the loss is {value}", "--lr", "--precision bf16")
    assert len(torch.load(tmp_path / "last.pt")["history"]) == 1
    assert len(calls) == max(call_number, 13)  # after bad training there is no validation


def test_best_is_the_earliest_of_equal_epochs():
    run = new_run(model="alexcaps")
    trained = torch.tensor([50.0, 1, 2])  # loss, hits, images
    for hits in (90, 95, 95, 94):
        run.optimizer.step()  # otherwise the scheduler warns
        run.finish_epoch(trained, torch.tensor([5.0, hits, 100]), 1.234)
    assert run.best["epoch"] == 2
    assert run.best is run.history[1]
    assert [row["lr"] for row in run.history] == [1e-3, 1e-3, 7e-4, 7e-4]
    assert run.history[0] == {
        "epoch": 1,
        "train_loss": 25.0,
        "train_accuracy": 50.0,
        "val_loss": 0.05,
        "val_accuracy": 90.0,
        "lr": 1e-3,
        "seconds": 1.23,
    }


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_moves_with_every_step_and_its_figures_rarely(monkeypatch):
    """Train for 6 steps of 16 images on a terminal. Figures appear at steps 4 and 6."""
    monkeypatch.setattr(train_single, "SHOW_EVERY", 4)
    tqdm = functools.partial(train_single.tqdm, mininterval=0)
    monkeypatch.setattr(train_single, "tqdm", tqdm)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    images_so_far = []
    real = train_single.check_and_show

    def check_and_show(bar, sums):
        images_so_far.append(int(sums[2]))
        real(bar, sums)

    monkeypatch.setattr(train_single, "check_and_show", check_and_show)
    run = new_run(model="alexcaps", dataset="digits", train_size=96, batch_size=16)
    train_set, validation_set = train_single.make_datasets(run.config, CPU)
    train_single.train_one_epoch(run, train_set)
    for step in range(1, 7):
        assert f" {step}/6 [" in terminal.getvalue()
    assert "epoch 1/20" in terminal.getvalue()
    assert images_so_far == [64, 96]
    assert ", loss 0." in terminal.getvalue()
    train_single.validate(run.model, validation_set)
    assert "validation" in terminal.getvalue()


# -- A device without numbers: it finds CPU-GPU sync points without a GPU --------------------------


def test_only_check_and_show_reads_the_device(monkeypatch):
    """Tensors on "meta" have shapes but no numbers.

    So .item(), an `if`, a mask and most operations that mix "meta" with the CPU fail.
    Only uploads go unnoticed.
    """
    meta = torch.device("meta")
    reads = []
    downloads = []
    monkeypatch.setattr(torch, "autocast", mock.MagicMock())  # it does not know "meta"
    adam = torch.optim.Adam

    def unfused_adam(parameters, lr, fused):  # fused Adam does not know "meta"
        return adam(parameters, lr=lr)

    monkeypatch.setattr(torch.optim, "Adam", unfused_adam)
    real_tolist = torch.Tensor.tolist

    def tolist(x):
        if x.device != meta:  # for example the sampler's permutation
            return real_tolist(x)
        reads.append(x)
        return [1, 1, 1]

    def cpu(x):
        downloads.append(x)
        return torch.empty(x.shape)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(train_single, "VALIDATION_BATCH", 50)  # of 200 images: 4 steps
    settings = {"dataset": "digits", "train_size": 96, "batch_size": 16}
    run = new_run(meta, model="alexcaps", **settings)
    train_set, validation_set = train_single.make_datasets(run.config, meta)
    trained = train_single.train_one_epoch(run, train_set)
    validated = train_single.validate(run.model, validation_set)
    assert trained.device == meta
    assert validated.device == meta
    assert next(run.model.parameters()).device == meta
    assert len(reads) == 1  # after the last of 6 steps
    assert epoch_of_ddp(run, train_set).device == meta
    assert len(reads) == 2
    assert downloads == []
    images = torch.zeros(32, 28, 28, dtype=torch.uint8)
    monkeypatch.setattr(evaluate, "BATCH", 20)
    assert evaluate.predict(run.model, images, angle=10).device == CPU
    assert [x.shape for x in downloads] == [(32, 10)]  # once, for both batches


# -- train_ddp.py ----------------------------------------------------------------------------------

# What each of two ranks does for the tests of this part, in one job
WORKER = """
import sys
from pathlib import Path
import train_ddp, test_models
train_ddp.join()
test_models.train_cases(Path(sys.argv[1]))
test_models.train_in_bfloat16(Path(sys.argv[1]))
test_models.stop_all_if_one_has_nan()
test_models.tell_all_what_rank_1_found()
train_ddp.leave(0)
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The folder into which rank 0 of WORKER's job has saved its results."""
    folder = tmp_path_factory.mktemp("two-ranks")
    process = torchrun("-c", WORKER, folder)
    assert process.returncode == 0, process.stderr
    return folder


def few_digits(network):
    """51 held-out digits. The number is odd, so two ranks cannot share them evenly."""
    images, labels = data.load("digits", "", "validation")
    return data.DigitDataset(images[:51], labels[:51], network, CPU)


def digits_run(network, accumulation=1, batch_size=32, images=64, reconstruction=0.0):
    """A run with SGD and frozen BatchNorm, and its training set.

    The optimizer is SGD, because Adam divides gradients by their size: it would turn the
    rounding error of a zero gradient into a whole step. BatchNorm is frozen, because each
    rank's BatchNorm sees only its own half of a batch.
    """
    run = new_run(
        model=network,
        dataset="digits",
        train_size=images,
        accumulation_steps=accumulation,
        batch_size=batch_size,
        reconstruction=reconstruction,
    )
    # lr 1: in a step the parameters move by exactly minus their gradient
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=1.0)
    for module in run.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True: None  # it stays frozen
    train_set, _ = train_single.make_datasets(run.config, CPU)
    return run, train_set


# (network, accumulation steps, batch size per rank, images, reconstruction weight).
# Each case must equal one process with batch size 64. With 74 images, each rank has 37: two
# batches of 32 and 5, or batches of 16, 16 and 5, a group of two and then a group of one.
CASES = [
    ("alexcaps", 1, 32, 74, 0.0),
    ("rescaps", 1, 32, 64, 0.0),
    ("alexcaps", 2, 16, 74, 0.0),
    ("alexcaps", 2, 16, 64, 20.0),
]


def test_the_loss_scale_is_saved_and_changes_no_step(tmp_path):
    """On the CPU in float32, but with the scaler that float16 needs on a GPU.

    The scale of 1024 is doubled after each of 2 steps.
    """
    ends = []
    for enabled in (False, True):
        run, train_set = digits_run("alexcaps", batch_size=8, images=16)
        run.scaler = torch.amp.GradScaler("cpu", 1024, growth_interval=1, enabled=enabled)
        epoch_of_ddp(run, train_set)
        ends.append([p.detach() for p in run.model.parameters()])
    torch.testing.assert_close(ends[0], ends[1])
    assert run.scaler.get_scale() == 4096
    run.folder = tmp_path
    run.lock = train_single.FolderLock(tmp_path)
    run.save()
    resumed, _ = digits_run("alexcaps")
    resumed.folder = tmp_path
    resumed.scaler = torch.amp.GradScaler("cpu")
    resumed.load()
    assert resumed.scaler.get_scale() == 4096


def save_on_rank_0(value, file):
    if train_ddp.RANK == 0:
        torch.save(value, file)


def train_cases(folder):
    """Each rank: train and validate all CASES. Rank 0 saves what they end with."""
    results = []
    for case in CASES:
        run, train_set = digits_run(*case)
        ddp = train_ddp.wrap(run)
        ddp.no_sync = mock.Mock(wraps=ddp.no_sync)
        trained = train_ddp.train_one_epoch(run, ddp, train_set)
        without_exchange = ddp.no_sync.call_count
        validated = train_ddp.validate(run.model, few_digits(run.model))
        parameters = [p.detach() for p in run.model.parameters()]
        results.append((parameters, trained, validated, without_exchange))
    save_on_rank_0(results, folder / "cases.pt")


def test_two_ranks_equal_one_process(two_ranks):
    results = torch.load(two_ranks / "cases.pt")
    for case, result in zip(CASES, results, strict=True):
        parameters, trained, validated, without_exchange = result
        network, accumulation, _, images, reconstruction = case
        # At most one group has more than one batch.
        assert without_exchange == accumulation - 1, case
        run, train_set = digits_run(network, 1, 64, images, reconstruction)
        starts = [p.detach().clone() for p in run.model.parameters()]
        expected_trained = train_single.train_one_epoch(run, train_set)
        expected_validated = train_single.validate(run.model, few_digits(run.model))
        ends = [p.detach() for p in run.model.parameters()]
        for found, start, end in zip(parameters, starts, ends, strict=True):
            move = end - start  # minus the gradient, summed over the steps
            largest = move.abs().max().item()
            assert largest > 1e-5, case
            rounding = 1e-8  # of the parameters themselves
            atol = 1e-4 * largest + rounding
            torch.testing.assert_close(found - start, move, rtol=1e-4, atol=atol)
        for ours, theirs in ((trained, expected_trained), (validated, expected_validated)):
            assert ours[1:].tolist() == theirs[1:].tolist(), case
            assert ours[0].item() == pytest.approx(theirs[0].item(), abs=2e-4)


def train_in_bfloat16(folder):
    """Each rank: train and validate ResCapsNet.

    Rank 0 saves its weights, the sums of the validation, and the types that the primary
    capsules' convolution returned.
    BatchNorm is not frozen here, so its statistics differ between the ranks.
    """
    settings = {"dataset": "digits", "train_size": 128, "precision": "bf16"}
    run = new_run(model="rescaps", **settings)
    train_set, _ = train_single.make_datasets(run.config, CPU)
    dtypes = set()

    def note_dtype(module, inputs, output):
        dtypes.add(output.dtype)

    hook = run.model.primary.conv.register_forward_hook(note_dtype)
    train_ddp.train_one_epoch(run, train_ddp.wrap(run), train_set)
    hook.remove()
    validated = train_ddp.validate(run.model, few_digits(run.model))
    save_on_rank_0((run.model.state_dict(), validated, dtypes), folder / "bf16.pt")


def test_training_is_in_bfloat16_and_validation_is_rank_0s_in_float32(two_ranks):
    state, validated, dtypes = torch.load(two_ranks / "bf16.pt", weights_only=False)
    assert dtypes == {torch.bfloat16}
    model = ResCapsNet()
    model.load_state_dict(state)
    expected = train_single.validate(model, few_digits(model))
    assert validated[1:].tolist() == expected[1:].tolist()
    assert validated[2] == 51
    assert validated[0].item() == pytest.approx(expected[0].item(), abs=1e-4)


def stop_all_if_one_has_nan():
    """Each rank: if rank 1 has a loss of nan, both stop. (Otherwise the job would hang.)"""
    run, train_set = digits_run("alexcaps")
    wrapped = train_ddp.wrap(run)
    if train_ddp.RANK == 1:
        run.model.digits.weight.data.fill_(math.nan)
    with pytest.raises(data.UserError, match="the loss is nan"):
        train_ddp.train_one_epoch(run, wrapped, train_set)


def tell_all_what_rank_1_found():
    """Each rank: a mistake that only rank 1 finds is raised on both."""

    def work():
        if train_ddp.RANK == 1:
            raise data.UserError("there is no MNIST here")

    with pytest.raises(data.UserError, match="there is no MNIST here"):
        train_ddp.together(work)


TWO_RANKS = (*SMALL, "--precision", "fp32", "--epochs", 2)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Two epochs on two ranks (96 digits, 16 per rank: 3 steps an epoch).

    What the job printed is in the folder's file "printed".
    """
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    process = torchrun(HERE / "train_ddp.py", *TWO_RANKS, "--run-dir", run_dir)
    assert process.returncode == 0, process.stderr
    (run_dir / "printed").write_text(process.stdout)
    return run_dir


def test_rank_0_alone_prints(undisturbed):
    printed = (undisturbed / "printed").read_text()
    assert "AlexCapsNet in fp32, 2 processes, each on" in printed
    assert "96 images of digits, 32 per step" in printed
    for line in ("epochs done: 0", "epoch  1/2", "epoch  2/2", "test it: "):
        assert printed.count(line) == 1, line


# DEATHS has a pair (rank, moment) for each start of the job: in that start, this rank dies at
# this moment. A moment is the number of a call of the margin loss, or the name of a file: it is
# written, but not yet renamed. An epoch has 3 steps and 1 validation batch, so call 6 is in the
# second step of epoch 2.
DYING = """
import os, signal
import capsules, train_ddp
deaths = DEATHS
start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
calls = []
def die_at(moment):
    if start < len(deaths) and deaths[start] == (train_ddp.RANK, moment):
        os.kill(os.getpid(), signal.SIGKILL)
real_loss = capsules.margin_loss
def margin_loss(*arguments):
    calls.append(1)
    die_at(len(calls))
    return real_loss(*arguments)
capsules.margin_loss = margin_loss
real_replace = os.replace
def replace(source, target):
    die_at(os.path.basename(target))
    real_replace(source, target)
os.replace = replace
train_ddp.LOCAL_WORLD_SIZE = 2  # two agents with one rank each share this machine, too
train_ddp.train_single.run_main(train_ddp.main, train_ddp.LOCAL_RANK > 0, train_ddp.leave)
"""


def dying(*deaths):
    return DYING.replace("DEATHS", repr(deaths))


# {name: (the deaths, how many epochs were done at each start)}. A rank that dies in the first
# save has not printed its number of epochs yet.
RESTARTS = {
    # First rank 0 dies in its first save, after last.pt: the second start must resume this
    # run although --overwrite is not given. Then rank 1 dies in epoch 1, and in epoch 2.
    "a new folder": (((0, "metrics.csv"), (1, 2), (1, 6)), ["0", "0", "1"]),
    # Rank 0 dies before last.pt: the folder still holds a stranger's run, which the second
    # start must not resume. The third start must resume, although --overwrite is given.
    "a stranger's run": (((0, "last.pt"), (1, 6)), ["0", "1"]),
}


@pytest.fixture(scope="module")
def restarted(tmp_path_factory, finished):
    """Real jobs whose ranks die and are started again; they run side by side.

    {name: (folder, exit code, output, errors)}
    """
    folder = tmp_path_factory.mktemp("restarted")
    jobs = {}
    for name, (deaths, _) in RESTARTS.items():
        command = ["-c", dying(*deaths), *TWO_RANKS, "--run-dir", folder / name]
        if name == "a stranger's run":
            shutil.copytree(finished, folder / name)
            command.append("--overwrite")
        jobs[name] = torchrun(*command, launcher=["--max-restarts=3"], start=True)
    results = {}
    for name, job in jobs.items():
        printed, errors = job.communicate(timeout=PATIENCE)
        results[name] = (folder / name, job.returncode, printed, errors)
    return results


@pytest.mark.parametrize("name", RESTARTS)
def test_a_killed_rank_is_restarted_to_the_same_weights(name, restarted, undisturbed):
    run_dir, code, printed, errors = restarted[name]
    _, epochs_done = RESTARTS[name]
    assert code == 0, errors
    assert re.findall("epochs done: (.)", printed) == epochs_done
    assert_same_run(run_dir, undisturbed)


def test_a_dying_rank_ends_the_job(tmp_path):
    """The other rank must not wait for the dead one. Here its time limit is a day."""
    patient = "import datetime, train_ddp; train_ddp.TIMEOUT = datetime.timedelta(days=1)"
    script = ("-c", patient + dying((1, 2)), *SMALL, "--run-dir", tmp_path)
    job = torchrun(*script, start=True)
    _, errors = job.communicate(timeout=PATIENCE)
    assert job.returncode == 1
    assert "SIGKILL" in errors
    assert torch.load(tmp_path / "last.pt")["history"] == []


def test_ctrl_c_under_torchrun_says_how_to_continue(undisturbed, tmp_path):
    run_dir = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    command = ("train_ddp.py", "--resume", run_dir, "--epochs", 500)
    job = torchrun(*command, start=True)
    line = job.stdout.readline()
    while not line.startswith("epoch "):
        assert job.poll() is None
        line = job.stdout.readline()
    assert line.startswith("epoch  3/500")
    job.send_signal(signal.SIGINT)
    _, error = job.communicate(timeout=PATIENCE)
    assert job.returncode != 0
    expected = f"to continue: torchrun --nproc_per_node=2 train_ddp.py --resume {run_dir}"
    assert error.count(expected) == 1, error
    assert '/train_ddp.py", line' not in error, error
    assert len(torch.load(run_dir / "last.pt")["history"]) >= 3


@pytest.mark.parametrize(
    ("launched", "world_size", "local_world_size", "command"),
    [
        (False, 1, 1, "python train_ddp.py --resume run"),
        (True, 2, 2, "torchrun --nproc_per_node=2 train_ddp.py --resume run"),
        (True, 4, 2, "torchrun ... train_ddp.py --resume run"),  # on two machines
    ],
)
def test_the_command_to_continue(
    launched, world_size, local_world_size, command, monkeypatch, capsys
):
    monkeypatch.setattr(train_ddp, "LAUNCHED", launched)
    monkeypatch.setattr(train_ddp, "WORLD_SIZE", world_size)
    monkeypatch.setattr(train_ddp, "LOCAL_WORLD_SIZE", local_world_size)
    leave = mock.Mock()
    monkeypatch.setattr(train_ddp, "leave", leave)
    train_ddp.stop(mock.Mock(folder=Path("run")))
    assert capsys.readouterr().err == f"\nstopped; to continue: {command}\n"
    leave.assert_called_once_with(130)


def test_two_agents_are_two_machines(undisturbed, tmp_path):
    """Two torchrun agents with one rank each, as on two machines, meet over c10d.

    A rank dies in epoch 2, and both agents restart their rank.
    """
    with socket.create_server(("localhost", 0)) as free:
        place = f"localhost:{free.getsockname()[1]}"
    launcher = ["--nnodes=2", "--nproc_per_node=1", "--max-restarts=1", "--no-python"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-id=two-agents"]
    launcher += [f"--rdzv-endpoint={place}", "--local-addr=127.0.0.1"]
    script = (sys.executable, "-c", dying((1, 6)), *TWO_RANKS, "--run-dir", tmp_path)
    command = ("-m", "torch.distributed.run", *launcher, *script)
    jobs = [run_python(*command, start=True) for _ in range(2)]
    outputs = [job.communicate(timeout=PATIENCE) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert any("epochs done: 1" in printed for printed, _ in outputs)
    assert_same_run(tmp_path, undisturbed)


RANK_0_IS_LATE = """
import os, runpy, time
if os.environ["RANK"] == "0":
    time.sleep(3)
runpy.run_module("SCRIPT", run_name="__main__")
"""


def test_a_mistake_under_torchrun_is_printed_once(copy):
    """Rank 0 prints it, even if it finds it last. The jobs run side by side."""
    before = contents(copy)
    jobs = []
    for script, words in (
        ("train_ddp", "holds a run"),
        ("train_single", "start train_ddp.py"),
    ):
        code = RANK_0_IS_LATE.replace("SCRIPT", script)
        job = torchrun("-c", code, *SMALL, "--run-dir", copy, start=True)
        jobs.append((script, words, job))
    for script, words, job in jobs:
        _, errors = job.communicate(timeout=PATIENCE)
        assert job.returncode == 1  # torchrun's own
        assert errors.count("error: ") == 1, errors
        assert errors.count(words) == 1, errors
        assert f'{script}.py", line' not in errors  # no traceback of ours
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--precision fp8", "fp8"),
        ("--precision fp16 --device cpu", "bf16"),
        ("--sync-bn --device cpu", "--sync-bn needs GPUs"),
        ("--sync-bn --compile", "--compile"),
        ("--device cuda:1", "each rank takes its own"),
    ],
)
def test_wrong_use_of_train_ddp(flags, words, tmp_path, monkeypatch):
    """The flags are checked as on a machine with two GPUs, but no GPU is touched."""

    def find_device(name):
        return torch.device(name or "cuda")

    monkeypatch.setattr(train_single, "find_device", find_device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert_one_line(ddp(*ALEX, *flags.split(), "--run-dir", tmp_path / "run"), words)
    assert list(tmp_path.iterdir()) == []


def test_a_stale_rank_is_ignored(monkeypatch):
    monkeypatch.setenv("RANK", "1")  # without torchrun
    assert runpy.run_path(str(HERE / "train_ddp.py"))["RANK"] == 0


def test_other_launchers_than_torchrun_are_refused(tmp_path, monkeypatch):
    """Otherwise each process would train the same run alone."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = ddp(*ALEX, "--run-dir", tmp_path / "run")
    assert_one_line(result, "not by torchrun", "start with torchrun")
    assert list(tmp_path.iterdir()) == []


def test_one_process_trains_like_train_single(finished, tmp_path):
    flags = ("--precision", "fp32", "--epochs", 1, "--run-dir", tmp_path / "run")
    printed = output_of(ddp(*SMALL, *flags))
    assert "AlexCapsNet in fp32 on" in printed
    one = torch.load(tmp_path / "run" / "last.pt")["history"][0]
    other = torch.load(finished / "last.pt")["history"][0]
    assert one | {"seconds": 0} == other | {"seconds": 0}


def test_a_path_may_begin_with_a_tilde(monkeypatch):
    """In --run-dir=~/run, the shell leaves the ~ as it is."""
    monkeypatch.setenv("HOME", "/somebody")
    assert train_single.nonempty_path("~/run") == "/somebody/run"


def test_accumulation_is_chosen_on_the_command_line(tmp_path):
    flags = ("--accumulation-steps", 2, "--batch-size", 16, "--precision", "fp32")
    printed = output_of(ddp(*ALEX, *flags, "--dry-run", "--run-dir", tmp_path / "run"))
    assert "32 images of digits, 32 per step" in printed


def test_a_run_is_resumed_by_as_many_processes(finished, undisturbed):
    assert_one_line(ddp("--resume", finished), "train_single.py with 1 process")
    assert_one_line(ddp("--resume", undisturbed), "train_ddp.py with 2 processes")


@pytest.mark.parametrize(
    ("on_cpu", "has_bf16", "precision", "reason"),
    [
        (True, True, "bf16", "precision: bf16, because this CPU has instructions for it\n"),
        (True, False, "fp32", "precision: fp32, because this CPU has no instructions for bf16\n"),
        (False, True, "fp16", ""),
    ],
)
def test_the_usual_precision(on_cpu, has_bf16, precision, reason, monkeypatch, capsys):
    monkeypatch.setattr(train_ddp, "cpu_has_bfloat16", lambda: has_bf16)
    assert train_ddp.usual_precision(on_cpu) == precision
    assert capsys.readouterr().out == reason


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("is_fast", [True, False])
def test_emulated_bfloat16_is_warned_of(on_cpu, is_fast, monkeypatch, capsys):
    """The device that is not used is the other way round."""
    cpu_is_fast = is_fast == on_cpu
    gpu_is_fast = is_fast != on_cpu

    def is_bf16_supported(including_emulation):
        return gpu_is_fast or including_emulation

    monkeypatch.setattr(train_ddp, "cpu_has_bfloat16", lambda: cpu_is_fast)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    train_ddp.check_precision("fp32", on_cpu)
    assert capsys.readouterr().out == ""
    train_ddp.check_precision("bf16", on_cpu)
    warning = "" if is_fast else "WARNING: this " + ("CPU" if on_cpu else "GPU")
    assert capsys.readouterr().out[:17] == warning


def test_a_run_in_float16_is_not_resumed_on_a_cpu(undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(train_ddp, "WORLD_SIZE", 2)
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    change_settings(run, precision="fp16")
    store = torch.distributed.HashStore()
    with pytest.raises(data.UserError, match="a run that began in fp16 goes on only on a GPU"):
        train_ddp.plan({"resume": str(run)}, store)


@pytest.mark.parametrize(("flags", "precision"), [((), "bf16"), (("--precision", "fp32"), "fp32")])
def test_the_command_line_chooses_the_precision(flags, precision, tmp_path, monkeypatch):
    monkeypatch.setattr(train_ddp, "cpu_has_bfloat16", lambda: True)
    command = (*ALEX, "--dry-run", "--device", "cpu", "--run-dir", tmp_path / "run")
    assert f"AlexCapsNet in {precision} on" in output_of(ddp(*command, *flags))


def test_an_old_copy_on_another_machine_is_one_mistake(monkeypatch):
    """Only rank 0's machine has the newest last.pt."""

    def all_gather_object(found, mine):
        found[:] = [3, mine]

    monkeypatch.setattr(train_ddp, "together", lambda work: work())
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    run = mock.Mock(folder="run", history=[{}] * 3)
    train_ddp.load_everywhere(run)
    run.load.assert_called_once_with()
    run.history.pop()
    with pytest.raises(data.UserError, match=r"run has \[3, 2\] epochs on ranks 0, 1, ..."):
        train_ddp.load_everywhere(run)


@pytest.mark.parametrize(
    ("gpus", "backend", "device"),
    [(1, "gloo", "cuda:0"), (2, "cpu:gloo,cuda:nccl", "cuda:1")],
)
def test_two_ranks_may_share_a_gpu(gpus, backend, device, monkeypatch):
    """NCCL refuses that, gloo does not. This process is rank 1 of two on this machine."""
    monkeypatch.setattr(train_ddp, "LOCAL_WORLD_SIZE", 2)
    monkeypatch.setattr(train_ddp, "LOCAL_RANK", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(train_single, "find_device", torch.device)
    init = mock.Mock()
    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    train_ddp.join()
    assert init.call_args.args == (backend,)
    assert init.call_args.kwargs["timeout"].total_seconds() == 600
    assert train_ddp.prepare_device({"device": "cuda"}) == torch.device(device)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_bf16": True}, True),
        ({"avx2": True, "amx_bf16": True}, True),
        ({"avx2": True, "avx512_f": True}, False),
        ({"avx512_bf16": False}, False),
    ],
)
def test_pytorch_says_whether_the_cpu_has_bfloat16(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert train_ddp.cpu_has_bfloat16() == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("flags : fpu avx2", False), ("flags : fpu avx512_bf16", True)],
)
def test_otherwise_linux_says_whether_the_cpu_has_bfloat16(text, expected, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    file = mock.Mock(**{"exists.return_value": True, "read_text.return_value": text})
    monkeypatch.setattr(train_ddp, "Path", {"/proc/cpuinfo": file}.get)
    assert train_ddp.cpu_has_bfloat16() == expected


@pytest.mark.parametrize(
    ("launched", "threads", "changed_to"),
    [
        (True, "1", [2]),  # torchrun's default, which leaves cores idle
        (True, None, [2]),  # torchrun does not set it for one rank per machine
        (True, "3", []),  # the user's choice
        (False, "1", []),  # without torchrun this is the user's choice, too
    ],
)
def test_two_ranks_share_four_cores(launched, threads, changed_to, monkeypatch):
    monkeypatch.setattr(train_ddp, "LOCAL_WORLD_SIZE", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    monkeypatch.setattr(train_ddp, "LAUNCHED", launched)
    if threads is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    found = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    assert train_ddp.prepare_device({"device": "cpu"}) == CPU
    assert found == changed_to


# -- evaluate.py -----------------------------------------------------------------------------------


def test_metrics_by_hand():
    """Two images of each digit. All are right except a 4, which is mistaken for a 9."""
    labels = np.repeat(np.arange(10), 2)
    lengths = np.full((20, 10), 0.1)
    lengths[np.arange(20), labels] = 0.9
    lengths[9, 4] = 0.5
    lengths[9, 9] = 0.9
    report = evaluate.classification_metrics(lengths, labels)
    assert report["test_images"] == 20
    assert report["errors"] == 1
    assert report["accuracy"] == 95.0
    assert report["interval_95"] == pytest.approx([76.39, 99.11], abs=0.01)
    assert report["confusion"][4] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    # Of 2 * 18 pairs (a 9, another digit), 34 are in the right order and 2 are ties.
    assert report["auc"][9] == pytest.approx(35 / 36, abs=1e-6)
    assert report["auc"][4] == 1
    # The worst curve is that of 9: every threshold that finds the 9s also takes the 4, one of
    # 18 other digits, for a 9. So it is a straight line from (0, 0) to (1/18, 1).
    figure, _ = evaluate.draw_roc(report, lengths, labels)
    evaluate.plt.close(figure)
    (axis,) = figure.axes
    false_rates, true_rates = axis.lines[0].get_data()
    np.testing.assert_allclose(true_rates, np.minimum(18 * false_rates, 100))
    assert axis.lines[0].get_label() == "digit 9: AUC 0.97222"
    assert axis.get_xlabel().startswith("false positive rate")
    assert axis.get_ylabel().startswith("true positive rate")
    figure, _ = evaluate.draw_confusion(report)
    evaluate.plt.close(figure)
    (axis,) = figure.axes
    numbers = {text.get_position(): text.get_text() for text in axis.texts}
    assert numbers.pop((9, 4)) == "1"  # in the column of 9 and the row of 4
    assert numbers.pop((4, 4)) == "1"
    assert numbers == {(digit, digit): "2" for digit in range(10) if digit != 4}


def test_the_worst_mistake_comes_first():
    lengths = np.full((3, 10), 0.1)
    labels = np.array([0, 1, 2])
    lengths[0, 5] = 0.2  # exceeds the true digit's capsule by 0.1
    lengths[1, 5] = 0.9  # by 0.8
    lengths[2, 2] = 0.9  # right
    assert evaluate.worst_mistakes(lengths, labels).tolist() == [1, 0]
    figure, _ = evaluate.draw_mistakes(lengths, labels, np.zeros((3, 28, 28)))
    evaluate.plt.close(figure)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["1 → 5\n0.10 → 0.90", "0 → 5\n0.10 → 0.20"]


def test_curves_of_training_and_validation():
    row = {"train_loss": 0.2, "train_accuracy": 90.0, "val_loss": 0.1, "val_accuracy": 95.0}
    best = row | {"epoch": 1}
    run = {"history": [row], "best": best, "config": {"reconstruction": 0.0}}
    figure, _ = evaluate.draw_curves(run)
    evaluate.plt.close(figure)
    for axis, values in zip(figure.axes, ([0.2, 0.1], [0.9, 0.95]), strict=True):
        training, validation, _ = axis.lines
        assert [training.get_ydata()[0], validation.get_ydata()[0]] == pytest.approx(values)
        assert (training.get_label(), validation.get_label()) == ("training", "validation")


def test_wilson_interval_has_some_width_even_if_every_answer_is_right():
    assert evaluate.wilson(10, 10) == pytest.approx((72.25, 100), abs=0.01)


def test_maps_and_histograms_of_couplings_by_hand():
    """The network has 2x2 places with two capsules each, and sees two of each digit."""
    start = torch.full((20, 10, 8), 0.1)  # [B, J, N]
    end = start.clone()
    end[6, 3, 4] = 0.9  # from the first 3, one capsule at place 2, to digit 3
    network = mock.Mock(side=28, mean=0.0, std=1.0, map_side=2)
    network.digits.route.return_value = (None, [start, end])
    network.parameters.return_value = iter([start])  # device_of asks for one of them
    images = torch.zeros(20, 28, 28, dtype=torch.uint8)
    labels = torch.arange(10).repeat_interleave(2)
    summary = evaluate.routing_summary(network, images, labels)
    maps = np.full((10, 4), 0.1)
    maps[3, 2] = (3 * 0.1 + 0.9) / 4  # the mean over two images and two capsules
    np.testing.assert_allclose(summary["coupling_maps"], maps, atol=1e-5)
    mean = (159 * 0.1 + 0.9) / 160
    assert summary["coupling_to_true"] == pytest.approx([0.1, mean])
    to_true, to_others = np.array(summary["coupling_histograms"])
    assert to_true[170:190].sum() == 0.625  # one of 160 couplings, near 0.9
    assert to_true.sum() == 100
    assert to_others[10:30].sum() == 100  # all near 0.1
    figure, _ = evaluate.draw_coupling_histograms(summary)
    evaluate.plt.close(figure)
    (axis,) = figure.axes
    true_drawn, others_drawn = axis.patches
    assert true_drawn.get_label() == "to the true digit"
    assert others_drawn.get_label() == "to the nine others"
    np.testing.assert_array_equal(true_drawn.get_data().values, to_true)
    np.testing.assert_array_equal(others_drawn.get_data().values, to_others)


def test_coupling_maps_lie_where_the_capsules_look():
    """ResCapsNet's 9x9 places; the one in row 2 and column 5 is far from an equal share."""
    maps = np.full((10, 81), 0.1)
    maps[3, 9 * 2 + 5] = 0.9
    report = {"coupling_maps": maps.tolist(), "coupling_to_true": [0.1, 0.1, 0.1]}
    images = np.zeros((20, 28, 28), np.uint8)
    figure, _ = evaluate.draw_coupling_maps(report, ResCapsNet, images)
    evaluate.plt.close(figure)
    (mesh,) = figure.axes[3].collections[:1]
    assert mesh.get_array().argmax() == 9 * 2 + 5
    # Column 5 of the input's 78 pixels: from 8 * 5 + 0.5 to 8 * 6 + 0.5, in the middle of
    # what its capsules see. The picture has 28 pixels, and the first begins at -0.5.
    edges = mesh.get_coordinates()[0, 5:7, 0]
    np.testing.assert_allclose(edges, np.array([40.5, 48.5]) * 28 / 78 - 0.5)


@both_networks
def test_places_of_the_map(network):
    """map_side is the side of the primary capsules' map. place_stride is the stride."""
    model = network()
    image = torch.zeros(1, 1, model.side, model.side)
    with torch.no_grad():
        maps = model.primary.conv(model.features(image))
    assert maps.shape[2:] == (model.map_side, model.map_side)
    if model.place_stride is not None:
        assert model.primary.conv.stride == (model.place_stride, model.place_stride)


def test_accuracy_at_each_angle(monkeypatch):
    """At 30 degrees all ten digits are right. At other angles all look like zeros."""

    def predict(model, images, angle, title):
        return torch.eye(10) * (angle == 30)

    monkeypatch.setattr(evaluate, "predict", predict)
    digits = torch.arange(10)
    found = evaluate.rotation_accuracy(None, digits, digits)
    expected = {str(angle): 10.0 for angle in evaluate.ANGLES}
    expected["30"] = 100.0
    assert found == {"images": 10, "accuracy": expected}


# The settings of a run. OTHER_EXPERIMENT and SAME_EXPERIMENT change them, one at a time: the
# description must differ, or must not.
DDP_CONFIG = train_single.DEFAULTS | {
    "model": "alexcaps",
    "dataset": "mnist",
    "device": "cpu",
    "script": "ddp",
    "world_size": 2,
    "precision": "bf16",
    "train_images": 55_000,
    "hardware": "2 CPU threads",
}
OTHER_EXPERIMENT = {
    "model": "rescaps",
    "dataset": "digits",
    "rotate": 10.000001,
    "shift": 2.0,
    "epochs": 21,
    "batch_size": 64,
    "lr": 0.0010000001,
    "routing_iterations": 2,
    "reconstruction": 20.0,
    "device": "cuda:0",
    "compile": True,
    "script": "single",
    "world_size": 3,
    "precision": "fp16",
    "accumulation_steps": 2,
    "sync_bn": True,
    "train_images": 20_000,
}
SAME_EXPERIMENT = {
    "seed": 1,
    "data_dir": "elsewhere",
    "train_size": 60_000,  # more than there are: all are used
    "dry_run": True,
    "hardware": "9 CPU threads",
}


def described(epochs_done=20, **changes):
    config = DDP_CONFIG | changes
    return evaluate.describe({"config": config, "history": [{}] * epochs_done})


def test_descriptions_differ_exactly_if_settings_do():
    assert OTHER_EXPERIMENT.keys() | SAME_EXPERIMENT.keys() == DDP_CONFIG.keys()
    usual = described()
    assert usual == "AlexCapsNet, 2 processes in bf16, 20 epochs"
    for name, value in SAME_EXPERIMENT.items():
        assert described(**{name: value}) == usual, name
    others = [described(**{name: value}) for name, value in OTHER_EXPERIMENT.items()]
    others.append(described(epochs_done=19))
    assert len({usual, *others}) == 1 + len(others), others
    assert described(rotate=0) == described(rotate=0.0)
    assert described(lr=0.0010000001) != described(lr=0.0010000002)


def test_descriptions_read_well():
    text = described(1, epochs=1, world_size=1)
    assert text == "AlexCapsNet, 1 process in bf16, 1 epoch"
    assert described(7).endswith(", 7 of 20 epochs")
    changes = {"script": "single", "device": "cuda", "lr": 0.01, "train_images": 6000}
    text = described(**changes)
    assert text == "AlexCapsNet, one device, GPU, lr 0.01, 20 epochs of 6,000 images"


@pytest.fixture(scope="module")
def reported(finished, tmp_path_factory):
    """The finished run, evaluated, and what the evaluation printed."""
    run = Path(shutil.copytree(finished, tmp_path_factory.mktemp("reported") / "run"))
    return run, output_of(evaluated(run, "--device", "cpu"))


def test_a_network_is_evaluated_without_tf32(finished):
    torch.set_float32_matmul_precision("high")  # as training does on a GPU
    evaluate.load_network(evaluate.read_run(finished), CPU)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32


@pytest.fixture(scope="module")
def with_decoder(tmp_path_factory):
    """A run with a decoder, evaluated."""
    run = tmp_path_factory.mktemp("decoder") / "run"
    flags = ("--epochs", 1, "--reconstruction", 20, "--run-dir", run)
    output_of(single(*SMALL, *flags))
    output_of(evaluated(run, "--device", "cpu"))
    return run


def edit_json(file, **changes):
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | changes))


def archived(run, folder, **changes):
    """A copy of an evaluated run without best.pt, with other settings."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("*.pt", "*.png"))
    edit_json(folder / "config.json", **changes)
    return folder


def archived_with_weights(run, folder):
    """An archive that also has weights.pt, and the network from which they come."""
    archived(run, folder)
    network = evaluate.load_network(evaluate.read_run(run), CPU)
    halves = {name: tensor.half() for name, tensor in network.state_dict().items()}
    torch.save(halves, folder / "weights.pt")
    return folder, network


def test_a_report_says_what_the_network_does(reported):
    """Every test image counts once. The expected figures are computed another way."""
    run, printed = reported
    model = AlexCapsNet().eval()
    model.load_state_dict(weights(run, "best.pt"))
    images, labels = data.load("digits", "", "test")
    angles = torch.full([360], 30.0)
    with torch.no_grad():
        lengths = model(data.images_to_input(images, model)).norm(dim=2)
        turned = model(data.images_to_input(images, model, angles)).norm(dim=2)
    found = evaluate.predict(model, images, angle=30)
    torch.testing.assert_close(found, turned)
    kept = np.load(run / "lengths.npy")
    assert kept.dtype == np.float32
    np.testing.assert_allclose(kept, lengths, atol=1e-5)
    predicted = lengths.argmax(dim=1)
    report = json.loads((run / "report.json").read_text())
    assert report["test_images"] == 360
    assert np.sum(report["confusion"]) == 360
    assert report["errors"] == (predicted != labels).sum()
    assert f"test accuracy {report['accuracy']:.2f} %" in printed
    # The printed precision of a digit is the share of its predictions that are right.
    for digit in range(10):
        chosen = labels[predicted == digit]
        precision = (chosen == digit).float().mean() if len(chosen) else 0
        line = rf"^ +{digit} +{precision:.4f} "
        assert re.search(line, printed, re.MULTILINE), printed


PICTURES = ("confusion_matrix", "curves", "mistakes", "roc", "rotation", "routing")
REDRAWN = ("perturbations", "reconstructions")


@pytest.fixture(scope="module")
def evaluated_rescaps(tmp_path_factory):
    """A dry run of ResCapsNet, evaluated."""
    run = tmp_path_factory.mktemp("rescaps") / "run"
    flags = ("--model", "rescaps", "--dataset", "digits", "--dry-run", "--run-dir", run)
    output_of(single(*flags))
    output_of(evaluated(run, "--device", "cpu"))
    return run


def test_pictures_fit_a_slide(reported, with_decoder, evaluated_rescaps):
    """Each run has the pictures that it should have, and none is blank."""
    files = []
    for run, names in (
        (reported[0], PICTURES),
        (evaluated_rescaps, PICTURES),
        (with_decoder, (*PICTURES, *REDRAWN)),
    ):
        pictures = list(run.glob("*.png"))
        assert {file.stem for file in pictures} == {*names}
        files += pictures
    for file in files:
        with Image.open(file) as picture:
            assert 600 <= picture.width <= 1600, file
            assert 300 <= picture.height <= 1500, file
            assert np.asarray(picture.convert("L")).std() > 5, f"{file} is blank"


def test_a_long_title_is_wrapped(tmp_path):
    figure = evaluate.plt.figure(figsize=(4, 4))
    evaluate.save(figure, 20 * "settings ", tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.min() < 100
    assert pixels[:, [0, 1, 2, -3, -2, -1]].min() == 255  # nothing reaches the edges


def test_a_plain_network_is_a_dashed_line(reported):
    report = json.loads((reported[0] / "report.json").read_text())
    accuracies = [50.0] * len(evaluate.ANGLES)
    figure, _ = evaluate.draw_rotation(report, 10, plain=accuracies)
    evaluate.plt.close(figure)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines["plain CNN"].get_ydata()) == accuracies
    assert lines["plain CNN"].get_linestyle() == "--"


def test_pictures_of_a_decoder_go_when_its_run_is_replaced(with_decoder, tmp_path):
    run = Path(shutil.copytree(with_decoder, tmp_path / "run"))
    output_of(single(*SMALL, "--epochs", 1, "--run-dir", run, "--overwrite"))
    output_of(evaluated(run))
    assert {file.stem for file in run.glob("*.png")} == {*PICTURES}


def test_an_archive_is_redrawn_elsewhere(reported, tmp_path, monkeypatch):
    """Without weights, the same pictures are drawn. The archive stays as it is."""
    run, printed = reported
    archive = archived(run, tmp_path / "results" / "name")
    before = contents(archive)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "measure", None)  # nothing is computed
    again = output_of(evaluated(archive))
    assert contents(archive) == before
    # Only the last line, "written to", differs.
    assert again.splitlines()[:-1] == printed.splitlines()[:-1]
    redrawn = contents(tmp_path / "runs" / "name-evaluated")
    assert sorted(redrawn) == sorted(f"{name}.png" for name in PICTURES)
    for name, picture in redrawn.items():
        assert picture == (run / name).read_bytes(), name


def test_float16_lengths_of_older_archives(reported, tmp_path, monkeypatch):
    """They give the same report, and are drawn in float32."""
    run, printed = reported
    archive = archived(run, tmp_path / "archive")
    halves = np.load(run / "lengths.npy").astype(np.float16)
    np.save(archive / "lengths.npy", halves)
    draw_roc = mock.Mock(side_effect=evaluate.draw_roc)
    monkeypatch.setattr(evaluate, "draw_roc", draw_roc)
    monkeypatch.setattr(evaluate, "save", mock.Mock())
    again = output_of(evaluated(archive, "--out", tmp_path / "out"))
    evaluate.plt.close("all")
    assert again.splitlines()[:-1] == printed.splitlines()[:-1]
    drawn = draw_roc.call_args.args[1]
    assert drawn.dtype == np.float32
    assert np.array_equal(drawn, halves)


MATPLOTLIBRC = """
image.origin: lower
text.usetex: True
backend: pdf
font.size: 40
savefig.dpi: 30
figure.facecolor: red
"""


def test_pictures_ignore_the_users_matplotlib(reported, tmp_path):
    """Settings in a file and in MPLBACKEND do not change a byte."""
    archive = archived(reported[0], tmp_path / "archive")
    (tmp_path / "matplotlibrc").write_text(MATPLOTLIBRC)
    variables = {"MPLBACKEND": "nonsense"}
    variables["MATPLOTLIBRC"] = str(tmp_path / "matplotlibrc")
    out = tmp_path / "out"
    result = run_python("evaluate.py", archive, "--out", out, **variables)
    assert result.returncode == 0, result.stderr
    for name in PICTURES:
        expected = (reported[0] / f"{name}.png").read_bytes()
        same = (out / f"{name}.png").read_bytes() == expected
        assert same, name


def test_seeds_make_one_row(reported, tmp_path):
    """Three seeds, trained on three machines, and a run with another learning rate."""
    folders = []
    for seed, accuracy in enumerate((99.0, 99.2, 99.7)):
        settings = {"seed": seed, "hardware": f"machine {seed}"}
        folder = archived(reported[0], tmp_path / str(seed), **settings)
        edit_json(folder / "report.json", accuracy=accuracy)
        folders.append(folder)
    other = {"lr": 0.01, "device": "cuda"}
    folders.append(archived(reported[0], tmp_path / "other", **other))
    out = tmp_path / "out"
    printed = output_of(evaluated(*folders, "--out", out))
    with open(out / "comparison.csv", newline="") as file:
        one, three = sorted(csv.DictReader(file), key=lambda row: row["n"])
    assert (one["n"], three["n"]) == ("1", "3")
    assert float(three["accuracy"]) == pytest.approx(99.3)
    # The squared distances to 99.3 are 0.09, 0.01 and 0.16: divide their sum by n - 1.
    assert float(three["accuracy_std"]) == pytest.approx(math.sqrt(0.13))
    assert one["accuracy_std"] == ""
    assert "GPU, batch size 16, lr 0.01" in one["name"]
    assert "runs" not in three
    text = (out / "comparison.md").read_text()
    assert text in printed
    assert "99.30 ± 0.36" in text
    assert max(len(line) for line in text.splitlines()) <= 100
    assert (out / "comparison.png").exists()
    # What all rows have in common stands above the table.
    common = "digits, AlexCapsNet, one device, batch size 16, 2 epochs of 96 digits"
    assert f"360 test images: {common}\n" in text
    assert "\n| usual settings | 3 |" in text
    assert "\n| GPU, lr 0.01   | 1 |" in text


def test_a_seed_counts_once(reported, tmp_path):
    run = archived(reported[0], tmp_path / "run")
    again = archived(reported[0], tmp_path / "again")
    result = evaluated(run, again, "--out", tmp_path / "out")
    assert_one_line(result, f"{again} has the same settings", "leave one out")


def shorter(array):
    return array[:-1]


def other_answers(array):
    """The lengths of a run that answers 9 where this one answers 0, ..."""
    return array[:, ::-1]


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def change(**changes):
    """A function: a file's content -> the same JSON with other values."""
    return lambda content: json.dumps(json.loads(content) | changes).encode()


def leave_out(name):
    def spoil(content):
        values = json.loads(content)
        del values[name]
        return json.dumps(values).encode()

    return spoil


def change_lengths(spoil):
    return lambda content: npy(spoil(np.load(io.BytesIO(content))))


DEEP = b"[" * 100_000
ZEROS = np.zeros((360, 10), np.float32)
# How a file of an archive is damaged, and what the error line must say
SPOILT = [
    ("config.json", None, "holds no run"),
    ("config.json", lambda content: b"", "damaged"),
    ("config.json", lambda content: content[:100], "damaged"),
    ("config.json", lambda content: b"\xff" + content, "damaged"),
    ("config.json", lambda content: DEEP, "damaged"),
    ("config.json", lambda content: b"[1, 2]", "damaged"),
    ("config.json", change(model="other"), "another network"),
    ("config.json", change(model=["alexcaps"]), "model is ['alexcaps']"),
    ("config.json", change(rotate="abc"), "rotate is 'abc'"),
    ("config.json", change(rotate=-1.0), "rotate is -1.0"),
    ("config.json", change(lr=math.nan), "lr is nan"),
    ("config.json", change(lr=10**400), "lr is 1000"),
    ("config.json", change(seed=[1]), "seed is [1]"),
    ("config.json", change(seed=True), "seed is True"),
    ("config.json", change(epochs=2.5), "epochs is 2.5"),
    ("config.json", change(compile="no"), "compile is 'no'"),
    ("config.json", change(dataset=3), "dataset is 3"),
    ("config.json", change(dataset="other"), "dataset is 'other'"),
    ("config.json", change(device=None), "device is None"),
    ("config.json", leave_out("device"), "device is None"),
    ("config.json", leave_out("hardware"), "'hardware' is missing"),
    ("config.json", leave_out("train_images"), "'train_images' is missing"),
    ("metrics.csv", None, "holds no run"),
    ("metrics.csv", lambda content: b"", "no finished epoch"),
    ("metrics.csv", lambda content: content.splitlines()[0], "no finished epoch"),
    ("metrics.csv", lambda content: content[:100], "damaged"),
    ("metrics.csv", lambda content: content + b"3,0.1", "damaged"),
    ("metrics.csv", lambda content: content.rstrip() + b",9,9\n", "damaged"),
    ("metrics.csv", lambda content: content + b"3,0.1,99,0.1,nan,0.001,1", "val_accuracy is nan"),
    ("metrics.csv", lambda content: content.replace(b"val_acc", b"acc"), "'val_accuracy' is mis"),
    ("metrics.csv", lambda content: content + b"3," + b"9" * 200_000, "damaged"),
    ("metrics.csv", lambda content: content + b"3,0.1,99,0.1,99.9,0.001,1", "neither best.pt nor"),
    ("report.json", None, "neither best.pt nor"),
    ("report.json", lambda content: b"[]", "damaged"),
    ("report.json", change(accuracy="98"), "accuracy is '98'"),
    ("report.json", change(errors=None), "errors is None"),
    ("report.json", change(errors=1.5), "errors is 1.5"),
    ("report.json", change(accuracy=100.5), "above 100 %"),
    ("report.json", change(test_images=0), "no images"),
    ("report.json", change(auc=[1.0] * 9), "auc is [1.0"),
    ("report.json", change(auc=[math.nan] * 10), "auc is [nan"),
    ("report.json", change(confusion=[[1, 2], [3]]), "damaged"),
    ("report.json", change(kept_epoch=1000), "neither best.pt nor"),
    ("report.json", leave_out("confusion"), "'confusion' is missing"),
    ("report.json", change(rotation={}), "'accuracy' is missing"),
    ("report.json", change(rotation=[]), "damaged"),
    ("report.json", change(rotation={"images": 10, "accuracy": {"0": 1}}), "'-90' is missing"),
    ("report.json", change(coupling_maps=[[0.1] * 81] * 10), "coupling_maps is"),
    ("report.json", change(coupling_to_true=0.1), "damaged"),
    ("report.json", change(coupling_histograms="x"), "coupling_histograms is 'x'"),
    ("report.json", leave_out("coupling_histograms"), "'coupling_histograms' is missing"),
    ("report.json", change(coupling_histograms=[[0.0] * 200] * 2), "of couplings is empty"),
    ("lengths.npy", None, "can be compared"),
    ("lengths.npy", lambda content: b"", "ten lengths"),
    ("lengths.npy", lambda content: content[:1000], "ten lengths"),
    ("lengths.npy", lambda content: b"PK\x03\x04" + content, "ten lengths"),
    ("lengths.npy", lambda content: npy(np.array([{}])), "ten lengths"),
    ("lengths.npy", lambda content: npy(np.array(0.5)), "ten lengths"),
    ("lengths.npy", lambda content: npy(np.array(["a"] * 10)), "ten lengths"),
    ("lengths.npy", lambda content: npy(ZEROS + np.nan), "ten lengths"),
    ("lengths.npy", lambda content: npy(ZEROS[:, :9]), "ten lengths"),
    ("lengths.npy", change_lengths(shorter), "another run"),
    ("lengths.npy", change_lengths(other_answers), "another run"),
]


@pytest.fixture(scope="module")
def whole_archive(reported, tmp_path_factory):
    return archived(reported[0], tmp_path_factory.mktemp("archive") / "whole")


@pytest.mark.parametrize(("name", "spoil", "words"), SPOILT)
def test_a_damaged_archive_is_one_line(name, spoil, words, whole_archive, tmp_path, monkeypatch):
    """One line says what is wrong, whichever file is damaged."""
    monkeypatch.setattr(evaluate, "save_pictures", mock.Mock())
    archive = Path(shutil.copytree(whole_archive, tmp_path / "archive"))
    content = (archive / name).read_bytes()
    (archive / name).unlink()
    if spoil is not None:
        (archive / name).write_bytes(spoil(content))
    before = contents(archive)
    assert_one_line(evaluated(archive, "--out", tmp_path / "out"), words)
    assert contents(archive) == before
    evaluate.save_pictures.assert_not_called()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "RUN"),
        (("RUN", "OTHER", "--image", "1.png"), "--image needs exactly one run"),
        (("RUN", "--device", "toaster"), "--device toaster"),
        (("RUN", "--image"), "--image"),
        (("RUN", "OTHER"), "runs on mnist and on digits cannot be compared"),
    ],
)
def test_wrong_use_of_evaluate(flags, words, whole_archive, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole_archive, "RUN")
    archived("RUN", tmp_path / "OTHER", dataset="mnist")
    assert_one_line(evaluated(*flags), words)


def test_a_run_that_is_not_whole_is_one_line(reported, tmp_path):
    run = Path(shutil.copytree(reported[0], tmp_path / "run"))
    with open(run / "metrics.csv", "a") as file:
        file.write("3,0.1,99,0.1,99.9,0.001,1\n")  # a better epoch than best.pt's
    words = "does not match metrics.csv's best epoch"
    assert_one_line(evaluated(run), words, "if the run is still training, try again")
    hint = f"evaluate.py {run}"
    result = evaluated(run, reported[0], "--out", tmp_path / "out")
    assert_one_line(result, "no report of its best epoch", hint)


def test_curves_of_several_runs_over_epochs_and_time(tmp_path, monkeypatch):
    """Accuracy is drawn over epochs and over time, at the fastest epoch's speed."""
    runs = []
    for accuracies in ((90, 98), (94, 94)):
        history = [{"val_accuracy": accuracy} for accuracy in accuracies]
        runs.append({"config": DDP_CONFIG | {"epochs": 9}, "history": history})  # stopped
    save = mock.Mock()
    monkeypatch.setattr(evaluate, "save", save)
    row = {"n": 2, "seconds": 30, "runs": runs}
    evaluate.save_comparison([row], tmp_path / "comparison.png")
    left, right = save.call_args.args[0].axes
    evaluate.plt.close("all")
    assert len(left.lines) == 1
    assert left.get_yscale() == "logit"
    assert left.lines[0].get_ydata() == pytest.approx([0.92, 0.96])
    assert right.lines[0].get_xdata() == pytest.approx([0.5, 1.0])  # minutes


class Drawer(torch.nn.Module):
    """A network that one can check by hand. Its answer to an image is the first pixel.

    Capsule j is [j, 0, 1] if j is the answer, and otherwise [j, 0, 0].
    """

    side = 28
    mean = 0.0
    std = 1.0

    def __init__(self):
        super().__init__()
        self.digits = mock.Mock(D=3)
        self.weight = torch.nn.Parameter(torch.zeros(1))  # device_of asks for one

    def forward(self, images):
        answers = (images[:, 0, 0, 0] * 255).round().long()
        capsules = torch.zeros(len(images), 10, 3)
        capsules[:, :, 0] = torch.arange(10)
        capsules[torch.arange(len(images)), answers, 2] = 1
        return capsules

    def scores(self, capsules):
        return capsules[:, :, 2]

    def target(self, images):
        return images

    def decoder(self, capsules, digits):
        """Upper half: number 0, divided by 10. Lower half: 0.5 + 0.9 times number 1."""
        chosen = capsules[torch.arange(len(digits)), digits]  # [n, 3]
        # Number 0 names the digit, even after it was moved by up to 0.25.
        assert torch.equal(chosen[:, 0].round(), digits.float())
        drawn = torch.zeros(len(digits), 1, 28, 28)
        drawn[:, 0, :14] = chosen[:, 0, None, None] / 10
        drawn[:, 0, 14:] = chosen[:, 1, None, None] * 0.9 + 0.5
        return drawn


def images_of(answers):
    """Images to which a Drawer gives these answers."""
    images = torch.zeros(len(answers), 28, 28, dtype=torch.uint8)
    images[:, 0, 0] = torch.tensor(answers)
    return images


def drawing(figure, row, column):
    """One of the pictures of a grid, without its frame of one pixel."""
    page = np.asarray(figure.axes[0].images[0].get_array())
    return page[30 * row : 30 * row + 30, 30 * column : 30 * column + 30][1:29, 1:29]


def tick_texts(ticks):
    return [label.get_text() for label in ticks]


def test_reconstructions_by_hand():
    """Ten digits that are right, and a 4 that is mistaken for a 7."""
    labels = torch.tensor([*range(10), 4])
    answers = [*range(10), 7]
    lengths = np.eye(10)[answers]
    images = images_of(answers)
    figure, _ = evaluate.draw_reconstructions(Drawer(), lengths, images, labels)
    evaluate.plt.close(figure)
    assert tick_texts(figure.axes[0].get_xticklabels()) == [*map(str, range(10)), "4 → 7"]
    for column in range(11):
        seen = drawing(figure, 0, column)
        np.testing.assert_allclose(seen, images[column] / 255, atol=1e-6)
        assert drawing(figure, 1, column)[0, 0] == pytest.approx(labels[column] / 10)
        assert drawing(figure, 2, column)[0, 0] == pytest.approx(answers[column] / 10)


def test_perturbations_by_hand():
    """Number 1 of a capsule changes the drawing most: by 0.9 per unit."""
    labels = torch.arange(10)
    figure, _ = evaluate.draw_perturbations(Drawer(), images_of(range(10)), labels)
    evaluate.plt.close(figure)
    steps = np.linspace(-0.25, 0.25, 11)
    assert tick_texts(figure.axes[0].get_xticklabels()) == [f"{step:+.2f}" for step in steps]
    assert tick_texts(figure.axes[0].get_yticklabels()) == ["no. 1"] * 10
    for digit in range(10):
        for column, step in enumerate(steps):
            picture = drawing(figure, digit, column)
            assert picture[0, 0] == pytest.approx(digit / 10)
            assert picture[27, 0] == pytest.approx(0.5 + 0.9 * step)


def test_an_archive_with_weights_draws_what_its_capsules_know(with_decoder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "save_pictures", mock.Mock())  # the other pictures
    archive, network = archived_with_weights(with_decoder, tmp_path / "archive")
    assert len((archive / "weights.pt").read_bytes()) < 8.3e6  # 4.1 million weights
    before = contents(archive)
    out = tmp_path / "out"
    output_of(evaluated(archive, "--out", out))
    assert contents(archive) == before
    assert sorted(p.stem for p in out.glob("*")) == sorted(REDRAWN)
    # The network is the same except for rounding, and computes in float32.
    loaded = evaluate.load_network(evaluate.read_run(archive), CPU)
    for name, tensor in network.state_dict().items():
        other = loaded.state_dict()[name]
        assert other.dtype == tensor.dtype
        torch.testing.assert_close(other, tensor, rtol=1e-3, atol=1e-4)


def test_rounded_weights_are_used_only_without_best(with_decoder, tmp_path):
    _, network = archived_with_weights(with_decoder, tmp_path / "archive")
    run = Path(shutil.copytree(with_decoder, tmp_path / "run"))
    shutil.copy(tmp_path / "archive" / "weights.pt", run)
    loaded = evaluate.load_network(evaluate.read_run(run), CPU)
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_an_archive_reads_own_digits_elsewhere(with_decoder, tmp_path, monkeypatch):
    """Nothing changes in results/. If the weights are missing, one line says so."""
    archive, _ = archived_with_weights(with_decoder, tmp_path / "results" / "name")
    before = contents(archive)
    pixels = np.full((60, 60), 255, dtype=np.uint8)
    pixels[10:50, 25:35] = 0  # a 1
    Image.fromarray(pixels).save(tmp_path / "one.png")
    monkeypatch.chdir(tmp_path)
    draw_readings = mock.Mock(wraps=evaluate.draw_readings)
    monkeypatch.setattr(evaluate, "draw_readings", draw_readings)
    printed = output_of(evaluated(archive, "--image", "one.png"))
    assert "one.png: " in printed
    (reading,) = draw_readings.call_args.args[0]
    digit = torch.from_numpy(reading["digit"])[None]
    rounded = evaluate.load_network(evaluate.read_run(archive), CPU)  # to float16
    with torch.no_grad():
        v = rounded(data.images_to_input(digit, rounded))
        answer = v.norm(dim=2).argmax(dim=1)
        expected = rounded.decoder(v, answer).squeeze()
    np.testing.assert_allclose(reading["redrawn"], expected, atol=1e-5)
    assert contents(archive) == before
    assert [p.name for p in (tmp_path / "runs").glob("*/*")] == ["own-digits.png"]
    assert (tmp_path / "runs" / "name-evaluated" / "own-digits.png").exists()
    (archive / "weights.pt").unlink()
    assert_one_line(evaluated(archive, "--image", "one.png"), "no weights")


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


BAD_WEIGHTS = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "a flipped bit": flipped,
    "text": lambda content: b"weights",
    "any code": lambda content: saved(AnyCode()),
    "a list": lambda content: saved([1.0]),
    "a number": lambda content: saved(1.0),
    "a tensor": lambda content: saved(torch.zeros(3)),
    "numbers as names": lambda content: saved({1: torch.zeros(3)}),
    "numbers as weights": lambda content: saved(dict.fromkeys(AlexCapsNet().state_dict(), 1.0)),
    "another network": lambda content: saved(ResCapsNet().state_dict()),
    "no decoder": lambda content: saved(AlexCapsNet().state_dict()),
}


@pytest.mark.parametrize("damage", BAD_WEIGHTS)
def test_damaged_or_foreign_weights_are_one_line(damage, with_decoder, tmp_path):
    archive, _ = archived_with_weights(with_decoder, tmp_path / "archive")
    content = (archive / "weights.pt").read_bytes()
    (archive / "weights.pt").write_bytes(BAD_WEIGHTS[damage](content))
    before = contents(archive)
    assert_one_line(evaluated(archive, "--out", tmp_path / "out"), "weights.pt")
    assert contents(archive) == before
    assert list((tmp_path / "out").iterdir()) == []


def test_a_decoder_too_many_or_too_few_is_one_line(reported, with_decoder, tmp_path):
    for source, weight in ((reported[0], 20.0), (with_decoder, 0.0)):
        run = Path(shutil.copytree(source, tmp_path / str(weight)))
        edit_json(run / "config.json", reconstruction=weight)
        before = contents(run)
        assert_one_line(evaluated(run), "best.pt does not fit", "config.json")
        assert contents(run) == before


def a_seven():
    """An off-centre 7 of 50 by 33 pixels, dark on light: uint8 [90, 140]."""
    pixels = np.full((90, 140), 250, dtype=np.uint8)
    pixels[20:26, 70:100] = 10  # its bar
    for y in range(26, 70):
        pixels[y, 97 - (y - 26) // 2 : 103 - (y - 26) // 2] = 10
    return pixels


def read_digit(image, file, **options):
    image.save(file, **options)
    return evaluate.read_digit(file)["digit"].astype(float)


def test_an_own_digit_becomes_one_of_mnists(tmp_path):
    digit = read_digit(Image.fromarray(a_seven()), tmp_path / "7.png")
    ys, xs = digit.nonzero()
    assert np.ptp(ys) == 19  # 50 by 33 pixels were fitted into 20x20
    assert np.ptp(xs) == pytest.approx(12, abs=1)
    moments = (np.indices((28, 28)) * digit).sum(axis=(1, 2))
    centre = moments / digit.sum()
    assert np.abs(centre - 13.5).max() < 1
    assert len(np.unique(digit)) > 20  # grey levels, as MNIST has them


def test_the_kept_weights_read_own_digits(tmp_path):
    """The first command of README's lesson 1, with a 7 and a 2."""
    Image.fromarray(a_seven()).save(tmp_path / "7.png")
    photograph(tmp_path / "2.png", TWO)
    archive = HERE / "results" / "alexcaps-ddp-reconstruction"
    files = (tmp_path / "7.png", tmp_path / "2.png")
    printed = output_of(evaluated(archive, "--image", *files, "--out", tmp_path))
    assert f"{files[0]}: 7, lengths" in printed
    assert f"{files[1]}: 2, lengths" in printed
    assert "unsure" not in printed


def test_own_digits_may_have_any_format(tmp_path):
    """A 7 in any size and colour format becomes the same 28x28 picture."""
    pixels = a_seven()
    light = Image.fromarray(pixels)
    expected = read_digit(light, tmp_path / "expected.png")
    images = {"light on dark": Image.fromarray(255 - pixels)}
    images["rgb"] = light.convert("RGB")
    images["16 bits"] = Image.fromarray(pixels.astype(np.uint16) * 256)
    images["palette"] = light.convert("P")
    for colour in ("black", "white"):  # ink on transparent paper
        images[colour] = Image.new("RGBA", light.size, colour)
        images[colour].putalpha(Image.fromarray(255 - pixels))
    seen = {}
    for name, image in images.items():
        seen[name] = read_digit(image, tmp_path / f"{name}.png")
    turned = light.resize((4000, 2571))
    turned = turned.transpose(Image.Transpose.ROTATE_90)  # as phones save it
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    seen["phone"] = read_digit(turned, tmp_path / "phone.jpg", exif=exif)
    for name, digit in seen.items():
        assert np.abs(digit - expected).mean() < 4, name


def test_a_picture_without_a_digit_is_one_line(tmp_path, reported):
    file = tmp_path / "photo.png"
    command = (reported[0], "--out", tmp_path / "out", "--image", file)
    file.write_text("no image")
    assert_one_line(evaluated(*command), "photo.png is not an image", "PNG, JPEG")
    Image.new("L", (50, 50), "white").save(file)
    assert_one_line(evaluated(*command), "no digit can be seen")
    Image.new("L", (5000, 2), "white").save(file)
    assert_one_line(evaluated(*command), "too long and thin")


def test_no_part_of_an_own_digit_is_cut_off():
    """MNIST centres the ink. A thick bar over a thin stem would end below the picture."""
    seven = np.zeros((40, 24))
    seven[:10] = 1
    seven[:, -2:] = 1
    for turns in range(4):  # the stem points down, right, up and left
        digit = evaluate.as_mnist(np.rot90(seven, turns))
        used = [np.ptp(indices) + 1 for indices in digit.nonzero()]
        assert sorted(used) == [12, 20], turns


TWO = [(250, 170), (280, 130), (340, 120), (375, 160), (360, 210), (240, 350), (385, 345)]
BODY = [(270, 140), (262, 215), (330, 205), (375, 260), (350, 330), (245, 345)]  # of a 5
LIGHT = {  # the share of the light that comes from pixel x, y of 640 by 480
    "lined paper": lambda x, y: 1 - 0.4 * ((y + x // 40) % 45 < 3),
    "squared paper": lambda x, y: 1 - 0.4 * (((y + x // 40) % 45 < 3) | ((x - y // 40) % 45 < 3)),
    "red margin": lambda x, y: 1 - 0.5 * (abs(x - y // 30 - 300) < 3),
    "sheet on a desk": lambda x, y: 1 - 0.7 * ((abs(x + y / 9 - 350) > 230) | (abs(y - 240) > 190)),
    "desk at one side": lambda x, y: 1 - 0.7 * (x + y / 20 < 120),
    "frame": lambda x, y: (x > 0) & (x < 637) & (y > 1) & (y < 479),
    "shadow of a hand": lambda x, y: 1 - 0.5 * (np.hypot(x - 480, y - 380) < 200),
    "light from one side": lambda x, y: 1 - x / 1280,
    "dark corners": lambda x, y: 1 - (np.hypot(x - 320, y - 240) / 550) ** 2,
    "box of a form": lambda x, y: 1 - 0.8 * (abs(np.maximum(abs(x - 315), abs(y - 235)) - 140) < 3),
    "circle": lambda x, y: 1 - 0.8 * (abs(np.hypot(x - 315, y - 235) - 165) < 3),
    "speck": lambda x, y: 1 - 0.9 * (np.hypot(x - 20, y - 20) < 7),
    "punch holes": lambda x, y: 1 - 0.7 * (np.hypot(x - 40, abs(y - 240) - 130) < 14),
}


def photograph(file, *strokes, light=None, width=24, box=None):
    """Photograph strokes, each a list of points (x, y), in this light; read the photo.

    `box` is the part that the photo shows: left, top, right and bottom.
    """
    page = Image.new("L", (640, 480))
    for points in strokes:
        ImageDraw.Draw(page).line(points, fill=255, width=width, joint="curve")
    y, x = np.indices((480, 640))
    photo = 240 * (1 - 0.85 * np.asarray(page) / 255)
    if light is not None:
        photo = photo * light(x, y)
    image = Image.fromarray(photo.astype(np.uint8))
    if box is not None:
        image = image.crop(box)
    image.save(file)
    return evaluate.read_digit(file)


def difference(one, other):
    """The mean difference of two digits in grey levels, 0 to 255.

    (The mean of the strokes above is 25.)
    """
    return np.abs(one["digit"].astype(float) - other["digit"]).mean()


@pytest.mark.parametrize("kind", LIGHT)
def test_a_digit_is_read_from_any_paper_in_any_light(kind, tmp_path):
    clean = photograph(tmp_path / "clean.png", TWO)
    found = photograph(tmp_path / "photo.png", TWO, light=LIGHT[kind])
    assert difference(found, clean) < 4
    assert found["doubts"] == []
    assert clean["doubts"] == []


def test_parts_of_a_digit_stay_together(tmp_path):
    whole = photograph(tmp_path / "whole.png", BODY, [(270, 140), (370, 135)])
    parts = photograph(tmp_path / "parts.png", BODY, [(293, 140), (370, 135)])
    body = photograph(tmp_path / "body.png", BODY)
    assert difference(parts, whole) < 4
    assert difference(body, whole) > 4
    assert parts["doubts"] == []


def test_a_digit_may_fill_the_picture(tmp_path):
    """With thick strokes and no margin, there is as much ink as paper."""
    whole = photograph(tmp_path / "whole.png", TWO, width=40)
    tight = photograph(tmp_path / "tight.png", TWO, width=40, box=(219, 97, 408, 372))
    assert difference(tight, whole) < 4


def test_a_line_across_the_picture_may_be_a_digit(tmp_path):
    one = photograph(tmp_path / "1.png", [(320, 0), (330, 480)], width=8)
    ys, xs = one["digit"].nonzero()
    assert np.ptp(ys) == 19
    assert np.ptp(xs) < 4


def test_doubts_about_a_digit_are_said(tmp_path):
    def doubts(*strokes, **more):
        return photograph(tmp_path / "photo.png", *strokes, **more)["doubts"]

    beside = [(x + 200, y) for x, y in TWO]
    assert doubts(TWO, beside) == ["several candidates"]
    assert doubts(TWO, beside, [(385, 345), (450, 170)]) == ["wider than a digit"]
    assert doubts(TWO, box=(0, 0, 640, 300)) == ["ink at the edge of the picture"]
    assert doubts([(320, 240), (320, 250)], width=8) == ["very small"]
    stripes = [[(x, 0), (x, 480)] for x in range(20, 640, 80)]
    assert "as much ink as paper" in doubts(*stripes, width=40)


def test_many_own_digits_are_pages(tmp_path, reported, monkeypatch):
    photograph(tmp_path / "0.png", TWO)
    photograph(tmp_path / "1.png", TWO, [(x + 200, y) for x, y in TWO])
    photograph(tmp_path / "2.png", TWO)
    images = [tmp_path / f"{k}.png" for k in range(3)]
    v = torch.zeros(3, 10, 16)
    v[:, :, 0] = 0.1  # the lengths of the capsules
    v[:, 2, 0] = 0.9
    v[2, 7, 0] = 0.6
    monkeypatch.setattr(evaluate, "outputs", lambda model, digits, title: v)
    monkeypatch.setattr(evaluate, "DIGITS_PER_PAGE", 2)
    out = tmp_path / "out"
    printed = output_of(evaluated(reported[0], "--out", out, "--image", *images))
    first, second, third = printed.splitlines()[:3]
    assert first.startswith(f"{images[0]}: 2, lengths 0.10 0.10 0.90")
    assert "unsure" not in first
    assert second.endswith(", unsure: several candidates")
    assert third.endswith(", unsure: no clear winner")
    pages = {page.name for page in out.iterdir()}
    assert pages == {"own-digits.png", "own-digits-2.png"}
    for page in out.iterdir():
        with Image.open(page) as picture:
            assert picture.width < 1500
            assert picture.height < 2500
    images[2].write_text("no image")  # one bad file: no answer, no page
    result = evaluated(reported[0], "--out", tmp_path / "none", "--image", *images)
    assert_one_line(result, "2.png is not an image")
    assert result[1] == ""
    assert list((tmp_path / "none").iterdir()) == []
