"""Evaluate runs: the figures that a report needs, and pictures that teach. Always in float32.

    python evaluate.py runs/alexcaps-single
        prints accuracy with its 95 % interval, errors and per-class scores, and writes report.json,
        confusion_matrix.png, roc.png, curves.png, mistakes.png, rotation.png and routing.png there
    python evaluate.py runs/alexcaps-single runs/rescaps-single results/alexcaps-ddp
        writes comparison.md, .csv and .png to runs/comparison/: runs that differ only in --seed are
        one row, and each claim of the report gets a verdict; archived runs need no checkpoint

Four parts: one run's figures · several runs · the pictures · main. A run on MNIST takes half a
minute (AlexCapsNet) to a few minutes (ResCapsNet) on 2 CPU cores.
"""

import argparse
import csv
import hashlib
import io
import json
import math
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draw into files: no display needed
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import LogLocator, MaxNLocator
from sklearn import metrics
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import train_single
from capsules import capsule_lengths
from data import load, prepare
from train_single import UsageError, build_model, find_device, load_checkpoint

NAMES = {name: network.__name__ for name, network in train_single.MODELS.items()}
ANGLES = range(-90, 91, 15)  # degrees, for rotation.png
TURNED = (15, 30, 45)  # degrees whose accuracy tables show, mean of either side
ROTATED = 100  # test digits of each class for rotation.png, always the first ones
ROUTED = 20  # test digits of each class whose couplings are averaged for routing.png
TARGET = 98.0  # percent of the validation images: "has converged"
ENDED = 10  # epochs, those of the report's shorter runs: before, no run tells how training ends
REPORT_ACCURACY = {  # THE REPORT'S figures, not ours: (model, several devices?): (percent, epochs)
    ("alexcaps", True): (96.28, 20),
    ("alexcaps", False): (98.06, 10),
    ("rescaps", True): (97.86, 10),
    ("rescaps", False): (98.70, 20),
}

# -- 1. One run: its figures ---------------------------------------------------------------------


def read_run(folder: Path) -> dict:
    """folder, config and history of a run; UsageError if it is no run, or damaged."""
    config, path = train_single.load_config(folder), folder / "metrics.csv"
    needed = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds")
    try:
        with open(path, newline="") as file:  # blank (memory on a CPU): None
            table = list(csv.DictReader(file))
        history = [{k: float(v) if v else None for k, v in row.items()} for row in table]
        whole = history and all(math.isfinite(row[name]) for row in history for name in needed)
    except (OSError, ValueError, TypeError, KeyError, csv.Error):
        whole = False
    if not whole or "device_count" not in config:
        raise UsageError(f"{folder} holds no finished epoch, or its config or metrics are damaged")
    return {"folder": folder, "config": config, "history": history}


def wilson(correct: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of an accuracy, in percent. p ± z sqrt(p (1 - p) / n) fails near 100 %."""
    p, shrink = correct / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def first_of_each_class(labels: Tensor, count: int) -> Tensor:
    """Indices of the first `count` digits of each class (or as many as all classes have)."""
    count = min(count, int(labels.bincount(minlength=10).min()))
    return torch.cat([(labels == digit).nonzero()[:count, 0] for digit in range(10)])


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, batch_size: int, angle: float = 0) -> Tensor:
    """uint8 [n, 28, 28], turned by `angle` degrees -> class scores [n, 10]: capsule lengths."""
    device, lengths = next(model.parameters()).device, []
    bar = {"desc": f"test digits at {angle}°", "leave": False, "disable": None}
    for batch in tqdm(images.to(device).split(batch_size), **bar):
        degrees = torch.full([len(batch)], float(angle), device=device) if angle else None
        lengths.append(capsule_lengths(model(prepare(batch, model, degrees))).cpu())
    return torch.cat(lengths)


@torch.inference_mode()
def coupling_coefficients(model: nn.Module, images: Tensor, batch_size: int) -> np.ndarray:
    """c_ij of every routing iteration, [T, n, J, N]; over the digits j they sum to one."""
    batches = images.to(next(model.parameters()).device).split(batch_size)
    routed = [model(prepare(batch, model), return_couplings=True)[1] for batch in batches]
    return torch.cat([torch.stack(couplings).cpu() for couplings in routed], dim=1).numpy()


def routing_summary(couplings: np.ndarray, labels: np.ndarray) -> dict:
    """Per iteration: the mean coupling to the true digit, and the couplings' entropy in bits.

    10 equal couplings have log2(10) = 3.3219 bits; a capsule that has decided for one digit has 0.
    """
    to_true = couplings[:, np.arange(len(labels)), labels]  # [T, n, J, N] -> [T, n, N]
    bits = -(couplings * np.log2(np.maximum(couplings, 1e-30))).sum(axis=2)  # -> [T, n, N]
    to_true, bits = (x.mean(axis=(1, 2), dtype=float).round(5).tolist() for x in (to_true, bits))
    return {"images": len(labels), "coupling_to_true": to_true, "entropy_bits": bits}


def count_flops(model: nn.Module) -> int:
    """Operations of one image's forward pass: convolutions and matrix products, x * y + z is 2."""
    image = torch.zeros(1, 28, 28, dtype=torch.uint8, device=next(model.parameters()).device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(prepare(image, model))
    return counter.get_total_flops()


def classification_metrics(lengths: np.ndarray, labels: np.ndarray) -> dict:
    """Scores [n, 10], labels [n] -> accuracy, per-class scores, AUC, confusion (row: true)."""
    n, predicted, digits = len(labels), lengths.argmax(axis=1), {"labels": range(10)}
    errors, one_vs_rest = int((predicted != labels).sum()), labels[:, None] == np.arange(10)
    scores = metrics.precision_recall_fscore_support(labels, predicted, zero_division=0, **digits)
    # lengths, no softmax: AUC asks only for the ORDER of the images by their score for a digit
    auc = metrics.roc_auc_score(one_vs_rest, lengths, average=None)
    names = ("precision", "recall", "f1", "images", "auc")
    table = np.round(np.transpose([*scores, auc]), 6).tolist()
    return {
        "test_images": n,
        "errors": errors,
        "accuracy": round(100 * (n - errors) / n, 4),
        "interval_95": [round(bound, 4) for bound in wilson(n - errors, n)],
        "per_class": [{"digit": k, **dict(zip(names, row))} for k, row in enumerate(table)],
        "auc_macro": round(float(auc.mean()), 6),
        "auc_micro": round(float(metrics.roc_auc_score(one_vs_rest, lengths, average="micro")), 6),
        "confusion": metrics.confusion_matrix(labels, predicted, **digits).tolist(),
    }


def fingerprint(path: Path) -> str:
    """SHA-256 of a checkpoint: tells whether a report was made of this very one."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def evaluate_run(run: dict, args: argparse.Namespace, out: Path) -> dict:
    """Everything about one run: the report, written with its pictures to `out`, and handed back."""
    config, best = run["config"], run["folder"] / "best.pt"
    checkpoint, model = load_checkpoint(best, config), build_model(config)
    try:
        model.load_state_dict(checkpoint["model"])
        kept = {f"kept_{key}": checkpoint["best"][key] for key in ("epoch", "val_accuracy")}
    except (RuntimeError, KeyError, TypeError):
        raise UsageError(f"{best} does not fit the network as it is in this repository") from None
    # channels_last: [B, H, W, C] in memory, the faster layout for convolutions
    model.to(find_device(args.device), memory_format=torch.channels_last).eval()
    images, labels = load(config["dataset"], args.data_dir or config["data_dir"], "test")
    lengths = predict(model, images, args.batch_size).numpy()
    turned, rotation = first_of_each_class(labels, ROTATED), {}
    for angle in ANGLES:
        predicted = predict(model, images[turned], args.batch_size, angle).argmax(dim=1)
        rotation[str(angle)] = round(100 * (predicted == labels[turned]).float().mean().item(), 3)
    routed = first_of_each_class(labels, ROUTED)
    couplings = coupling_coefficients(model, images[routed], args.batch_size)
    images, labels = images.numpy(), labels.numpy()
    report = {
        **{key: config[key] for key in ("model", "dataset", "seed")},
        "checkpoint": fingerprint(best),
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_per_image": count_flops(model),
        **kept,
        **classification_metrics(lengths, labels),
        "rotation": {"images": len(turned), "accuracy": rotation},
        "routing": routing_summary(couplings, labels[routed]),
    }
    types = model.primary.conv.out_channels // model.primary.dim  # capsules at each place
    draw_confusion(report, out)
    draw_roc(report, lengths, labels, out)
    draw_curves(report, run["history"], out)
    draw_mistakes(report, lengths, labels, images, out)
    draw_rotation(report, config["rotate"], out)
    draw_routing(report, couplings, images[routed], labels[routed], types, out)
    train_single.write_atomically(out / "report.json", json.dumps(report, indent=1) + "\n")
    return report


def report_text(r: dict) -> str:
    """The report as it is printed."""
    (low, high), line = r["interval_95"], "{digit:5}  {precision:11.4f}{recall:11.4f}{f1:11.4f}"
    lines = ((line + "{auc:11.4f}{images:9.0f}\n").format(**row) for row in r["per_class"])
    return (
        f"{NAMES[r['model']]}, kept after epoch {r['kept_epoch']}, {r['dataset']}\n"
        f"test accuracy {r['accuracy']:.2f} % (95 % interval {low:.2f} to {high:.2f}), "
        f"{r['errors']} errors in {r['test_images']:,} images\n\n"
        f"digit    precision     recall         F1        AUC   images\n{''.join(lines)}\n"
        f"AUC macro {r['auc_macro']:.5f}, micro {r['auc_micro']:.5f}; "
        f"entropy of the couplings {arrows(r['routing']['entropy_bits'])} bits\n"
        f"{r['parameters']:,} parameters, {r['flops_per_image'] / 1e6:,.0f} million FLOPs per image"
    )


def arrows(values: list[float]) -> str:
    return " → ".join(f"{value:.4f}" for value in values)


# -- 2. Several runs: one row for the runs that differ only in their seed ------------------------

# What runs may do otherwise than the scripts do by themselves
USUAL = vars(train_single.build_parser("").parse_args([])) | train_single.FIXED
CHANGES = (
    *("accumulation_steps", "sync_bn", "lr", "rotate", "shift", "routing_iterations", "compile"),
)
# Runs alike in these, and in the number of finished epochs, differ only in their seed: one row.
SETTINGS = (
    *("model", "script", "dataset", "world_size", "precision", "effective_batch", "batch_size"),
    *(*CHANGES, "train_images", "device_name"),
)
# Rows are compared only if they are alike: in what is learned from, in what makes a step ...
LEARNED = ("dataset", "train_images", "rotate", "shift", "routing_iterations", "lr")
STEP = ("world_size", "effective_batch", "precision")
MACHINE = ("hardware", "compile")  # ... and, for times, in what computes it
# Columns of comparison.csv: heading and number format in comparison.md
RUN_COLUMNS = {
    "model": ("model", ""),
    "setup": ("setup", ""),
    "precision": ("precision", ""),
    "effective_batch": ("effective batch", ""),
}
RESULT_COLUMNS = RUN_COLUMNS | {
    "train_images": ("training images", ","),
    "epochs": ("epochs", ""),
    "runs": ("runs", ""),
    "val_accuracy": ("validation accuracy in %", ".2f"),
    "accuracy": ("**test accuracy in %**", ".2f"),
    "interval_low": ("95 % interval from", ".2f"),
    "interval_high": ("to", ".2f"),
    "report_accuracy": ("the report's", ".2f"),
    "report_epochs": ("its epochs", ""),
    "errors": ("errors", ".4g"),
    "best_epoch": ("best epoch", ".3g"),
    "epochs_to_target": (f"epochs to {TARGET:g} % validation", ".3g"),
}
COST_COLUMNS = RUN_COLUMNS | {
    "hardware": ("hardware", ""),
    "device_count": ("devices", ""),
    "world_size": ("processes", ""),
    "parameters": ("parameters", ","),
    "flops_per_image": ("FLOPs per image (forward)", ","),
    "images_per_second": ("images/s (training)", ",.0f"),
    "seconds_per_epoch": ("seconds per epoch", ",.1f"),
    "peak_memory_mib": ("peak memory in MiB", ",.0f"),
    "speed_up": ("speed-up over one device", ".2f"),
}


# What the tables take from a report
NEEDED = (
    "accuracy",
    "errors",
    "test_images",
    "kept_epoch",
    "parameters",
    "flops_per_image",
    "rotation",
)


def read_report(run: dict) -> dict | None:
    """report.json; None if missing or of another checkpoint. An archived run must have one."""
    path, best = run["folder"] / "report.json", run["folder"] / "best.pt"
    try:
        report = json.loads(path.read_text())
        ours = all(report[k] == run["config"][k] for k in ("model", "dataset", "seed"))
        ours = ours and set(NEEDED) <= report.keys()
        for angle in TURNED:
            turned(report, angle)  # fails where it is missing
        if ours and (not best.exists() or report["checkpoint"] == fingerprint(best)):
            return report
    except (OSError, ValueError, KeyError, TypeError):
        pass  # as good as no report
    if not best.exists():
        raise UsageError(f"without {best}, a whole report.json of this run must be there")
    return None


def make_rows(runs: list[dict]) -> list[dict]:
    """Runs with their reports -> rows, sorted; then what only a look at all rows can tell."""
    groups: dict[tuple, dict] = {}
    for run in runs:
        key = (*(run["config"].get(name) for name in SETTINGS), len(run["history"]))
        twin = groups.setdefault(key, {}).setdefault(run["config"]["seed"], run)
        if twin is not run:
            raise UsageError(f"{twin['folder']} and {run['folder']}: same settings, same seed")
    rows = [summarise(list(seeds.values())) for seeds in groups.values()]
    rows.sort(key=lambda row: (row["model"], row["world_size"], row["script"] != "single"))
    for row in rows:
        row["setup"] = ", ".join([row["setup"], *unusual(row)])
        row["speed_up"] = speed_up(row, rows)
    return rows


def unusual(config: dict) -> list[str]:
    """What a run does otherwise than the scripts do by themselves, as flags: "--shift 2" ..."""
    flags = [name for name in CHANGES if config[name] != USUAL[name]]
    values = ("" if config[name] is True else f" {config[name]:g}" for name in flags)
    return [f"--{name.replace('_', '-')}{value}" for name, value in zip(flags, values)]


def summarise(runs: list[dict]) -> dict:
    """One row: the config of its first run, and means with standard deviations over all."""
    config, report, histories = runs[0]["config"], runs[0]["report"], [r["history"] for r in runs]
    n, ranks = report["test_images"], config["world_size"]
    cores = f", {config['cores']} cores" if config["device"] == "cpu" else ""
    stated = REPORT_ACCURACY[config["model"], ranks > 1] if config["dataset"] == "mnist" else ()
    row = (
        config
        | dict(zip(("report_accuracy", "report_epochs"), stated or (None, None)))
        | {
            "model": NAMES[config["model"]],
            "many": ranks > 1,
            "histories": histories,
            "setup": "single" if config["script"] == "single" else f"DDP on {ranks}",
            "hardware": config["device_name"] + cores,
            "epochs": len(histories[0]),
            "runs": len(runs),
            **{name: report[name] for name in ("test_images", "parameters", "flops_per_image")},
        }
    )

    def over_epochs(column: str, function) -> list[float | None]:
        table = [[epoch.get(column) for epoch in history] for history in histories]
        return [None if None in values else function(values) for values in table]

    reached = ([e["epoch"] for e in h if e["val_accuracy"] >= TARGET] for h in histories)
    figures = {
        "accuracy": [run["report"]["accuracy"] for run in runs],
        "errors": [run["report"]["errors"] for run in runs],
        "val_accuracy": [max(epoch["val_accuracy"] for epoch in history) for history in histories],
        "best_epoch": [run["report"]["kept_epoch"] for run in runs],
        "epochs_to_target": [min(epochs, default=math.inf) for epochs in reached],
        **{f"turned_{a}": [turned(run["report"], a) for run in runs] for a in TURNED},
        # the median over epochs: the first one warms up, or compiles
        "images_per_second": over_epochs("images_per_second", statistics.median),
        "seconds_per_epoch": over_epochs("seconds", statistics.median),
        "peak_memory_mib": over_epochs("peak_memory_mib", max),  # blank on a CPU
    }
    for name, values in figures.items():
        row[name] = None if None in values else statistics.mean(values)
        many = len(values) > 1 and None not in values and math.inf not in values
        row[f"{name}_std"] = statistics.stdev(values) if many else None  # of the sample: n - 1
    row["interval_low"], row["interval_high"] = wilson(row["accuracy"] * n / 100, n)
    return row


def turned(report: dict, angle: int) -> float:
    """A run's accuracy on the digits turned by this angle, mean of either way (rotation.png)."""
    accuracy = report["rotation"]["accuracy"]
    return (accuracy[str(angle)] + accuracy[str(-angle)]) / 2


def alike(a: dict, b: dict, *names: str) -> bool:
    return all(a.get(name) == b.get(name) for name in names)


def speed_up(row: dict, rows: list[dict]) -> float | None:
    """images/s over one process on one device of the same kind; None where none is comparable.

    Processes that share a device are no faster device; another batch is another computation.
    """
    same = ("model", "effective_batch", "precision", *LEARNED, *MACHINE)
    single = [r for r in rows if r["world_size"] == 1 and alike(row, r, *same)]
    if row["world_size"] == 1 or row["device_count"] < row["world_size"] or not single:
        return None
    return row["images_per_second"] / single[0]["images_per_second"]  # train_single.py's is first


# -- the report's claims: each function measures one in the rows: (value, the figures as text) --


class NotMeasured(Exception):
    """The runs given cannot tell; the message says why."""


ALEX, RES = ({"model": name} for name in NAMES.values())


def best_pair(rows: list[dict], first: dict, second: dict, *same: str) -> tuple[dict, dict]:
    """Two rows, one with what `first` says, one with `second`; the longest and most equal pair."""

    def merit(pair: tuple[dict, dict]) -> tuple:
        (a, b), common = pair, min(row["epochs"] for row in pair)
        equal = [alike(a, b, name) for name in ("epochs", *STEP)]
        return min(common, ENDED), *equal, -a["world_size"], a["train_images"], common

    ours, others = ([row for row in rows if alike(row, x, *x)] for x in (first, second))
    pairs = [(a, b) for a in ours for b in others if alike(a, b, *same)]
    if not pairs:
        raise NotMeasured(f"no such runs{' alike in ' * bool(same)}{', '.join(same)}")
    return max(pairs, key=merit)


def conditions(row: dict) -> str:
    names = ("setup", "precision", "effective_batch", "train_images", "hardware")
    return "{}, {}, batch {}, {:,} images, {}".format(*(row[name] for name in names))


def ended(rows: list[dict]) -> list[dict]:
    """The rows of runs that are long enough; NotMeasured if one of the networks has none."""
    long = [row for row in rows if row["epochs"] >= ENDED]
    if len({row["model"] for row in long}) < len(NAMES):
        raise NotMeasured(f"needs runs of both networks, of at least {ENDED} epochs")
    return long


def validation_until(row: dict, epoch: int) -> float:
    """Best validation accuracy of the first `epoch` epochs, mean over seeds."""
    return statistics.mean(max(e["val_accuracy"] for e in h[:epoch]) for h in row["histories"])


def difference(pair: tuple[dict, dict], epochs: int = 0) -> tuple[float, str]:
    """Accuracy of the first row minus the second, after equally many epochs, in points.

    The first epochs of a longer run are what a shorter run would have been (same learning rates);
    only there is no test accuracy for them, so the best validation accuracy is taken.
    """
    common = epochs or min(row["epochs"] for row in pair)
    (x, y), what = (row["accuracy"] for row in pair), "test"
    if any(row["epochs"] > common for row in pair) or epochs:
        (x, y), what = (validation_until(row, common) for row in pair), "validation"
    how = " / ".join(dict.fromkeys(conditions(row) for row in pair))
    runs = " and ".join(str(row["runs"]) for row in pair)
    figures = f"{x:.2f} % - {y:.2f} % = {x - y:+.2f} points"
    return x - y, f"{figures} ({what}, epoch {common}, {runs} run(s), {how})"


def parameters(rows: list[dict], model: dict) -> tuple[float, str]:
    row, _ = best_pair(rows, model, model)
    return row["parameters"], f"{row['parameters']:,}"


def epoch_time(rows: list[dict]) -> tuple[float, str]:
    same = (*LEARNED, *STEP, *MACHINE, "threads", "device_count")
    alex, res = best_pair(rows, ALEX, RES, *same)
    a, r = alex["seconds_per_epoch"], res["seconds_per_epoch"]
    return a / r, f"{a:,.1f} s / {r:,.1f} s = {a / r:.2f} ({conditions(alex)})"


def scaling(rows: list[dict], model: dict) -> tuple[float, str]:
    found = [row for row in rows if alike(row, model, "model") and row["speed_up"]]
    if not found:
        raise NotMeasured("no DDP run with a device for each process and a like run on one device")
    row = max(found, key=lambda row: row["world_size"])
    share = row["speed_up"] / row["world_size"]
    return share, f"{row['speed_up']:.2f} / {row['world_size']} = {share:.2f} ({conditions(row)})"


def ddp_change(rows: list[dict]) -> tuple[float, str]:
    both = (best_pair(rows, m | {"many": True}, m | {"many": False}, *LEARNED) for m in (ALEX, RES))
    changes = [(*difference(pair), pair[0]["model"]) for pair in both]
    return min(x for x, *_ in changes), "; ".join(f"{name} {text}" for _, text, name in changes)


CLAIMS = (  # the report's claim, our metric, when we agree: in words and in code; what measures it
    (
        "AlexCapsNet converges faster",
        "validation accuracy after epoch 1, minus ResCapsNet's",
        "above 0 points",
        lambda x: x > 0,
        lambda rows: difference(best_pair(rows, ALEX, RES, *LEARNED, *STEP), epochs=1),
    ),
    (
        "ResCapsNet ends slightly more accurate",
        "test accuracy, ResCapsNet minus AlexCapsNet",
        "0.1 to 2 points",
        lambda x: 0.1 <= x <= 2,
        lambda rows: difference(best_pair(ended(rows), RES, ALEX, *LEARNED, *STEP)),
    ),
    (
        "AlexCapsNet has tens of millions of parameters",
        "its parameters",
        "10 million or more",
        lambda x: x >= 10e6,
        lambda rows: parameters(rows, ALEX),
    ),
    (
        "ResCapsNet has a few million parameters",
        "its parameters",
        "1 to 10 million",
        lambda x: 1e6 <= x <= 10e6,
        lambda rows: parameters(rows, RES),
    ),
    (
        "AlexCapsNet is about 2x slower per epoch",
        "seconds per epoch, AlexCapsNet / ResCapsNet",
        "1.5 to 2.5",
        lambda x: 1.5 <= x <= 2.5,
        epoch_time,
    ),
    (
        "distributed training helps AlexCapsNet significantly",
        "speed-up / devices",
        "0.75 or more",
        lambda x: x >= 0.75,
        lambda rows: scaling(rows, ALEX),
    ),
    (
        "distributed training helps ResCapsNet moderately",
        "speed-up / devices",
        "0.55 to 0.75",
        lambda x: 0.55 <= x < 0.75,
        lambda rows: scaling(rows, RES),
    ),
    (
        "both do well under DDP",
        "test accuracy, DDP minus one process",
        "-0.3 points or better, for both",
        lambda x: x >= -0.3,
        ddp_change,
    ),
)


def judge(rows: list[dict]) -> list[tuple[str, str, str, str, str]]:
    """(claim, metric, threshold, the figures used, verdict) for each claim of the report."""
    judged = []
    for text, metric, threshold, agree, measure in CLAIMS:
        try:
            value, figures = measure(rows)  # rounded below, as 99.4 - 99.3 is 0.1 + 8e-15
            verdict = "agree" if agree(round(value, 6)) else "disagree"
        except NotMeasured as reason:
            figures, verdict = str(reason), "not measured"
        judged.append((text, metric, threshold, figures, verdict))
    return judged


# -- tables: Markdown as strings, for comparison.md and for a README --


def table(header: list[str], lines: list) -> str:
    lines = [header, [":--"] + [":-:"] * (len(header) - 1), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(row: dict, name: str, form: str) -> str:
    """A figure ± its standard deviation over seeds; blank where unknown."""
    value, std = row[name], row.get(f"{name}_std")
    if value is None or value == math.inf:
        return "" if value is None else f"more than {row['epochs']}"
    return f"{value:{form}}" + (f" ± {std:{form}}" if std is not None else "")


def results_table(rows: list[dict], columns: dict = RESULT_COLUMNS) -> str:
    lines = [[cell(row, name, form) for name, (_, form) in columns.items()] for row in rows]
    return table([heading for heading, _ in columns.values()], lines)


def cost_table(rows: list[dict]) -> str:
    return results_table(rows, COST_COLUMNS)


def claims_table(rows: list[dict]) -> str:
    return table(["the report's claim", "metric", "agree if", "measured", "verdict"], judge(rows))


def comparison_text(rows: list[dict]) -> str:
    """comparison.md."""
    n, runs = rows[0]["test_images"], sum(row["runs"] for row in rows)
    return (
        f"# Comparison of {runs} runs on {rows[0]['dataset']}\n\n"
        f"## Accuracy on {n:,} test images\n\n{results_table(rows)}\n"
        "Runs that differ only in their seed form one row: mean ± standard deviation. The interval "
        f"(Wilson) says how far {n:,} images alone leave the accuracy open.\n\n"
        f"## Size and speed\n\n{cost_table(rows)}\n"
        "A speed-up is given only over one device with the same hardware, precision, effective "
        "batch and images, and only where each process has its own device.\n\n"
        f"## The report's claims\n\n{claims_table(rows)}"
    )


def comparison_csv(rows: list[dict]) -> str:
    """comparison.csv: the rows with every column; blank where unknown, inf for never reached."""
    columns = [*(RESULT_COLUMNS | COST_COLUMNS), *(f"turned_{angle}" for angle in TURNED)]
    columns += [f"{name}_std" for name in columns if f"{name}_std" in rows[0]]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:  # .10g: 99.4 and not 99.39999999999999
        writer.writerow({k: f"{v:.10g}" if type(v) is float else v for k, v in row.items()})
    return text.getvalue()


# -- 3. The pictures: sized for a slide, colours that colour-blind readers can tell apart --------

# Okabe and Ito's palette, without its yellow, which is too pale for lines on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BLUE, RED, ORANGE = COLOURS[0], COLOURS[1], COLOURS[4]
GREY = {"color": "grey", "linestyle": ":"}  # lines to compare with
plt.rcParams |= {
    "font.size": 14,
    "axes.titlesize": 15,
    "legend.fontsize": 12,
    "lines.linewidth": 2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "savefig.dpi": 100,
    "figure.constrained_layout.use": True,
}


def save(figure, title: str, path: Path) -> None:
    figure.suptitle(title)
    figure.savefig(path)
    plt.close(figure)


def over_epochs_axis(axis, epochs: int, accuracy: bool) -> None:
    """Whole epochs; y logarithmic: equal steps are equal factors. Of an accuracy the ERROR is
    drawn, downwards, and labelled with the accuracy: so 90, 99 and 99.9 % lie evenly."""
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set(xlabel="epoch", xlim=(0.7, epochs + 0.3), yscale="log")
    low, high = axis.get_ylim()
    axis.set_ylim((1.3 * high, low / 1.3) if accuracy else (low / 1.3, 1.3 * high))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter(lambda y, _: f"{100 - y if accuracy else y:g}")
    axis.minorticks_off()


def error(accuracy) -> np.ndarray:
    return np.maximum(100 - np.asarray(accuracy), 0.01)  # a logarithmic axis has no place for 0


def draw_confusion(report: dict, out: Path) -> None:
    """Which digits are taken for which: counts, true by predicted; colour shows the errors only."""
    confusion = np.array(report["confusion"])
    wrong = confusion * (1 - np.eye(10, dtype=int))
    figure, axis = plt.subplots(figsize=(8, 7.8))
    image = axis.imshow(wrong, cmap="Blues", vmin=0, vmax=max(2, wrong.max()))
    for i, j in np.argwhere(confusion > 0):
        style = {"weight": "bold"} if i == j else {}
        style["color"] = "white" if wrong[i, j] > 0.55 * wrong.max() else "black"
        axis.text(j, i, confusion[i, j], ha="center", va="center", **style)
    figure.colorbar(image, label="wrong digits", shrink=0.8, ticks=MaxNLocator(integer=True))
    axis.set(xlabel="predicted digit", ylabel="true digit", xticks=range(10), yticks=range(10))
    axis.grid(False)
    title = f"{NAMES[report['model']]}: {report['errors']} errors in {report['test_images']:,}"
    i, j = np.unravel_index(wrong.argmax(), wrong.shape)
    often = f",\nmost often {i} taken for {j}: {wrong[i, j]} times" if wrong.any() else ""
    save(figure, f"{title} test digits{often}", out / "confusion_matrix.png")


def draw_roc(report: dict, lengths: np.ndarray, labels: np.ndarray, out: Path) -> None:
    """What a threshold on a length trades: digits found against false alarms, one digit a curve.

    Near-perfect curves all hug one corner: the right half enlarges it.
    """
    figure, (whole, corner) = plt.subplots(1, 2, figsize=(12, 5.8), width_ratios=(1, 1.2))
    left, lowest = 0.5 / len(labels), 1.0  # a logarithmic axis has no 0: it is drawn at `left`
    for digit, row in enumerate(report["per_class"]):
        false, true, _ = metrics.roc_curve(labels == digit, lengths[:, digit])
        style = {"color": COLOURS[digit % 5], "linestyle": "-" if digit < 5 else "--"}
        whole.plot(false, true, label=f"{digit}: {row['auc']:.5f}", **style)
        corner.step(np.maximum(false, left), true, where="post", **style)
        lowest = min(lowest, true[false <= 1e-3].max())
    whole.plot([0, 1], [0, 1], **GREY)
    whole.set(title="all thresholds", xlabel="false positive rate", ylabel="true positive rate")
    whole.legend(title="digit: AUC", loc="lower right", ncols=2, framealpha=1)
    low = max(0.0, 1 - 1.6 * (1 - lowest)) if lowest < 1 else 0.99
    corner.set(xscale="log", xlim=(left, 1), ylim=(low, 1 + 0.02 * (1 - low)))
    corner.set(title="the same, enlarged", xlabel="false positive rate (logarithmic; left edge: 0)")
    auc = f"AUC {report['auc_macro']:.5f} (macro), {report['auc_micro']:.5f} (micro)"
    save(figure, f"{NAMES[report['model']]}: one digit against the rest, {auc}", out / "roc.png")


def draw_curves(report: dict, history: list[dict], out: Path) -> None:
    """How training went. Validation may look better: its digits are not augmented, and it comes
    after the epoch. The gap to training grows when digits are learned by heart."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.2))
    epochs, kept = range(1, len(history) + 1), report["kept_epoch"]
    styles = {
        "train": {"color": BLUE, "label": "training (as augmented, while learning)"},
        "val": {"color": RED, "label": "validation", "linestyle": "--"},
    }
    for part, style in styles.items():
        axes[0].plot(epochs, [row[f"{part}_loss"] for row in history], marker="o", **style)
        correct = [row[f"{part}_accuracy"] for row in history]
        axes[1].plot(epochs, error(correct), marker="o", **style)
    axes[0].set_ylabel("margin loss (logarithmic)")
    axes[1].set_ylabel("accuracy in % (stretched)")
    for axis in axes:
        over_epochs_axis(axis, len(history), accuracy=axis is axes[1])
        axis.axvline(kept, label="kept: best.pt", **GREY)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    best = f"{report['kept_val_accuracy']:.2f} % after epoch {kept} of {len(history)}"
    title = f"{NAMES[report['model']]}: best validation accuracy {best}"
    save(figure, title, out / "curves.png")


def worst_first(lengths: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Indices of the wrong digits, by how much longer the wrong capsule is than the right one."""
    excess = lengths.max(axis=1) - lengths[np.arange(len(labels)), labels]
    order = np.argsort(-excess, kind="stable")
    return order[lengths.argmax(axis=1)[order] != labels[order]]


def draw_mistakes(report: dict, lengths, labels, images, out: Path) -> None:
    """The worst mistakes, as many as fit on a page: would YOU have known?"""
    order = worst_first(lengths, labels)[:40]
    rows = max(1, math.ceil(len(order) / 8))
    figure, axes = plt.subplots(rows, 8, figsize=(11, 1.2 + 1.75 * rows), squeeze=False)
    for axis in axes.flat[len(order) :]:
        axis.set_axis_off()
    for axis, index in zip(axes.flat, order):
        axis.imshow(images[index], cmap="gray_r")
        true, predicted = labels[index], lengths[index].argmax()
        both = f"{lengths[index, true]:.2f} → {lengths[index, predicted]:.2f}"
        axis.set_title(f"{true} → {predicted}\n{both}", fontsize=13)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(visible=True, color="grey")  # ties the text to the digit below it
    which = "all of them" if len(order) == report["errors"] else f"the worst {len(order)}"
    title = f"{NAMES[report['model']]}: {report['errors']} of {report['test_images']:,} test digits"
    text = "true → predicted class, and the lengths of both capsules"
    save(figure, f"{title} wrong; {which}\n{text}", out / "mistakes.png")


def draw_rotation(report: dict, trained: float, out: Path) -> None:
    """How far a network generalises to angles that it has not seen in training."""
    n, accuracy = report["rotation"]["images"], report["rotation"]["accuracy"]
    values = [accuracy[str(angle)] for angle in ANGLES]
    low, high = zip(*(wilson(value * n / 100, n) for value in values))
    figure, axis = plt.subplots(figsize=(10, 6))
    text = f"angles seen in training: ±{trained:g}°"
    axis.axvspan(-trained, trained, color=ORANGE, alpha=0.3, linewidth=0, label=text)
    axis.fill_between(ANGLES, low, high, color=BLUE, alpha=0.2, linewidth=0, label="95 % interval")
    axis.plot(ANGLES, values, color=BLUE, marker="o")
    axis.axhline(10, label="guessing: 10 %", **GREY)
    axis.set(xlabel="rotation in degrees (positive: counter-clockwise)", ylabel="accuracy in %")
    axis.set(xticks=ANGLES[::2], ylim=(0, 103), xlim=(-92, 92))
    figure.legend(loc="outside lower center", ncols=3)
    means = ", ".join(f"{turned(report, angle):.1f} % at ±{angle}°" for angle in (30, 60, 90))
    title = f"{NAMES[report['model']]}: {accuracy['0']:.1f} % upright, {means}"
    text = f"(the same {n:,} test digits at each angle, {n // 10} of each class)"
    save(figure, f"{title}\n{text}", out / "rotation.png")


def draw_routing(report: dict, couplings, images, labels, types: int, out: Path) -> None:
    """What routing does, iteration by iteration: a map of couplings, or their histogram."""
    side = math.isqrt(couplings.shape[3] // types)  # of the map of primary capsules
    draw = draw_routing_maps if side > 2 else draw_routing_histograms
    bits, to_true = report["routing"]["entropy_bits"], report["routing"]["coupling_to_true"]
    title = (
        f"{NAMES[report['model']]}: routing takes {100 * (1 - bits[-1] / bits[0]):.2g} % of the "
        f"couplings' entropy away, {arrows(bits)} bits\n"
        f"mean coupling to the true digit {arrows(to_true)} ({len(labels)} digits)"
    )
    save(draw(couplings, images, labels, side), title, out / "routing.png")


def draw_routing_maps(couplings: np.ndarray, images, labels: np.ndarray, side: int):
    """WHERE capsules turn to the true digit: coupling at each place, one digit of each class."""
    chosen, rows = [int(np.argmax(labels == k)) for k in range(10)], len(couplings) + 1
    # [T, n, J, N] -> [T, 10, N] -> mean over the types of a place, as N counts places, then types
    maps = couplings[:, chosen, range(10)].reshape(rows - 1, 10, side, side, -1).mean(axis=4)
    low, high = maps.min(), max(maps.max(), maps.min() + 1e-6)
    figure, axes = plt.subplots(rows, 10, figsize=(13, 1.15 * rows + 2), squeeze=False)
    for k, column in enumerate(axes.T):
        column[0].imshow(images[chosen[k]], cmap="gray_r")
        for axis, values in zip(column[1:], maps[:, k]):
            shown = axis.imshow(values, cmap="cividis", vmin=low, vmax=high)
    for t, axis in enumerate(axes[:, 0]):
        text = f"iteration {t}" if t else "digit"
        axis.set_ylabel(text, rotation=0, ha="right", va="center")
    plt.setp(axes.flat, xticks=[], yticks=[], frame_on=False)
    bar = figure.colorbar(shown, ax=axes, location="bottom", aspect=50, shrink=0.7)
    bar.set_label(f"coupling to the true digit ({low:.3f} to {high:.3f}; 0.1 is an equal share)")
    return figure


def draw_routing_histograms(couplings: np.ndarray, images, labels: np.ndarray, side: int):
    """HOW MANY capsules turn to the true digit: how often each coupling occurs."""
    size = {"figsize": (2 + 3.6 * len(couplings), 5.4), "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(1, len(couplings), **size)
    bins = np.linspace(couplings.min(), max(couplings.max(), couplings.min() + 0.01), 51)
    is_true = labels[:, None] == np.arange(10)  # [n, J]
    for t, (axis, c) in enumerate(zip(axes[0], couplings), start=1):  # c [n, J, N]
        for values, text, colour in (
            (c[~is_true].ravel(), "to nine others", BLUE),
            (c[is_true].ravel(), "to the true digit", RED),
        ):
            style = {"weights": np.full(len(values), 100 / len(values)), "color": colour}
            axis.hist(values, bins, histtype="stepfilled", alpha=0.3, **style)
            axis.hist(values, bins, histtype="step", linewidth=2, label=text, **style)
        axis.axvline(0.1, label="equal share: 0.1", **GREY)
        axis.set(title=f"iteration {t}", xlabel=f"coupling ({c.min():.3f} to {c.max():.3f})")
    axes[0, 0].set(yscale="log", ylabel="couplings in % (logarithmic)", ylim=(0.003, 150))
    axes[0, 0].yaxis.set_major_formatter("{x:g}")
    axes[0, 0].legend(loc="upper right")
    return figure


def draw_comparison(rows: list[dict], out: Path) -> None:
    """Fewer epochs are not always less time: validation accuracy over both; bands for seeds."""
    size = (12, 5.2 + 0.3 * len(rows))  # with space for the legend
    figure, axes = plt.subplots(1, 2, figsize=size, sharey=True)
    forms = {"precision": "{}", "effective_batch": "batch {}", "train_images": "{:,} images"}
    forms = {k: v for k, v in forms.items() if len({row[k] for row in rows}) > 1}
    for k, row in enumerate(rows):
        curves = [[epoch["val_accuracy"] for epoch in history] for history in row["histories"]]
        curves = np.array(curves)  # [runs, epochs]
        special = (form.format(row[name]) for name, form in forms.items())
        label = ", ".join([row["model"], row["setup"], *special])
        style = {"color": COLOURS[k % len(COLOURS)], "marker": "os^vD"[k % 5], "label": label}
        style["linestyle"] = "-" if row["world_size"] == 1 else "--"
        epochs = np.arange(1, row["epochs"] + 1)
        for axis, x in zip(axes, (epochs, epochs * row["seconds_per_epoch"] / 60)):
            axis.plot(x, error(curves.mean(axis=0)), **style)
            seeds = error(curves.min(axis=0)), error(curves.max(axis=0))
            axis.fill_between(x, *seeds, color=style["color"], alpha=0.15)
    over_epochs_axis(axes[0], max(row["epochs"] for row in rows), accuracy=True)
    axes[0].set_ylabel("validation accuracy in % (stretched)")
    axes[1].set(xlabel="training time in minutes (epochs x median epoch)", xlim=(0, None))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center")
    best = max(rows, key=lambda row: row["accuracy"])
    title = f"Highest test accuracy: {best['model']}, {best['setup']}, {best['accuracy']:.2f} %"
    epochs = f"{best['epochs']} epoch{'s' * (best['epochs'] > 1)}"
    save(figure, f"{title} after {epochs}", out / "comparison.png")


# -- 4. Main -------------------------------------------------------------------------------------


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = train_single.Parser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    flag, positive = parser.add_argument, train_single.number(int, 1, 10**6)
    flag("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    flag("--out", type=Path, help="(default: the run's folder; for several runs: runs/comparison)")
    flag("--device", help="cpu, cuda, cuda:1 ... (default: the GPU if there is one)")
    flag("--batch-size", type=positive, default=250, help="images at a time (default: 250)")
    flag("--data-dir", help="folder with MNIST/raw (default: where it was in training)")
    args = parser.parse_args()
    # Training may use TF32 on a GPU; a report may not: 10 bits of mantissa instead of 23.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    find_device(args.device)  # all mistakes that can be seen at once are told before any work
    runs = [read_run(folder) for folder in args.runs]
    if len(datasets := {run["config"]["dataset"] for run in runs}) > 1:
        names = " and ".join(sorted(datasets))
        raise UsageError(f"runs on {names}: accuracies on different images cannot be compared")
    reports = [read_report(run) for run in runs] if len(runs) > 1 else []
    out = args.out or (Path("runs/comparison") if reports else args.runs[0])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {out}: {error.strerror}") from None
    if not reports:
        print(report_text(evaluate_run(runs[0], args, out)))
        pictures = "confusion_matrix, roc, curves, mistakes, rotation, routing"
        print(f"written to {out}: report.json and, as .png, {pictures}")
        return
    for run, report in zip(runs, reports):  # one without a report of its checkpoint is evaluated
        run["report"] = report or evaluate_run(run, args, run["folder"])
    rows = make_rows(runs)
    train_single.write_atomically(out / "comparison.md", comparison_text(rows))
    train_single.write_atomically(out / "comparison.csv", comparison_csv(rows))
    draw_comparison(rows, out)
    print(f"{comparison_text(rows)}\nwritten to {out}: comparison.md, .csv and .png")


if __name__ == "__main__":
    train_single.run_main(main)
