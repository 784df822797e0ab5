"""Tests of this folder and of the two pages, part of `python -m pytest -q`.

Intervals are compared with scipy and with textbooks, verdicts and claims with invented
runs, and the pages with what results/ holds.
"""

import functools
import inspect
import json
import math
import os
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

# This comes first: importing test_models hides GPUs and a stale RANK from the scripts.
from test_models import (
    ALEX,
    CPU,
    SMALL,
    assert_one_line,
    both_networks,
    call,
    contents,
    reproducible,  # noqa: F401 - a fixture that every test here uses
    run_python,
    single,
    weights,
)

# isort: split
import capsules
import data
import evaluate
import train_single
from alexcaps import AlexCapsNet
from results import benchmark, claims, plain, tables

HERE = Path(__file__).parent
ROOT = HERE.parent
README = (ROOT / "README.md").read_text()

# -- benchmark.py --------------------------------------------------------------------


def test_capsule_formulations_agree():
    found = benchmark.formulations(3, CPU, compiled=False, n=20)
    assert set(found) == {"ours", "einsum", "tiled weights"}
    v, du, dw = found["ours"]()
    assert v.shape == (3, 10, 16)
    assert du.shape == (3, 20, 8)
    assert dw.shape == (20, 8, 160)
    # Training uses TF32 on a GPU; the check must not.
    torch.set_float32_matmul_precision("high")
    benchmark.check_same(found)
    assert torch.get_float32_matmul_precision() == "highest"


def test_quick_benchmark_writes_json(tmp_path, monkeypatch):
    """One part at a time. Each leaves the file's other parts alone."""
    file = tmp_path / "speed-cpu.json"
    file.write_text('{"by hand": {"hardware": "", "torch": "", "rows": []}}')
    for part in benchmark.PARTS:
        flags = ("--quick", "--device", "cpu", "--only", part, "--out", tmp_path)
        code, printed, error = call(benchmark, *flags)
        assert code == 0, error
    result = json.loads(file.read_text())
    parts = ["by hand", "capsules", "steps", "data"]
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1:
        parts.append("scaling")
    assert list(result) == parts
    assert tables.speed_text(result) in printed
    before = file.read_text()
    monkeypatch.setitem(benchmark.PARTS, "scaling", lambda *_: [])  # cannot be measured here
    code, _, error = call(benchmark, *flags)
    assert code == 0, error
    assert file.read_text() == before


# -- plain.py ------------------------------------------------------------------------


@both_networks
def test_a_plain_network_has_the_capsule_networks_convolutions(network):
    capsule_net = network().eval()
    torch.manual_seed(0)
    plain_network = plain.PlainResNet
    if network is AlexCapsNet:
        plain_network = plain.PlainAlexNet
    net = plain_network(3).eval()
    ours = net.state_dict()
    theirs = capsule_net.state_dict()
    assert ours.keys() - theirs.keys() == {"digits.bias"}
    for name in theirs:
        if not name.startswith("digits"):
            assert torch.equal(ours[name], theirs[name]), name
    images = torch.randn(2, 1, net.side, net.side)
    x = capsule_net.primary.conv(capsule_net.features(images))
    x = x.clamp(min=0).flatten(1)
    logits = x @ ours["digits.weight"].T + ours["digits.bias"]
    torch.testing.assert_close(net(images), logits)


def test_a_plain_network_is_trained_and_evaluated_by_the_scripts(tmp_path):
    run = tmp_path / "run"
    flags = ("--model", "plain-alexcaps", *SMALL[2:], "--epochs", 1, "--run-dir", run)
    with mock.patch.dict(train_single.MODELS):
        for command in (("train_single.py", *flags), ("evaluate.py", run)):
            code, _, error = call(plain, *command)
            assert code == 0, error
    assert_one_line(single("--resume", run), "another network")
    net = plain.PlainAlexNet().eval()
    net.load_state_dict(weights(run, "best.pt"))
    images, labels = data.load("digits", "", "validation")
    with torch.no_grad():
        logits = net(data.images_to_input(images, net))
    loss = F.cross_entropy(logits, labels).item()
    row = torch.load(run / "last.pt")["history"][0]
    assert row["val_loss"] == pytest.approx(loss, rel=1e-4)
    report = json.loads((run / "report.json").read_text())
    assert report["test_images"] == 360
    assert "coupling_to_true" not in report


def test_a_plain_network_has_no_decoder(tmp_path):
    flags = ("--model", "plain-alexcaps", *SMALL[2:], "--run-dir", tmp_path / "run")
    with mock.patch.dict(train_single.MODELS):
        result = call(plain, "train_single.py", *flags, "--reconstruction", 1)
    assert_one_line(result, "--reconstruction", "no capsule to draw from")
    assert not (tmp_path / "run").exists()


def test_plain_leaves_the_report_of_a_capsule_network(tmp_path):
    run = Path(shutil.copytree(HERE / "alexcaps-ddp", tmp_path / "run"))
    before = contents(run)
    with mock.patch.dict(train_single.MODELS):
        result = call(plain, "evaluate.py", run)
    assert_one_line(result, "has capsules", "python evaluate.py")
    assert contents(run) == before


def test_plain_names_its_scripts():
    assert_one_line(call(plain, *ALEX), "the script is missing", "train_ddp.py")


# -- claims.py -----------------------------------------------------------------------


def test_intervals_are_those_of_textbooks():
    a = [99.1, 99.3, 99.2]
    b = [98.9, 99.0, 98.6]
    theirs = stats.ttest_ind(a, b).confidence_interval()
    assert claims.over_seeds(a, b) == pytest.approx((11 / 30, *theirs))
    # By hand: the deviations are 0.1 and 0.1, so their squares are 0.02, over
    # 2 + 1 - 2 degrees of freedom; t(0.975, 1) = 12.7062
    half = 12.7062 * math.sqrt(0.02 * (1 / 2 + 1))
    by_hand = (0.2, 0.2 - half, 0.2 + half)
    assert claims.over_seeds([1.1, 1.3], [1.0]) == pytest.approx(by_hand, rel=1e-5)
    _, low, high = claims.of_mean(b)
    theirs = stats.ttest_1samp(b, 0).confidence_interval()
    assert (low, high) == pytest.approx(theirs)
    # Newcombe 1998, table II (b), method 10: 9 of 10 minus 3 of 10
    by_newcombe = (60, 17.05, 80.90)
    assert claims.over_images(90, 30, 10) == pytest.approx(by_newcombe, abs=0.01)


def test_rounds_are_compared_one_by_one():
    """Twice as fast in both rounds, although the machine's own speed has doubled."""
    estimate = claims.ratio("", [2.0, 4.0], [1.0, 2.0])
    assert estimate == ("", 2, 2, 2, "2 rounds")


WITHIN = (1, 0.5, 1.5)  # value, low, high; the claim holds from 0 to 2
ABOVE = (3, 2.5, 3.5)
BELOW = (-1, -1.5, -0.5)
ON_LOW_BOUND = (0.2, -0.1, 0.5)
ON_HIGH_BOUND = (1.9, 1.5, 2.3)
ON_BOTH_BOUNDS = (1, -1, 3)


@pytest.mark.parametrize(
    ("verdict", "figures", "deciding"),
    [
        ("agree", [WITHIN], 0),
        ("agree", [WITHIN, WITHIN], 0),
        ("disagree", [ABOVE], 0),
        ("disagree", [BELOW], 0),
        ("disagree", [WITHIN, ON_LOW_BOUND, ABOVE], 2),
        ("undecided", [ON_LOW_BOUND], 0),
        ("undecided", [ON_HIGH_BOUND], 0),
        ("undecided", [ON_BOTH_BOUNDS], 0),
        ("undecided", [WITHIN, ON_LOW_BOUND], 1),
        ("not measured", [], None),
    ],
)
def test_verdicts_respect_intervals(verdict, figures, deciding):
    """`deciding` is the place of the first estimate that has the verdict by itself."""
    estimates = []
    for place, (value, low, high) in enumerate(figures):
        estimates.append(claims.Estimate(str(place), value, low, high, ""))
    claim = claims.Claim("", "", estimates, 0, 2, "", "")
    assert claim.verdict == verdict
    if deciding is None:
        assert claim.deciding is None
    else:
        assert claim.deciding is estimates[deciding]


KEYS = (
    "fast",
    "end",
    "alexcaps",
    "rescaps",
    "time",
    "alexcaps ddp",
    "rescaps ddp",
    "ddp",
    "scarce",
)
UNDER_DDP = {"world_size": 2, "precision": "bf16"}


def row(accuracies, after_epoch_1=98.0, **settings):
    """A row like those of evaluate.make_rows, with all that the claims read."""
    runs = []
    for k in range(len(accuracies)):
        runs.append({"history": [{"val_accuracy": after_epoch_1 + k / 100}]})
    usual = evaluate.USUAL | {
        "train_images": 55_000,
        "world_size": 1,
        "precision": "fp32",
        "epochs": 20,
        "flops_per_image": 200,
        "runs": runs,
        "values": {"accuracy": accuracies},
    }
    return usual | settings


def measured():
    """Runs and speeds that decide most claims -> kept, scaling."""
    kept = {
        "alexcaps-single": row([99.5, 99.6, 99.7], 99.0),
        "alexcaps-ddp": row([99.5, 99.6, 99.7], 98.6, **UNDER_DDP),
        "rescaps-single": row([99.0, 99.1, 99.2], 98.0, flops_per_image=100),
        "rescaps-ddp": row([99.0], 98.5, flops_per_image=100, **UNDER_DDP),
        "rescaps-single-cuda": row([99.0, 99.1, 99.2]),
        "rescaps-ddp-cuda": row([99.0, 99.1, 99.2]),
    }
    one = [100.0, 101.0, 99.0]  # images/s, round by round
    ddp = [160.0, 164.0, 158.0]
    scaling = [
        {"network": "alexcaps", "precision": "fp32", "one": one, "ddp": ddp},
        {"network": "alexcaps", "precision": "bf16", "one": one, "ddp": ddp},
        {"network": "rescaps", "precision": "fp32", "one": [2 * x for x in one]},
    ]
    return kept, scaling


def judged(kept, scaling=()):
    """{key: row of the table} for each of the nine claims."""
    rows = tables.claim_rows(claims.report_claims(kept, scaling))
    return dict(zip(KEYS, rows, strict=True))


def test_claims_get_verdicts():
    verdicts = {key: found["verdict"] for key, found in judged(*measured()).items()}
    assert verdicts == {
        "fast": "agree",
        "end": "disagree",
        "alexcaps": "disagree",
        "rescaps": "agree",
        "time": "agree",
        "alexcaps ddp": "agree",
        "rescaps ddp": "not measured",
        "ddp": "undecided",
        "scarce": "agree",
    }


def test_claims_say_what_they_rest_on():
    found = judged(*measured())
    # 3 seeds each, deviation 0.1: t(0.975, 4) = 2.776 times 0.1 sqrt(2 / 3) = 0.227
    assert found["end"]["short"] == "single: -0.50 points (-0.73 to -0.27)"
    assert found["end"]["agree if"] == "+0.10 to +2.00 points"
    assert found["fast"]["agree if"] == "+0.00 points or more"
    assert found["fast"]["n"] == "3 + 3; 3 + 1"
    assert found["ddp"]["n"] == "3 + 3; 1 + 3; 3 + 3"
    last = found["ddp"]["measured"].split("; ")[-1]
    assert last == "res-cuda: +0.00 points (-0.23 to +0.23)"
    assert found["alexcaps ddp"]["n"] == "3 rounds"
    assert found["alexcaps ddp"]["short"].startswith("bf16: 0.80 of ideal (0.7")
    assert found["time"]["n"] == "3 rounds"
    assert found["time"]["short"] == "fp32: 2.00x"
    costs = found["scarce"]["measured"].split("; ")
    assert costs == ["FLOPs: 0.50x", "fp32, time: 0.50x"]


def test_one_run_each_is_judged_over_images():
    kept = {
        "alexcaps-single": row([99.5]),
        "alexcaps-ddp": row([99.5]),
        "rescaps-single": row([99.4]),
        "rescaps-ddp": row([99.4]),
    }
    found = judged(kept)
    setups = found["end"]["measured"].split("; ")
    assert len(setups) == 2
    assert found["end"]["n"] == "1 + 1, 10,000 images"  # the same n: given once
    assert found["end"]["verdict"] == "undecided"


def test_unlike_runs_are_not_compared():
    """ResCapsNet has fewer epochs in one setup, and another learning rate in the other."""
    alex = row([99.5, 99.6, 99.7])
    kept = {
        "alexcaps-single": alex,
        "alexcaps-single-cuda": alex,
        "alexcaps-ddp": alex,
        "alexcaps-ddp-cuda": alex,
        "rescaps-single": row([99.0], epochs=10),
        "rescaps-ddp": row([99.0], lr=0.01),
    }
    found = judged(kept)
    for key in ("end", "ddp"):  # "ddp" is about both networks
        assert found[key]["verdict"] == "not measured"
        assert found[key]["short"] == ""
    assert found["fast"]["n"] == "3 + 1"  # after epoch 1 both have trained for as long


# -- tables.py -----------------------------------------------------------------------


def run_to_keep(folder, finished=20, **changes):
    """The first epochs of results/alexcaps-single as a run of its own, with changes."""
    ignored = shutil.ignore_patterns("*.png")
    shutil.copytree(HERE / "alexcaps-single", folder, ignore=ignored)
    rows = (folder / "metrics.csv").read_text().splitlines()
    rows = rows[: finished + 1]  # with the heading
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"epochs": finished, "data_dir": str(folder)} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return evaluate.read_run(folder)


def keep(run, overwrite=False):
    tables.keep(run, tables.place(run, overwrite))


@pytest.fixture
def empty_results(tmp_path, monkeypatch):
    """An empty folder in place of results/."""
    monkeypatch.setattr(tables, "HERE", tmp_path / "results")
    return tmp_path / "results"


def test_a_kept_run_is_whole_and_names_no_path(empty_results, tmp_path):
    run = run_to_keep(tmp_path / "a" / "alexcaps-single")
    keep(run)
    keep(run)  # an equal run may replace it
    kept = empty_results / "alexcaps-single"
    assert contents(kept).keys() == contents(run["folder"]).keys()
    assert str(tmp_path) not in (kept / "config.json").read_text()


@pytest.mark.parametrize("lesser", [{"finished": 19}, {"train_images": 20_000}])
def test_a_kept_run_is_not_replaced_by_a_lesser_one(lesser, empty_results, tmp_path):
    keep(run_to_keep(tmp_path / "a" / "alexcaps-single"))
    kept = empty_results / "alexcaps-single"
    before = contents(kept)
    run = run_to_keep(tmp_path / "b" / "alexcaps-single", **lesser)
    with pytest.raises(data.UserError, match="--overwrite"):
        keep(run)
    assert contents(kept) == before
    keep(run, overwrite=True)
    assert contents(kept) != before


@pytest.mark.parametrize(
    "change, words",
    [({"dataset": "digits"}, "was not trained on MNIST"), ({"epochs": 30}, "is not finished")],
)
def test_only_finished_runs_of_mnist_are_kept(change, words, empty_results, tmp_path):
    run = run_to_keep(tmp_path / "run", **change)  # it has finished 20 epochs
    with pytest.raises(data.UserError, match=words):
        keep(run)
    run = run_to_keep(tmp_path / "without-report")
    run["report"] = None
    with pytest.raises(data.UserError, match="has no report"):
        keep(run)
    assert not empty_results.exists()


@pytest.mark.parametrize("name", ["x|y", "x\ny", "ablation", "a b", ".."])
def test_names_that_would_break_a_table_are_refused(name, empty_results, tmp_path):
    run = run_to_keep(tmp_path / "run")
    run["folder"] = tmp_path / "run" / ".." / name
    with pytest.raises(data.UserError, match="cannot be kept under its name"):
        keep(run)
    assert not empty_results.exists()


def test_one_run_is_kept_with_its_weights(empty_results, tmp_path, monkeypatch):
    run = run_to_keep(tmp_path / "alexcaps-single")
    monkeypatch.setattr(tables, "DECODER", "alexcaps-single")
    with pytest.raises(data.UserError, match="no weights"):
        keep(run)
    assert not empty_results.exists()
    network = AlexCapsNet()
    monkeypatch.setattr(evaluate, "load_network", lambda *_: network)
    keep(run)
    keep(run_to_keep(tmp_path / "alexcaps-single-seed1", seed=1))
    (file,) = empty_results.rglob("*.pt")
    assert file == empty_results / "alexcaps-single" / "weights.pt"
    for name, tensor in train_single.load_saved(file).items():
        assert torch.equal(tensor, network.state_dict()[name].half())


def test_runs_of_a_gpu_have_a_row_of_their_own(empty_results, tmp_path):
    keep(run_to_keep(tmp_path / "alexcaps-single"))
    for device in ("cpu", "cuda"):
        folder = tmp_path / device / "alexcaps-single-seed1"
        keep(run_to_keep(folder, seed=1, device=device))
    kept = tables.rows_by_name(tables.read_kept(empty_results))
    counts = {name: kept[name]["n"] for name in kept}
    assert counts == {"alexcaps-single": 2, "alexcaps-single-cuda": 1}
    # only seed 0 is drawn
    assert (empty_results / "alexcaps-single" / "lengths.npy").exists()
    assert not (empty_results / "alexcaps-single-seed1" / "lengths.npy").exists()


def test_seeds_of_one_name_have_equal_settings(empty_results, tmp_path, monkeypatch):
    keep(run_to_keep(tmp_path / "alexcaps-single"))
    before = sorted(empty_results.rglob("*"))
    other = tmp_path / "alexcaps-single-seed1"
    run_to_keep(other, finished=19, seed=1)
    monkeypatch.setattr(tables, "load", lambda *_: (None, None))  # needs MNIST
    with mock.patch.dict(train_single.MODELS):
        result = call(tables, other)
    assert_one_line(result, "the runs of", "alexcaps-single differ", "rename")
    assert sorted(empty_results.rglob("*")) == before


def test_the_ablation_needs_its_baseline(empty_results, tmp_path):
    keep(run_to_keep(tmp_path / "ablation" / "rotate-0-seed0"))
    kept = tables.rows_by_name(tables.read_kept(empty_results / "ablation"))
    assert list(kept) == ["rotate-0"]
    assert tables.ablation_table(kept) == "not measured\n"
    assert tables.difference_table(kept) == "not measured\n"


def test_a_kept_run_has_no_lengths_of_the_run_before(empty_results, tmp_path):
    keep(run_to_keep(tmp_path / "a" / "alexcaps-single"))
    kept = empty_results / "alexcaps-single"
    assert (kept / "lengths.npy").exists()
    run = run_to_keep(tmp_path / "b" / "alexcaps-single")
    (run["folder"] / "lengths.npy").unlink()
    (kept / "roc.png").write_bytes(b"of the run before")
    keep(evaluate.read_run(kept))  # a kept run that is kept again loses nothing
    assert (kept / "lengths.npy").exists()
    keep(run)
    assert not (kept / "lengths.npy").exists()
    assert not (kept / "roc.png").exists()


def test_two_runs_of_one_name_are_refused(empty_results, tmp_path, monkeypatch):
    folders = [tmp_path / name / "alexcaps-single" for name in ("a", "b")]
    for folder in folders:
        run_to_keep(folder)
    monkeypatch.setattr(tables, "load", lambda *_: (None, None))  # needs MNIST
    with mock.patch.dict(train_single.MODELS):
        assert_one_line(call(tables, *folders), "two of these runs have the same name")
    assert not empty_results.exists()


# -- README.md and results/README.md -------------------------------------------------


@pytest.fixture
def written_again(tmp_path, monkeypatch):
    """Both pages, written by `python -m results.tables` in a copy. Nothing is drawn."""
    ignored = shutil.ignore_patterns("comparison.*", "*.png", "*.py", "__pycache__")
    shutil.copytree(HERE, tmp_path / "results", ignore=ignored)
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.setattr(tables, "HERE", tmp_path / "results")
    # These need MNIST.
    monkeypatch.setattr(tables, "load", lambda *_: (mock.Mock(), mock.Mock()))
    for name in ("read_lengths", "save_pictures", "save_decoder_pictures", "save_comparison"):
        monkeypatch.setattr(evaluate, name, mock.Mock())
    with mock.patch.dict(train_single.MODELS):
        code, _, error = call(tables)
    assert code == 0, error
    return tmp_path


def test_pages_are_what_results_holds(written_again):
    """`python -m results.tables` changes nothing."""
    for page in (
        "README.md",
        "results/README.md",
        "results/comparison.md",
        "results/comparison.csv",
    ):
        assert (written_again / page).read_text() == (ROOT / page).read_text(), page


def test_runs_are_drawn_beside_their_plain_network(written_again):
    drawn = {}
    for drawing in evaluate.save_pictures.call_args_list:
        run, *_, angles = drawing.args
        drawn[run["folder"].name] = angles
    assert len(drawn) >= 4
    report = json.loads((HERE / "plain-alexcaps-ddp" / "report.json").read_text())
    assert drawn["alexcaps-ddp"] == evaluate.at_angles(report)
    assert drawn["alexcaps-single"] is None
    (drawing,) = evaluate.save_decoder_pictures.call_args_list
    assert drawing.args[0]["folder"].name == tables.DECODER


def test_readme_repeats_figures_of_results():
    text = " ".join(README.split())  # a figure may be broken across two lines
    figures = re.findall(r"[-+][\d.]+ \([-+][\d.]+ to [-+][\d.]+\)", text)
    assert len(figures) > 5
    page = (HERE / "README.md").read_text()
    for figure in figures:
        assert figure in page, figure


def test_tables_of_the_readme_are_narrow():
    found = re.findall(r"<!-- results: .*?<!-- end -->", README, re.DOTALL)
    assert len(found) == 3
    for text in found:
        assert max(map(len, text.splitlines())) <= 100


def test_results_name_no_machine():
    files = []
    for file in HERE.rglob("*"):
        if file.suffix in (".json", ".csv", ".md"):
            files.append(file)
    assert len(files) > 20
    for file in files:
        text = file.read_text()
        # no absolute path, no path in a home folder, no number of a process
        assert not re.search(r"[\"' =](/|~)\w|\bpid\b", text), file
        if file.name == "config.json":
            config = json.loads(text)
            assert config["data_dir"] == "data", file
            assert config["hardware"], file


def test_readme_quotes_the_code():
    rows = re.findall(r"\| .* \| `([\w.]+)` \| `(.+?)` \|", README)
    assert len(rows) > 5
    for name, code in rows:
        function = functools.reduce(getattr, name.split("."), capsules)
        assert code in inspect.getsource(function), (name, code)


def test_readme_counts_the_lines_of_files():
    """Roughly: a count may be off by a tenth."""
    found = re.findall(r"^\| (\[.+\)) \| ([\d, and]+) \|", README, re.MULTILINE)
    assert len(found) > 5
    for files, counts in found:
        names = re.findall(r"\]\((.+?)\)", files)
        for name, count in zip(names, counts.split(" and "), strict=True):
            lines = len((ROOT / name).read_text().splitlines())
            assert int(count.replace(",", "")) == pytest.approx(lines, rel=0.1), name


def test_the_readmes_program_learns():
    program = re.findall(r"```python\n(import torch\n.*?)```", README, re.DOTALL)[0]
    process = run_python("-c", program)
    accuracy = re.fullmatch(r"test accuracy (0\.\d+)\n", process.stdout)
    assert accuracy, process.stderr
    assert float(accuracy[1]) >= 0.95


def test_readme_marks_and_links_exist():
    for link in re.findall(r"\]\(([^)#:]+)[)#]", README):
        assert (ROOT / link).exists(), link
    tests = (ROOT / "test_models.py").read_text() + Path(__file__).read_text()
    for name in re.findall(r"`(test_\w+)", README):
        assert f"def {name}(" in tests, name
