"""Evaluate runs: the figures of a report, and pictures. Always in float32.

    python evaluate.py runs/alexcaps-single                       a report
    python evaluate.py runs/alexcaps-single runs/rescaps-single   a comparison
    python evaluate.py runs/alexcaps-single --image photo.jpg     own digits

Files go to the run's folder. A comparison needs the reports of its runs, and
goes to runs/comparison; runs that differ only in --seed are one row in it. A
run without best.pt is drawn anew from its report.json and lengths.npy. On 2 CPU
cores a run on MNIST takes half a minute to a few.
"""

import argparse
import csv
import io
import json
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn import metrics
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import train_single
from data import UserError, images_to_input, load
from train_single import MODELS, write_file

plt.switch_backend("Agg")  # draw into files: no display needed
BATCH = 250  # images at a time
ANGLES = range(-90, 91, 15)  # degrees, for rotation.png
ROTATED = 100  # test digits of each class for rotation.png, always the first ones
ROUTED = 20  # test digits of each class whose couplings are averaged for routing.png
EDGES = np.linspace(0, 1, 201)  # of the bins in a histogram of couplings
PLACES = {"alexcaps": 2 * 2, "rescaps": 9 * 9}  # of the map of primary capsules

# -- 1. One run: its figures -----------------------------------------------------------------------


def wilson(correct: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of an accuracy, in percent. p ± z sqrt(p (1 - p) / n) fails near 100 %."""
    p, shrink = correct / n, 1 + z * z / n  # z = 1.96: 95 % of a normal distribution
    centre = (p + z * z / (2 * n)) / shrink  # a little nearer to 50 % than p
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def first_of_each_class(labels: Tensor, count: int) -> Tensor:
    """Indices of the first `count` digits of each class, of all equally many: 0s, then 1s, ..."""
    count = min(count, int(labels.bincount(minlength=10).min()))  # the rarest class has
    return torch.cat([(labels == digit).nonzero()[:count, 0] for digit in range(10)])


@torch.inference_mode()
def predict(model, images: Tensor, batch_size=BATCH, angle=0) -> Tensor:
    """uint8 [n, 28, 28], turned by `angle` degrees -> the model's class scores, [n, 10]."""
    device, predicted = next(model.parameters()).device, []
    bar = {"desc": f"test digits at {angle} degrees", "leave": False, "disable": None}
    for batch in tqdm(images.to(device).split(batch_size), **bar):
        degrees = torch.full([len(batch)], float(angle), device=device) if angle else None
        outputs = model(images_to_input(batch, model, degrees))
        predicted.append(model.scores(outputs).cpu())
    return torch.cat(predicted)


def rotation_accuracy(model, images: Tensor, labels: Tensor) -> dict:
    """Accuracy in percent at each of the ANGLES, always of the same digits."""
    chosen, accuracy = first_of_each_class(labels, ROTATED), {}
    for angle in ANGLES:
        right = predict(model, images[chosen], BATCH, angle).argmax(dim=1) == labels[chosen]
        accuracy[str(angle)] = round(100 * right.float().mean().item(), 3)
    return {"images": len(chosen), "accuracy": accuracy}


@torch.inference_mode()
def routing_summary(model: nn.Module, images: Tensor, labels: Tensor, places: int) -> dict:
    """What routing.png needs of the couplings; images come class by class, equally many of each."""
    batches = images.to(next(model.parameters()).device).split(BATCH)
    routed = [model(images_to_input(batch, model), return_couplings=True)[1] for batch in batches]
    c = torch.cat([torch.stack(couplings).cpu() for couplings in routed], dim=1)  # [T, n, J, N]
    true = c[:, torch.arange(len(labels)), labels]  # those to the true digit: [T, n, N]
    others = c[-1, labels.unsqueeze(1) != torch.arange(10)]  # of the last iteration: [9n, N]
    # WHERE do capsules turn to the true digit? [n, N] -> [10, n/10, places, capsules] -> mean
    maps = true[-1].view(10, len(labels) // 10, places, -1).double().mean(dim=(1, 3))
    # HOW MANY do? How often, in percent, each coupling occurs, to the true digit and to others
    percent = [100 * np.histogram(part, EDGES)[0] / part.numel() for part in (true[-1], others)]
    return {
        "coupling_to_true": true.double().mean(dim=(1, 2)).numpy().round(5).tolist(),
        "coupling_maps": maps.numpy().round(5).tolist(),
        "coupling_histograms": np.round(percent, 5).tolist(),
    }


def count_flops(model: nn.Module) -> int:
    """Operations of one image's forward pass: convolutions and matrix products, x * y + z is 2."""
    image = torch.zeros(1, 28, 28, dtype=torch.uint8, device=next(model.parameters()).device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images_to_input(image, model))
    return counter.get_total_flops()


def classification_metrics(scores: np.ndarray, labels: np.ndarray) -> dict:
    """Scores [n, 10], labels [n] -> errors, accuracy, AUC, confusion matrix (row: true digit)."""
    n, predicted = len(labels), scores.argmax(axis=1)
    errors = int((predicted != labels).sum())
    # Lengths, no softmax: AUC asks only for the ORDER of the images by their score for a digit.
    auc = metrics.roc_auc_score(labels[:, None] == np.arange(10), scores, average=None)
    return {
        "test_images": n,
        "errors": errors,
        "accuracy": round(100 * (n - errors) / n, 4),
        "interval_95": [round(bound, 4) for bound in wilson(n - errors, n)],
        "auc": auc.round(6).tolist(),
        "confusion": metrics.confusion_matrix(labels, predicted, labels=range(10)).tolist(),
    }


def load_network(run: dict, device: torch.device) -> nn.Module:
    """The network of a run with the weights of its best epoch, ready to evaluate."""
    config, best = run["config"], run["folder"] / "best.pt"
    # Training may use TF32 on a GPU; a report may not: 10 bits of mantissa instead of 23.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    checkpoint = train_single.load_checkpoint(best)
    if checkpoint["history"][-1:] != [run["best"]]:  # stopped between two files
        raise UserError(f"{best} is not of the best epoch in metrics.csv: resume the run first")
    try:
        model = train_single.make_network(config)
        model.load_state_dict(checkpoint["model"])
    except RuntimeError:  # other names or shapes
        raise UserError(f"{best} does not fit the network as it is in this repository") from None
    return model.to(device, memory_format=torch.channels_last).eval()  # [B, H, W, C]: faster


def measure(run: dict, model, images: Tensor, labels: Tensor) -> tuple:
    """The figures of any network, for report.json, and its scores [n, 10] of the test digits."""
    best, predicted = run["best"], predict(model, images).numpy()
    report = {"kept_epoch": best["epoch"], "kept_val_accuracy": best["val_accuracy"]}
    report["parameters"] = sum(p.numel() for p in model.parameters())
    report["flops_per_image"] = count_flops(model)
    report |= classification_metrics(predicted, labels.numpy())
    return report | {"rotation": rotation_accuracy(model, images, labels)}, predicted


def report_text(run: dict) -> str:
    """The report as it is printed."""
    report, (low, high) = run["report"], run["report"]["interval_95"]
    # The confusion matrix says how often each pair (true, predicted) occurred: the pairs again
    counts = np.array(report["confusion"], dtype=int).ravel()  # [100]
    pairs = np.indices((10, 10)).reshape(2, 100).repeat(counts, axis=1)  # [2, 10000]
    return (
        f"{describe(run)}, on {run['config']['dataset']}, kept after epoch {report['kept_epoch']}\n"
        f"test accuracy {report['accuracy']:.2f} % (95 % interval {low:.2f} to {high:.2f}), "
        f"{report['errors']} errors in {report['test_images']:,} images\n\n"
        f"{metrics.classification_report(*pairs, labels=range(10), digits=4, zero_division=0)}\n"
        f"AUC {np.mean(report['auc']):.5f} (mean over the digits), {report['parameters']:,} "
        f"parameters, {report['flops_per_image'] / 1e6:,.0f} million FLOPs per image"
    )


# -- 2. Several runs -------------------------------------------------------------------------------

# The settings that a run may change, with what they usually are
USUAL = {"batch_size": 32, "accumulation_steps": 1, "lr": 0.001, "rotate": 10.0, "shift": 0.0}
USUAL |= {"routing_iterations": 3, "reconstruction": 0.0, "compile": False, "sync_bn": False}
SETTINGS = ("model", "dataset", "script", "precision", "world_size", "epochs", "train_images")
SETTINGS += tuple(USUAL)  # runs alike in all of this are one row


def at_angles(report: dict) -> list[float]:
    """The accuracies on turned digits in a report of any network."""
    return [report["rotation"]["accuracy"][str(angle)] for angle in ANGLES]


def read_run(folder: Path) -> dict:
    """folder, config, history, best row and report of a run; UserError if it is none, or damaged.

    The report is None if it is missing or of an epoch before, but best.pt is there to make one of.
    """
    try:
        config = train_single.DEFAULTS | json.loads((folder / "config.json").read_text())
        if config["model"] not in MODELS:
            cure = "plain ones: python -m results.plain evaluate.py RUN"
            raise UserError(f"{folder} is of another network, {config['model']} ({cure})")
        with open(folder / "metrics.csv", newline="") as file:
            history = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        for epoch, row in enumerate(history, start=1):
            row["epoch"] = epoch  # a whole number
        if not history:
            raise UserError(f"{folder} has no finished epoch yet: --resume goes on with it")
        best = max(history, key=lambda row: row["val_accuracy"])  # in best.pt; the earliest
        file = folder / "report.json"
        report = json.loads(file.read_text()) if file.exists() else {}
        kept = report.get("kept_epoch"), report.get("kept_val_accuracy")
    except (OSError, ValueError, KeyError, TypeError) as error:  # a file that is none of ours
        raise UserError(f"{folder} holds no run, or is damaged: {error}") from None
    if kept != (best["epoch"], best["val_accuracy"]):
        if not (folder / "best.pt").exists():
            raise UserError(f"{folder} has neither best.pt nor a report of its best epoch")
        report = None
    return {"folder": folder, "config": config, "history": history, "best": best, "report": report}


def describe(run: dict) -> str:
    """What tells a run from others, but for the seed: "AlexCapsNet, one device, 20 epochs"."""
    config, epochs = run["config"], len(run["history"])
    n, precision = config["world_size"], config["precision"]
    many = f"{n} process{'es' * (n > 1)} in {precision}"
    place = "one device" if config["script"] == "single" else many
    words = [MODELS[config["model"]].__name__, place]
    words += ["GPU"] if config["device"].startswith("cuda") else []
    for name, usual in USUAL.items():
        if config[name] != usual:
            words.append(f"{name.replace('_', ' ')} {config[name]:g}")
    images = "digits" if config["dataset"] == "digits" else "images"
    part = config.get("train_size") or images == "digits"
    of = f" of {config['train_images']:,} {images}" if part else ""
    return ", ".join([*words, f"{epochs} epoch{'s' * (epochs > 1)}{of}"])


def make_rows(runs: list[dict]) -> list[dict]:
    """Runs with their reports -> one row for those that differ only in their seed, sorted.

    Of each figure a row has the mean, its deviation NAME_std (None for one run), and all values.
    """
    groups, rows = {}, []
    for run in runs:
        kind = run["config"]["device"].split(":")[0], len(run["history"])  # cpu or cuda
        settings = tuple(run["config"][name] for name in SETTINGS)
        groups.setdefault((*kind, *settings), []).append(run)  # alike but for the seed
    for group in groups.values():
        if len({run["config"]["seed"] for run in group}) < len(group):
            folder = group[-1]["folder"]
            raise UserError(f"{folder} has settings and seed of another run: leave one out")
        reports = [run["report"] for run in group]
        row = {"name": describe(group[0]), "n": len(group), "runs": group}
        row |= {name: group[0]["config"][name] for name in SETTINGS}
        row |= {k: reports[0][k] for k in ("test_images", "parameters", "flops_per_image")}
        values = {name: [report[name] for report in reports] for name in ("accuracy", "errors")}
        values["val_accuracy"] = [run["best"]["val_accuracy"] for run in group]
        turned = np.array([at_angles(report) for report in reports])  # [runs, angles]
        for k, angle in enumerate(ANGLES[:6]):  # the mean of either way
            values[f"turned_{-angle}"] = turned[:, [k, -1 - k]].mean(axis=1).tolist()
        # The fastest epoch: others may warm up, compile, or share the machine with other work.
        times = [min(epoch["seconds"] for epoch in run["history"]) for run in group]
        row["seconds"] = min(times)
        row["hardware"] = group[times.index(min(times))]["config"]["hardware"]
        for name, numbers in values.items():
            row[name] = round(float(np.mean(numbers)), 6)
            row[f"{name}_std"] = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
        rows.append(row | {"values": values})  # in the order of the runs
    return sorted(rows, key=lambda row: (row["model"], row["world_size"]))


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown, padded so that it is one in a terminal as well."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]  # in letters
    lines = [header, ["-" * width for width in widths], *lines]
    padded = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in padded)


def short_names(rows: list[dict]) -> tuple[list[str], list[str]]:
    """What all rows have in common, word by word, and what each row is called beside that."""
    words = [row["name"].split(", ") for row in rows]
    shared = [word for word in words[0] if len(rows) > 1 and all(word in name for name in words)]
    rest = [", ".join(word for word in name if word not in shared) for name in words]
    usual = [f"usual settings, {row['hardware']}" for row in rows]
    return shared, [name or other for name, other in zip(rest, usual, strict=True)]


def comparison_text(rows: list[dict]) -> str:
    """comparison.md: few columns, for a terminal; what all rows have in common stands above."""
    n, (shared, names), lines = rows[0]["test_images"], short_names(rows), []
    for row, run in zip(rows, names, strict=True):
        deviation = f" ± {row['accuracy_std']:.2f}" if row["n"] > 1 else ""
        test, seconds = f"{row['accuracy']:.2f}{deviation}", f"{row['seconds']:.1f}"
        interval = "{:.2f}-{:.2f}".format(*wilson(row["accuracy"] / 100 * n, n))
        lines.append([run, str(row["n"]), test, interval, seconds])
    return (
        f"Accuracy on {n:,} test images: {', '.join([rows[0]['dataset'], *shared])}\n\n"
        f"{markdown_table(['runs', 'n', 'test, %', '95 %', 's/epoch'], lines)}\n"
        "n runs that differ only in their seed: mean ± standard deviation; 95 %: the interval\n"
        "that the images alone leave open; s/epoch: training alone, the fastest epoch\n"
    )


# -- 3. The pictures: sized for a slide, colours that colour-blind readers can tell apart ----------

# Okabe and Ito's palette, without its yellow, which is too pale for lines on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "black")
BLUE, RED = COLOURS[:2]
GREY = {"color": "grey", "linestyle": ":"}  # lines to compare with
TICKS = (1, 10, 50, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9, 99.95, 99.99)  # in percent
plt.rcParams |= {"font.size": 15, "lines.linewidth": 2.5, "axes.grid": True, "grid.alpha": 0.3}
plt.rcParams["figure.constrained_layout.use"] = True


def save(figure, text: str, file: Path) -> None:
    """Give the figure its title and write it, as all files are, in one piece."""
    figure.suptitle(text)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)  # pixels an inch
    plt.close(figure)  # pyplot would keep it
    write_file(file, picture.getvalue())


def draw_accuracy(axis, x, runs: list, **style) -> None:
    """Accuracies in percent, a list for each run, over x: their mean as a line, all as a band."""
    runs = np.clip(runs, TICKS[0], TICKS[-1]) / 100  # on this scale, 0 and 1 lie at infinity:
    axis.set_yscale("logit")  # log(p / (1 - p)) spaces 90, 99 and 99.9 % evenly
    axis.plot(x, runs.mean(axis=0), **style)
    axis.fill_between(x, runs.min(axis=0), runs.max(axis=0), color=style["color"], alpha=0.15)
    axis.set_yticks(np.array(TICKS) / 100, TICKS)  # places, labels
    axis.minorticks_off()  # there are enough
    top = next(t for t in (0.998, 0.9995, 0.99992) if axis.dataLim.y1 < t)  # alike on most slides
    axis.set(ylim=(min(0.98, 0.99 * axis.dataLim.y0), top), ylabel="accuracy in % (logit scale)")


def draw_all(run: dict, lengths, images: Tensor, labels: Tensor, out: Path, plain=None) -> None:
    """All pictures of a run with its report, without its weights. `plain`: see draw_rotation."""
    report, lengths = run["report"], lengths.astype(np.float32)
    pictures = {
        "confusion_matrix": draw_confusion(report),
        "roc": draw_roc(report, lengths, labels.numpy()),
        "curves": draw_curves(run),
        "mistakes": draw_mistakes(lengths, labels.numpy(), images.numpy()),
        "rotation": draw_rotation(report, run["config"]["rotate"], plain),
        "routing": draw_routing(report, images[first_of_each_class(labels, ROUTED)].numpy()),
    }
    for name, (figure, text) in pictures.items():
        save(figure, f"{describe(run)}\n{text}", out / f"{name}.png")


def draw_confusion(report: dict) -> tuple:
    """Which digits are taken for which: counts, true by predicted; colour shows the errors only."""
    confusion = np.array(report["confusion"])
    wrong = np.where(np.eye(10), 0, confusion)  # without the diagonal
    figure, axis = plt.subplots(figsize=(8.5, 9))
    # The root makes single errors visible; black numbers must be legible on the darkest colour.
    axis.imshow(np.sqrt(wrong), cmap="Oranges", vmin=0, vmax=1.5 * np.sqrt(wrong.max()) + 1)
    for i, j in np.argwhere(confusion > 0):
        axis.text(j, i, confusion[i, j], ha="center", va="center")
    axis.set(xlabel="predicted digit", ylabel="true digit", xticks=range(10), yticks=range(10))
    axis.grid(False)
    return figure, f"{report['errors']} errors (coloured) in {report['test_images']:,} test digits"


def draw_roc(report: dict, lengths: np.ndarray, labels: np.ndarray) -> tuple:
    """What a threshold on a length trades: digits found against false alarms, one digit a curve."""
    figure, axis = plt.subplots(figsize=(11, 7))
    auc, curves = np.array(report["auc"]), []
    rates = np.geomspace(0.5 / len(labels), 1, 1000)  # of false alarms; a log axis has no 0
    for rank, digit in enumerate(auc.argsort()):  # the worst first
        false, true, _ = metrics.roc_curve(labels == digit, lengths[:, digit])
        curves.append(100 * true[np.searchsorted(false, rates, side="right") - 1])  # a step
        style = {"color": "lightgrey", "zorder": 1}
        if rank < 3:
            style = {"color": COLOURS[rank], "label": f"digit {digit}: AUC {auc[digit]:.5f}"}
        axis.plot(100 * rates, curves[-1], **style)
    axis.plot(100 * rates, np.mean(curves, axis=0), "k--", label=f"mean: AUC {auc.mean():.5f}")
    # Near-perfect curves hug one corner: only that is shown, down to where the worst one begins.
    corner = min(curve[rates < 0.002].max() for curve in curves)
    axis.set(xscale="log", xlim=(100 * rates[0], 100), ylim=(max(0, 2 * corner - 100.5), 100.1))
    axis.set(xlabel="false alarms: other digits taken for this one, in %", ylabel="found, in %")
    axis.xaxis.set_major_formatter("{x:g}")  # 0.01, not 10^-2
    axis.legend(title="the three worst; others grey")
    return figure, "ROC: one digit against the rest"


def draw_curves(run: dict) -> tuple:
    """How training went. Validation may look better: its digits are not augmented, and it comes
    after the epoch. The gap to training grows when digits are learned by heart."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6))
    history, best = run["history"], run["best"]
    for part, label, colour in (("train", "training", BLUE), ("val", "validation", RED)):
        loss, accuracy = ([row[f"{part}_{of}"] for row in history] for of in ("loss", "accuracy"))
        style = {"color": colour, "marker": "o", "label": label}
        left.plot(range(1, len(history) + 1), loss, **style)
        draw_accuracy(right, range(1, len(history) + 1), [accuracy], **style)
    left.set(yscale="log", ylabel="margin loss (logarithmic)")
    for axis in (left, right):
        axis.axvline(best["epoch"], label="kept: best.pt", **GREY)
        axis.locator_params(axis="x", integer=True)
        axis.set_xlabel("epoch")
    left.legend()
    return figure, f"validation accuracy {best['val_accuracy']:.2f} % in epoch {best['epoch']}"


def draw_mistakes(lengths: np.ndarray, labels: np.ndarray, images: np.ndarray) -> tuple:
    """The worst mistakes, as many as fit on a page: would YOU have known?"""
    wrong = np.flatnonzero(lengths.argmax(axis=1) != labels)
    excess = lengths[wrong].max(axis=1) - lengths[wrong, labels[wrong]]  # over the right capsule
    worst = wrong[np.argsort(-excess, kind="stable")][:48]
    rows = math.ceil(max(1, len(worst)) / 8)  # of the page
    figure = plt.figure(figsize=(11, 1.2 + 1.75 * rows))
    for place, index in enumerate(worst, start=1):
        axis = figure.add_subplot(rows, 8, place, xticks=[], yticks=[])
        row, true, taken = lengths[index], labels[index], lengths[index].argmax()
        axis.imshow(images[index], cmap="gray_r")
        axis.set_title(f"{true} → {taken}\n{row[true]:.2f} → {row[taken]:.2f}", fontsize=14)
    text = f"the worst {len(worst)} of {len(wrong)} mistakes in {len(labels):,} test digits: "
    return figure, f"{text}\ntrue → predicted class, and the lengths of both capsules"


def draw_rotation(report: dict, trained: float, plain: list | None) -> tuple:
    """How far a network, and a plain CNN, generalise to angles that they have not been shown."""
    values, n = at_angles(report), report["rotation"]["images"]
    low, high = np.transpose([wilson(value * n / 100, n) for value in values])
    figure, axis = plt.subplots(figsize=(11, 7))
    axis.axvspan(-trained, trained, color="#E69F00", alpha=0.3, label=f"trained: ±{trained:g}°")
    axis.fill_between(ANGLES, low, high, color=BLUE, alpha=0.2, label="95 %, images alone")
    axis.plot(ANGLES, values, color=BLUE, marker="o", label="this network")
    if plain:
        axis.plot(ANGLES, plain, "k--", label="plain CNN")
    axis.axhline(10, label="guessing", **GREY)  # ten digits
    axis.set(xlabel="rotation in degrees (positive: counter-clockwise)", ylabel="accuracy in %")
    axis.set(xticks=ANGLES[::2], ylim=(0, 103), xlim=(-92, 92))  # points on the edge stay whole
    axis.legend(loc="lower center")
    return figure, f"accuracy on {n:,} turned test digits"


def draw_routing(report: dict, images: np.ndarray) -> tuple:
    """What routing has done: WHERE capsules have turned to the true digit, or HOW MANY have."""
    maps, histograms = np.array(report["coupling_maps"]), report["coupling_histograms"]
    if maps.shape[1] > 4:  # [10, 9 * 9]: the mean of a class at each place, outlined its mean image
        figure, axes = plt.subplots(2, 5, figsize=(13, 6))
        most = np.abs(maps - 0.1).max() + 1e-5
        means = images.reshape(10, -1, 28, 28).mean(axis=1)  # images come class by class
        places = 28 / 78 * 8 * np.arange(10)  # a place is 8 of 78 pixels wide
        for digit, (axis, values) in enumerate(zip(axes.flat, maps, strict=True)):
            norm = {"vmin": 0.1 - most, "vmax": 0.1 + most}  # around an equal share, in white
            shown = axis.pcolormesh(places, places, values.reshape(9, 9), cmap="RdBu_r", **norm)
            axis.contour(means[digit], [80], colors="black")
            axis.set(title=digit, xticks=[], yticks=[], xlim=(0, 27), ylim=(27, 0))
        figure.colorbar(shown, ax=axes, label="coupling to the true digit")
    else:
        figure, axis = plt.subplots(figsize=(11, 7))
        for values, label, colour in zip(histograms, ("true digit", "nine others"), (RED, BLUE)):
            axis.stairs(values, EDGES, fill=True, alpha=0.5, color=colour, label=f"to the {label}")
        axis.axvline(0.1, label="equal share", **GREY)
        axis.set(xlabel="coupling", ylabel="of all couplings, in % (logarithmic)", yscale="log")
        axis.set_xlim(0, EDGES[np.flatnonzero(histograms[0]).max() + 1])  # the last bin in use
        axis.legend()
    means = " → ".join(f"{value:.3f}" for value in report["coupling_to_true"])
    return figure, f"mean coupling to the true digit, iteration by iteration: {means}"


def draw_comparison(rows: list[dict], file: Path) -> None:
    """Fewer epochs are not always less time: accuracy over both; a band holds a row's seeds."""
    rows = [row for row in rows if row["epochs"] == len(row["runs"][0]["history"])]  # whole runs
    if not rows:
        return
    figure, axes = plt.subplots(1, 2, figsize=(13, 6 + 0.3 * len(rows)), sharey=True)
    shared, names = short_names(rows)
    for k, (row, name) in enumerate(zip(rows, names, strict=True)):
        curves = [[epoch["val_accuracy"] for epoch in run["history"]] for run in row["runs"]]
        style = {
            "color": COLOURS[k % 7],
            "marker": "os^vD"[k % 5],
            "label": f"{name}, n = {row['n']}",
        }
        epochs = np.arange(1, row["epochs"] + 1)
        draw_accuracy(axes[0], epochs, curves, **style)
        draw_accuracy(axes[1], epochs * row["seconds"] / 60, curves, **style)
    axes[0].locator_params(axis="x", integer=True)
    axes[0].set_xlabel("epoch")
    axes[1].set(xlabel="minutes, each epoch like the fastest", xlim=(0, None), ylabel="")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center")  # below both
    save(figure, f"Validation accuracy over epochs and over time\n{', '.join(shared)}", file)


# -- 4. Your own digits ----------------------------------------------------------------------------


def read_digit(file: Path) -> np.ndarray:
    """A photo, scan or drawing of one digit as MNIST has it: uint8 [28, 28], light on black."""
    try:
        image = ImageOps.exif_transpose(Image.open(file))  # phones note how they were held
        if image.mode[0] not in "IF":  # those have 16 or 32 bits, and no colours
            paper = Image.new("RGBA", image.size, "white")  # under what is transparent
            image = Image.alpha_composite(paper, image.convert("RGBA")).convert("L")
        image = image.convert("F")
        image.thumbnail((400, 400))  # takes the mean of neighbours, and grain with it
        grey = np.asarray(image) / max(1, np.max(image))  # [h, w], of 16 bits often few are used
    except Exception as error:  # noqa: BLE001 - a damaged image makes PIL fail in any way at all
        raise UserError(f"{file} is no image that can be read: {error}") from None
    paper = np.median(np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]]))
    ink = np.abs(grey - paper)  # whichever of the two is dark
    if not ink.max() >= 0.1:
        raise UserError(f"{file}: no digit can be seen, all of it is about equally light")
    ink = np.clip(ink / ink.max() - 0.3, 0, None)  # weak shadows and grain count as paper
    ys, xs = ink.nonzero()
    ink = Image.fromarray(ink).crop((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
    size = [max(1, round(20 * length / max(ink.size))) for length in ink.size]  # within 20x20
    ink = np.asarray(ink.resize(size, Image.Resampling.BILINEAR))
    y, x = (np.indices(ink.shape) * ink).sum(axis=(1, 2)) / ink.sum()  # the centre of mass
    ink = Image.fromarray((255 * ink / ink.max()).astype(np.uint8))
    digit = Image.new("L", (28, 28))
    digit.paste(ink, (round(14 - x), round(14 - y)))  # goes to the middle
    return np.array(digit)


def read_own_digits(run: dict, args: argparse.Namespace, out: Path) -> None:
    """What the network says of the user's images: printed, and drawn beside what it saw."""
    digits = np.stack([read_digit(file) for file in args.image])
    lengths = predict(load_network(run, args.device), torch.from_numpy(digits)).numpy()
    figure, axes = plt.subplots(len(digits), 2, figsize=(9, 1.2 + 2.1 * len(digits)), squeeze=False)
    for (left, right), file, digit, row in zip(axes, args.image, digits, lengths, strict=True):
        print(f"{file}: {row.argmax()}, lengths {' '.join(f'{length:.2f}' for length in row)}")
        left.imshow(digit, cmap="gray_r")  # as ink on paper
        left.set(xticks=[], yticks=[])
        right.bar(range(10), row, color=[RED if k == row.argmax() else "grey" for k in range(10)])
        right.set(xticks=range(10), ylim=(0, 1), ylabel="length")
        right.set_title(f"{file.name!a}: {row.argmax()}", parse_math=False)  # in ASCII; $ is $
    save(figure, describe(run), out / "own-digits.png")


# -- 5. Main ---------------------------------------------------------------------------------------


def evaluate_run(run: dict, args: argparse.Namespace, out: Path) -> None:
    """Print the report of a run, and write it to `out` with all pictures."""
    folder, config = run["folder"], run["config"]
    images, labels = load(config["dataset"], args.data_dir or config["data_dir"], "test")
    if (folder / "best.pt").exists():
        model, chosen = load_network(run, args.device), first_of_each_class(labels, ROUTED)
        run["report"], lengths = measure(run, model, images, labels)
        places = PLACES[config["model"]]
        run["report"] |= routing_summary(model, images[chosen], labels[chosen], places)
        # Half the bytes, unless rounding makes two lengths equal and so changes an answer
        short = lengths.astype(np.float16)
        lengths = short if (short.argmax(axis=1) == lengths.argmax(axis=1)).all() else lengths
    else:  # an archived run
        lengths = np.load(folder / "lengths.npy")
    print(report_text(run))
    write_file(out / "report.json", json.dumps(run["report"]).replace(', "', ',\n "').encode())
    buffer = io.BytesIO()
    np.save(buffer, lengths)
    write_file(out / "lengths.npy", buffer.getvalue())
    draw_all(run, lengths, images, labels, out)


def compare(runs: list[dict], out: Path) -> None:
    """The table of several runs, printed and written."""
    missing = [run["folder"] for run in runs if run["report"] is None]
    if missing:
        first = f"first run python evaluate.py {missing[0]}"
        raise UserError(f"{missing[0]} has no report of its best epoch: {first}")
    if len({run["config"]["dataset"] for run in runs}) > 1:
        raise UserError("accuracies on mnist and on digits cannot be compared")
    rows = make_rows(runs)  # several seeds: one row
    print(comparison_text(rows))
    write_file(out / "comparison.md", comparison_text(rows).encode())
    columns = [name for name in rows[0] if name not in ("runs", "values")]
    table, lines = io.StringIO(), [[row[name] for name in columns] for row in rows]
    csv.writer(table, lineterminator="\n").writerows([columns, *lines])
    write_file(out / "comparison.csv", table.getvalue().encode())
    draw_comparison(rows, out / "comparison.png")


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(  # without usage, a mistake is answered by one line
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=style, allow_abbrev=False
    )
    flag, file = parser.add_argument, lambda text: Path(train_single.nonempty_path(text))
    flag("runs", nargs="+", type=file, metavar="RUN", help="folder of a run")
    flag("--image", nargs="+", type=file, metavar="FILE", help="own digits")
    flag("--out", type=file, metavar="DIR", help="write here and nowhere else")
    flag("--data-dir", type=file, metavar="DIR", help="holds MNIST/raw; else as in training")
    flag("--device", help="cpu, cuda, cuda:1 ...; else the GPU where there is one")
    args = parser.parse_args()
    if len({folder.resolve() for folder in args.runs}) < len(args.runs):
        parser.error("the same run is given twice")
    if len(args.runs) > 1 and args.image:
        parser.error("--image goes with one run")
    args.device = train_single.find_device(args.device)  # or one line of what is wrong
    runs = [read_run(folder) for folder in args.runs]
    out = args.out or (Path("runs/comparison") if len(runs) > 1 else args.runs[0])
    out.mkdir(parents=True, exist_ok=True)
    if args.image:
        read_own_digits(runs[0], args, out)
    elif len(runs) == 1:
        evaluate_run(runs[0], args, out)
    else:
        compare(runs, out)
    print(f"written to {out}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a file's name may hold what cannot be printed
    train_single.run_main(main)
