"""Evaluate runs: compute the numbers of a report and draw pictures, always in float32.

    python evaluate.py runs/alexcaps-single                       a report
    python evaluate.py runs/alexcaps-single runs/rescaps-single   a comparison
    python evaluate.py runs/alexcaps-single --image photo.jpg     your own digits

A report goes to the run's folder. On 2 CPU cores, MNIST takes half a minute to a few
minutes. A comparison goes to runs/comparison, and needs the reports of its runs.

An archived run, as in results/, has no best.pt. Its pictures are redrawn from its
report.json and lengths.npy, and go to runs/<name>-evaluated: the archive stays as it
is. If it has weights.pt, its network can also read your own digits.

Read it downwards:
    1. one run: its figures
    2. several runs: means over seeds, and a table
    3. the pictures
    4. your own digits
    5. main
    6. the files of a run, and how they are checked
"""

import argparse
import csv
import io
import json
import math
import os
from pathlib import Path

# The pictures do not depend on the user's settings of matplotlib. MPLBACKEND is removed
# before the import, which would fail for an unknown backend.
os.environ.pop("MPLBACKEND", None)
import matplotlib

matplotlib.rcdefaults()  # forget the user's matplotlibrc
matplotlib.use("Agg")  # draw into files: no display needed
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageOps
from scipy import ndimage
from sklearn import metrics
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import train_single
from data import VALIDATION_SIZE, UserError, images_to_input, load
from train_single import MODELS, progress, shell_path, write_csv, write_file

BATCH = 250  # images at a time
ANGLES = range(-90, 91, 15)  # degrees, for rotation.png
ROTATED = 100  # test digits of each class for rotation.png, always the first ones
ROUTED = 20  # test digits of each class whose couplings are averaged for routing.png
EDGES = np.linspace(0, 1, 201)  # the edges of 200 bins, for histograms of couplings

# -- 1. One run: its figures -------------------------------------------------------


def wilson(correct: float, n: int) -> tuple[float, float]:
    """The 95 % confidence interval, in percent, of the accuracy: `correct` of n images.

    The usual p ± z sqrt(p (1 - p) / n) fails near 100 %: at p = 1 it has no width.
    """
    z = 1.96  # 95 % of a normal distribution lie within ±1.96 standard deviations
    p = correct / n
    #            p + z^2 / 2n  ±  z sqrt(p (1 - p) / n + z^2 / 4n^2)
    #   bounds = ---------------------------------------------------   [Wilson 1927]
    #                              1 + z^2 / n
    shrink = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink  # a little nearer to 50 % than p
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = max(0.0, centre - half)
    high = min(1.0, centre + half)
    return 100 * low, 100 * high


def first_of_each_class(labels: Tensor, count: int) -> Tensor:
    """Indices of the first `count` digits of each class: the 0s, then the 1s, ...

    If a class has fewer, every class gets that smaller number.
    """
    rarest = int(labels.bincount(minlength=10).min())
    count = min(count, rarest)
    chosen = []
    for digit in range(10):
        indices = (labels == digit).nonzero().squeeze(1)  # [n] -> [images of this digit]
        chosen.append(indices[:count])
    return torch.cat(chosen)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.inference_mode()
def outputs(model, images: Tensor, angle: float = 0, title: str = "test digits") -> Tensor:
    """The model's outputs for images, uint8 [n, 28, 28], turned by `angle` degrees.

    A capsule network's outputs are the digit capsules [n, J, D], on its device.
    """
    device = device_of(model)
    batches = images.to(device).split(BATCH)
    found = []
    for batch in progress(batches, title):
        degrees = None  # upright
        if angle != 0:
            degrees = torch.full([len(batch)], float(angle), device=device)
        found.append(model(images_to_input(batch, model, degrees)))
    return torch.cat(found)


def predict(model, images: Tensor, angle: float = 0, title: str = "test digits") -> Tensor:
    """uint8 [n, 28, 28], turned by `angle` degrees -> the class scores [n, 10], on the CPU.

    The scores of a capsule network are the lengths of its digit capsules.
    """
    return model.scores(outputs(model, images, angle, title)).cpu()


def classification_metrics(scores: np.ndarray, labels: np.ndarray) -> dict:
    """Scores [n, 10] and labels [n] -> errors, accuracy, AUC and the confusion matrix.

    In the matrix, the row is the true digit and the column the predicted one.
    """
    n = len(labels)
    predicted = scores.argmax(axis=1)
    errors = int((predicted != labels).sum())
    # AUC depends only on the order of the scores: they need not be probabilities.
    is_digit = labels[:, None] == np.arange(10)  # [n, 10]
    auc = metrics.roc_auc_score(is_digit, scores, average=None)  # [10]
    low, high = wilson(n - errors, n)
    return {
        "test_images": n,
        "errors": errors,
        "accuracy": round(100 * (n - errors) / n, 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "auc": auc.round(6).tolist(),
        "confusion": metrics.confusion_matrix(labels, predicted, labels=range(10)).tolist(),
    }


def rotation_accuracy(model, images: Tensor, labels: Tensor) -> dict:
    """Accuracy in percent at each of the ANGLES, always on the same digits."""
    chosen = first_of_each_class(labels, ROTATED)
    accuracy = {}
    for angle in ANGLES:
        title = f"turned by {angle} degrees"
        predicted = predict(model, images[chosen], angle, title).argmax(dim=1)
        hits = predicted == labels[chosen]
        accuracy[str(angle)] = round(100 * hits.float().mean().item(), 3)
    return {"images": len(chosen), "accuracy": accuracy}


@torch.inference_mode()
def all_couplings(model, images: Tensor) -> Tensor:
    """The couplings of all T iterations of routing: uint8 [n, 28, 28] -> [T, n, J, N]."""
    batches = []
    for batch in images.to(device_of(model)).split(BATCH):
        inputs = images_to_input(batch, model)
        u = model.primary(model.features(inputs))
        _, couplings = model.digits.route(u)  # T times [B, J, N]
        batches.append(torch.stack(couplings).cpu())
    return torch.cat(batches, dim=1)


def routing_summary(model, images: Tensor, labels: Tensor) -> dict:
    """What routing.png shows of the couplings c.

    The images must come class by class, the same number of each.
    """
    n = len(labels)
    c = all_couplings(model, images)  # [T, n, J, N]
    to_true = c[:, torch.arange(n), labels]  # [T, n, N]: those to the true digit
    # The maps and the histograms are about the last iteration.
    is_other = labels.unsqueeze(1) != torch.arange(10)  # [n, J]
    last_to_others = c[-1][is_other]  # [9n, N]
    last_to_true = to_true[-1]  # [n, N]
    # WHERE do capsules turn to the true digit? Average over the images of a class and
    # over the capsules at a place. (Primary capsules are ordered by place first.)
    places = model.map_side**2
    maps = last_to_true.view(10, n // 10, places, -1)  # -> [10, n/10, places, types]
    maps = maps.double().mean(dim=(1, 3))  # -> [10, places]
    # HOW MANY do? Make two histograms: couplings to the true digit and to the others.
    histograms = []
    for part in (last_to_true, last_to_others):
        counts, _ = np.histogram(part, EDGES)
        histograms.append(100 * counts / part.numel())  # percent
    return {
        "coupling_to_true": to_true.double().mean(dim=(1, 2)).numpy().round(5).tolist(),
        "coupling_maps": maps.numpy().round(5).tolist(),
        "coupling_histograms": np.round(histograms, 5).tolist(),
    }


def count_flops(model: nn.Module) -> int:
    """The FLOPs of one image's forward pass, in convolutions and matrix products.

    A multiply-add, x * y + z, counts as 2.
    """
    image = torch.zeros(1, 28, 28, dtype=torch.uint8, device=device_of(model))
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(images_to_input(image, model))
    return counter.get_total_flops()


def measure(run: dict, model, images: Tensor, labels: Tensor) -> tuple:
    """The figures for report.json, and the class scores [n, 10] of the test digits.

    It works for any network. routing_summary adds the figures that only capsules have.
    """
    scores = predict(model, images).numpy()
    report = {
        "kept_epoch": run["best"]["epoch"],
        "kept_val_accuracy": run["best"]["val_accuracy"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_per_image": count_flops(model),
    }
    report |= classification_metrics(scores, labels.numpy())
    report["rotation"] = rotation_accuracy(model, images, labels)
    return report, scores


def report_text(run: dict, labels: np.ndarray, predicted: np.ndarray) -> str:
    """The report as it is printed. Labels and predictions are [n]."""
    report = run["report"]
    low, high = report["interval_95"]
    by_digit = metrics.classification_report(
        labels, predicted, labels=range(10), digits=4, zero_division=0
    )
    auc = np.mean(report["auc"])
    flops = report["flops_per_image"] / 1e6
    return (
        f"{describe(run)}, on {run['config']['dataset']}, "
        f"kept after epoch {report['kept_epoch']}\n"
        f"test accuracy {report['accuracy']:.2f} % "
        f"(95 % interval {low:.2f} to {high:.2f}), "
        f"{report['errors']} errors in {report['test_images']:,} images\n\n"
        f"{by_digit}\n"
        f"AUC {auc:.5f} (mean over the digits), {report['parameters']:,} parameters, "
        f"{flops:,.0f} million FLOPs per image"
    )


# -- 2. Several runs ---------------------------------------------------------------

# settings_in_words and epochs_in_words have words of their own for these.
IN_WORDS = ("model", "dataset", "script", "precision", "world_size", "epochs", "device")
# A description leaves these out. (Instead of train_size, it says how many images there are.)
LEFT_OUT = ("data_dir", "train_size", "seed", "dry_run")
# A description names every other setting only if it differs from its default, given here.
USUAL = {
    name: value
    for name, value in train_single.DEFAULTS.items()
    if name not in (*IN_WORDS, *LEFT_OUT)
}
# The first settings in comparison.csv; those in USUAL follow them.
FIRST_COLUMNS = ("model", "dataset", "script", "precision", "world_size", "epochs", "train_images")
ALL_OF_MNIST = 60_000 - VALIDATION_SIZE["mnist"]  # training images


def describe(run: dict) -> str:
    """What was trained, and how: "AlexCapsNet, one device, lr 0.01, 20 epochs".

    Two runs have the same description if they differ only in their seed (or machine).
    """
    return join_words(settings_in_words(run).values())


def settings_in_words(run: dict) -> dict[str, str]:
    """The parts of a description: {setting: words}.

    The words are "" if there is nothing to say, because the setting has its usual value.
    """
    config = run["config"]
    words = {"model": MODELS[config["model"]].__name__}
    processes = config["world_size"]
    if config["script"] == "single":
        words["script"] = "one device"
    else:
        plural = "es" if processes > 1 else ""
        words["script"] = f"{processes} process{plural} in {config['precision']}"
    words["device"] = "GPU" if config["device"].startswith("cuda") else ""
    for name, usual in USUAL.items():
        words[name] = ""
        if config[name] != usual:
            value = str(config[name]).removesuffix(".0")
            words[name] = f"{name.replace('_', ' ')} {value}"
    words["epochs"] = epochs_in_words(run)
    return words


def epochs_in_words(run: dict) -> str:
    """For example "3 epochs of 6,000 images", or "7 of 20 epochs" of a stopped run."""
    config = run["config"]
    done = len(run["history"])
    planned = config["epochs"]
    text = f"{done} of {planned}" if done != planned else f"{done}"
    text += " epochs" if planned > 1 else " epoch"
    if config["dataset"] == "digits":
        text += f" of {config['train_images']:,} digits"
    elif config["train_images"] != ALL_OF_MNIST:
        text += f" of {config['train_images']:,} images"
    return text


def join_words(words) -> str:
    """Words with commas between them; empty ones are left out."""
    return ", ".join(word for word in words if word)


def at_angles(report: dict) -> list[float]:
    """A report's accuracies on turned digits, in the order of ANGLES."""
    accuracy = report["rotation"]["accuracy"]
    return [accuracy[str(angle)] for angle in ANGLES]


def make_rows(runs: list[dict]) -> list[dict]:
    """Runs with reports -> rows. Runs that differ only in their seed share a row."""
    groups = {}
    for run in runs:
        groups.setdefault(describe(run), []).append(run)
    rows = [make_row(name, group) for name, group in groups.items()]
    return sorted(rows, key=lambda row: (row["model"], row["world_size"]))


def refuse_repeated_seeds(group: list[dict]) -> None:
    """UserError if two of these runs, which have the same settings, have the same seed."""
    seeds = set()
    for run in group:
        if run["config"]["seed"] in seeds:
            text = "has the same settings and seed as another run: leave one out"
            raise UserError(f"{run['folder']} {text}")
        seeds.add(run["config"]["seed"])


def make_row(name: str, group: list[dict]) -> dict:
    """A row of comparison.csv, from runs that differ only in their seed.

    For each metric, NAME holds the mean, and NAME_std the standard deviation (None for
    one run). "runs" holds the runs, and "values" their metrics: neither is written.
    """
    refuse_repeated_seeds(group)
    row = {"name": name, "n": len(group), "runs": group}
    for setting in (*FIRST_COLUMNS, *USUAL):
        row[setting] = group[0]["config"][setting]
    for constant in ("test_images", "parameters", "flops_per_image"):
        row[constant] = group[0]["report"][constant]
    fastest = min(group, key=seconds_per_epoch)  # a run
    row["seconds"] = seconds_per_epoch(fastest)
    row["hardware"] = fastest["config"]["hardware"]
    row["values"] = metrics_of(group)
    for metric, values in row["values"].items():
        row[metric] = round(float(np.mean(values)), 6)
        row[f"{metric}_std"] = None
        if len(values) > 1:
            row[f"{metric}_std"] = round(float(np.std(values, ddof=1)), 6)
    return row


def seconds_per_epoch(run: dict) -> float:
    """The training time of the run's fastest epoch.

    Other epochs may warm up, compile, or share the machine with other work.
    """
    return min(epoch["seconds"] for epoch in run["history"])


def metrics_of(group: list[dict]) -> dict[str, list[float]]:
    """What is averaged over seeds: {metric: its values, in the order of the runs}."""
    reports = [run["report"] for run in group]
    found = {
        "accuracy": [report["accuracy"] for report in reports],
        "errors": [report["errors"] for report in reports],
        "val_accuracy": [run["best"]["val_accuracy"] for run in group],
    }
    for angle in reversed(ANGLES):
        if angle > 0:
            found[f"turned_{angle}"] = [either_way(report, angle) for report in reports]
    return found


def either_way(report: dict, angle: int) -> float:
    """The mean of a report's accuracies on digits turned by -angle and by angle."""
    accuracy = report["rotation"]["accuracy"]
    return (accuracy[str(-angle)] + accuracy[str(angle)]) / 2


def short_names(rows: list[dict]) -> tuple[list[str], list[str]]:
    """The words that all rows have in common, and a name for each row without them."""
    descriptions = [settings_in_words(row["runs"][0]) for row in rows]
    common = {}
    if len(rows) > 1:
        for setting, words in descriptions[0].items():
            if all(description[setting] == words for description in descriptions):
                common[setting] = words
    names = []
    for description in descriptions:
        own = [words for setting, words in description.items() if setting not in common]
        name = join_words(own)
        names.append(name or "usual settings")
    return list(common.values()), names


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown, padded so that a terminal shows it as a table too."""
    columns = zip(header, *lines, strict=True)
    widths = [max(len(cell) for cell in column) for column in columns]
    rule = ["-" * width for width in widths]
    text = ""
    for line in (header, rule, *lines):
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        text += f"| {' | '.join(cells)} |\n"
    return text


def comparison_text(rows: list[dict]) -> str:
    """The text of comparison.md. What all rows have in common is above the table."""
    images = rows[0]["test_images"]
    common, names = short_names(rows)
    lines = []
    for row, name in zip(rows, names, strict=True):
        accuracy = f"{row['accuracy']:.2f}"
        if row["n"] > 1:
            accuracy += f" ± {row['accuracy_std']:.2f}"
        low, high = wilson(row["accuracy"] / 100 * images, images)
        interval = f"{low:.2f}-{high:.2f}"
        lines.append([name, str(row["n"]), accuracy, interval, f"{row['seconds']:.1f}"])
    title = join_words([rows[0]["dataset"], *common])
    return (
        f"Accuracy on {images:,} test images: {title}\n\n"
        f"{markdown_table(['runs', 'n', 'test, %', '95 %', 's/epoch'], lines)}\n"
        "test: mean ± standard deviation of n runs that differ only in their seed\n"
        "95 %: the confidence interval over images; it says nothing about other seeds\n"
        "s/epoch: the training time of the fastest epoch, in seconds\n"
    )


# -- 3. The pictures ---------------------------------------------------------------

# The pictures fit a slide. Colour-blind readers can tell these colours apart: they are
# Okabe and Ito's, without their yellow, which is too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "black")
BLUE = COLOURS[0]
RED = COLOURS[1]
ORANGE = COLOURS[4]
GREY = {"color": "grey", "linestyle": ":"}  # lines to compare with
TICKS = (1, 10, 50, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9, 99.95, 99.99)  # in percent
STEPS = torch.arange(-5, 6) / 20  # added to a number of a capsule: [S17] figure 4
plt.rcParams["font.size"] = 15
plt.rcParams["lines.linewidth"] = 2.5
plt.rcParams["axes.grid"] = True
plt.rcParams["grid.alpha"] = 0.3
plt.rcParams["figure.constrained_layout.use"] = True


def save(figure, text: str, file: Path) -> None:
    """Give the figure its title and write it: a whole picture, or none."""
    figure.suptitle(text, wrap=True)  # long descriptions take several lines
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)  # pixels per inch
    plt.close(figure)  # pyplot would keep it
    write_file(file, picture.getvalue())


def save_pictures(run: dict, lengths, images: Tensor, labels: Tensor, out: Path, plain=None):
    """Save the pictures of a run that need its report and its lengths, but no weights.

    Lengths are an array [n, 10], images uint8 [n, 28, 28], labels [n]. `plain`: see
    draw_rotation.
    """
    report = run["report"]
    digits = labels.numpy()
    pictures = {
        "confusion_matrix": draw_confusion(report),
        "roc": draw_roc(report, lengths, digits),
        "curves": draw_curves(run),
        "mistakes": draw_mistakes(lengths, digits, images.numpy()),
        "rotation": draw_rotation(report, run["config"]["rotate"], plain),
    }
    network = MODELS[run["config"]["model"]]
    if "coupling_maps" in report:  # a plain network's report lacks them
        if network.place_stride is None:  # its capsules see the whole image
            pictures["routing"] = draw_coupling_histograms(report)
        else:
            routed = images[first_of_each_class(labels, ROUTED)].numpy()
            pictures["routing"] = draw_coupling_maps(report, network, routed)
    save_all(run, pictures, out)


def save_decoder_pictures(run: dict, model, lengths, images: Tensor, labels: Tensor, out: Path):
    """Save the pictures that the model's decoder draws."""
    pictures = {
        "reconstructions": draw_reconstructions(model, lengths, images, labels),
        "perturbations": draw_perturbations(model, images, labels),
    }
    save_all(run, pictures, out)


def save_all(run: dict, pictures: dict, out: Path) -> None:
    """Write pictures {name: (figure, title)}. The run's description goes first."""
    for name, (figure, title) in pictures.items():
        save(figure, f"{describe(run)}\n{title}", out / f"{name}.png")


def draw_confusion(report: dict) -> tuple:
    """How often each true digit (row) is predicted as which digit (column).

    Colour marks only the errors.
    """
    confusion = np.array(report["confusion"])
    wrong = np.where(np.eye(10), 0, confusion)  # without the diagonal
    # The root makes single errors visible. The darkest colour is still light enough for
    # black numbers.
    darkness = np.sqrt(wrong)
    figure, axis = plt.subplots(figsize=(8.5, 9))
    axis.imshow(darkness, cmap="Oranges", vmin=0, vmax=1.5 * darkness.max() + 1)
    for i, j in np.argwhere(confusion > 0):
        axis.text(j, i, confusion[i, j], ha="center", va="center")
    axis.set(xlabel="predicted digit", ylabel="true digit")
    axis.set(xticks=range(10), yticks=range(10))
    axis.grid(False)
    n = report["test_images"]
    return figure, f"{report['errors']} errors (coloured) in {n:,} test digits"


def draw_roc(report: dict, lengths: np.ndarray, labels: np.ndarray) -> tuple:
    """ROC curves: what a threshold on the length of a digit's capsule trades off.

    A lower threshold finds more of these digits (true positives), and mistakes more
    other digits for them (false positives).
    """
    auc = np.array(report["auc"])
    # The curves are drawn at these false positive rates. A logarithmic axis has no 0.
    rates = np.geomspace(0.5 / len(labels), 1, 1000)
    curves = np.empty((10, len(rates)))  # the true positive rates, in percent
    for digit in range(10):
        is_digit = labels == digit
        false_rates, true_rates, _ = metrics.roc_curve(is_digit, lengths[:, digit])
        curves[digit] = 100 * np.interp(rates, false_rates, true_rates)
    figure, axis = plt.subplots(figsize=(11, 7))
    for rank, digit in enumerate(auc.argsort()):  # the worst first
        if rank < 3:
            label = f"digit {digit}: AUC {auc[digit]:.5f}"
            axis.plot(100 * rates, curves[digit], color=COLOURS[rank], label=label)
        else:
            axis.plot(100 * rates, curves[digit], color="lightgrey", zorder=1)
    mean = curves.mean(axis=0)
    axis.plot(100 * rates, mean, "k--", label=f"mean: AUC {auc.mean():.5f}")
    # Near-perfect curves lie at the top, and only that part is shown. The axis reaches twice
    # as far below 100 % as the worst curve does at a false positive rate of 0.2 %, and half
    # a point further, so that it is never empty.
    at_02_percent = np.searchsorted(rates, 0.002) - 1
    worst = curves[:, at_02_percent].min()
    depth = 2 * (100 - worst) + 0.5
    bottom = max(0, 100 - depth)
    axis.set(xscale="log", xlim=(100 * rates[0], 100), ylim=(bottom, 100.1))
    axis.set_xlabel("false positive rate (other digits mistaken for this one), in %")
    axis.set_ylabel("true positive rate (found), in %")
    axis.xaxis.set_major_formatter("{x:g}")  # 0.01, not 10^-2
    axis.legend(title="the three worst; others grey")
    return figure, "ROC: one digit against the rest"


def draw_curves(run: dict) -> tuple:
    """How training went. If the network overfits, the gap between the two curves grows.

    Validation may look better than training: its digits are not augmented, and it comes
    after the epoch.
    """
    history = run["history"]
    best = run["best"]
    epochs = range(1, len(history) + 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6))
    parts = (("train", "training", BLUE), ("val", "validation", RED))
    for part, label, colour in parts:
        style = {"color": colour, "marker": "o", "label": label}
        loss = [row[f"{part}_loss"] for row in history]
        accuracy = [row[f"{part}_accuracy"] for row in history]
        left.plot(epochs, loss, **style)
        draw_accuracy(right, epochs, [accuracy], **style)
    kind = "margin loss"
    if run["config"]["reconstruction"] > 0:
        kind = "margin and decoder loss"
    left.set(yscale="log", ylabel=f"{kind} (logarithmic)")
    for axis in (left, right):
        axis.axvline(best["epoch"], label="kept: best.pt", **GREY)
        axis.locator_params(axis="x", integer=True)
        axis.set_xlabel("epoch")
    left.legend()
    title = f"validation accuracy {best['val_accuracy']:.2f} % in epoch {best['epoch']}"
    return figure, title


def draw_accuracy(axis, x, curves: list[list[float]], **style) -> None:
    """The mean of accuracy curves in percent, and a band from the lowest to the highest.

    The logit scale, log(p / (1 - p)), spaces 90, 99 and 99.9 % evenly. On this scale 100 %
    lies at infinity: it is drawn as 99.99 %.
    """
    p = np.clip(curves, TICKS[0], TICKS[-1]) / 100
    axis.set_yscale("logit")
    axis.plot(x, p.mean(axis=0), **style)
    low = p.min(axis=0)
    high = p.max(axis=0)
    axis.fill_between(x, low, high, color=style["color"], alpha=0.15)
    axis.set_yticks(np.array(TICKS) / 100, TICKS)  # places, labels
    axis.minorticks_off()  # there are enough
    # Choose from only three tops, so that most slides have the same one.
    top = next(top for top in (0.998, 0.9995, 0.99992) if axis.dataLim.y1 < top)
    bottom = min(0.98, 0.99 * axis.dataLim.y0)
    axis.set(ylim=(bottom, top), ylabel="accuracy in % (logit scale)")


def worst_mistakes(lengths: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Indices of all mistakes, the worst first.

    The more the longest capsule exceeds the true digit's, the worse the mistake.
    """
    wrong = np.flatnonzero(lengths.argmax(axis=1) != labels)
    true = lengths[wrong, labels[wrong]]  # the length of the true digit's capsule
    excess = lengths[wrong].max(axis=1) - true
    return wrong[np.argsort(-excess, kind="stable")]


def draw_mistakes(lengths: np.ndarray, labels: np.ndarray, images: np.ndarray) -> tuple:
    """The worst mistakes, as many as fit on a page: would YOU have known?"""
    wrong = worst_mistakes(lengths, labels)
    worst = wrong[:48]
    rows = math.ceil(max(1, len(worst)) / 8)  # of the page
    figure = plt.figure(figsize=(11, 1.2 + 1.75 * rows))
    for place, index in enumerate(worst, start=1):
        true = labels[index]
        answer = lengths[index].argmax()
        true_length = lengths[index, true]
        length = lengths[index, answer]
        axis = figure.add_subplot(rows, 8, place, xticks=[], yticks=[])
        axis.imshow(images[index], cmap="gray_r")
        title = f"{true} → {answer}\n{true_length:.2f} → {length:.2f}"
        axis.set_title(title, fontsize=14)
    mistakes = f"{len(wrong)} mistakes in {len(labels):,} test digits"
    return figure, (
        f"the worst {len(worst)} of {mistakes}:\n"
        "true → predicted class, and the lengths of both capsules"
    )


def draw_rotation(report: dict, trained: float, plain: list[float] | None) -> tuple:
    """How well a network generalises to angles that it never saw in training.

    It was trained with up to ±`trained` degrees. `plain` holds the accuracies of a plain
    CNN at the ANGLES, to compare with.
    """
    values = at_angles(report)
    n = report["rotation"]["images"]
    intervals = [wilson(value * n / 100, n) for value in values]
    low, high = np.transpose(intervals)  # [angles, 2] -> [2, angles]
    figure, axis = plt.subplots(figsize=(11, 7))
    label = f"trained: ±{trained:g}°"
    axis.axvspan(-trained, trained, color=ORANGE, alpha=0.3, label=label)
    label = "95 % interval (images alone)"
    axis.fill_between(ANGLES, low, high, color=BLUE, alpha=0.2, label=label)
    axis.plot(ANGLES, values, color=BLUE, marker="o", label="this network")
    if plain:
        axis.plot(ANGLES, plain, "k--", label="plain CNN")
    axis.axhline(10, label="guessing", **GREY)  # ten digits
    axis.set_xlabel("rotation in degrees (positive: counter-clockwise)")
    axis.set_ylabel("accuracy in %")
    axis.set(xticks=ANGLES[::2], ylim=(0, 103))
    axis.set_xlim(-92, 92)  # points on the edge stay whole
    axis.legend(loc="lower center")
    return figure, f"accuracy on {n:,} turned test digits"


def draw_coupling_maps(report: dict, network, images: np.ndarray) -> tuple:
    """WHERE capsules have turned to the true digit: a map for each digit.

    The outline is that of the digit's mean image. The images must come class by class.
    """
    maps = np.array(report["coupling_maps"])  # [10, places]
    rows = network.map_side
    maps = maps.reshape(10, rows, rows)
    means = images.reshape(10, -1, 28, 28).mean(axis=1)
    # Draw each place as a square around the middle of what it sees. In ResCapsNet, place k
    # of a side sees 17 pixels of the 78x78 input, from 8k - 4 to 8k + 13. Their middle is at
    # 8k + 4.5. The square around it has a side of 8 pixels, from 8k + 0.5 to 8k + 8.5.
    edges = network.place_stride * np.arange(rows + 1) + 0.5
    edges = edges * 28 / network.side  # in pixels of the 28x28 image
    edges -= 0.5  # in a picture, the first pixel begins at -0.5
    # Colours say how far a coupling is from an equal share, which is white.
    most = np.abs(maps - 0.1).max() + 1e-5
    figure, axes = plt.subplots(2, 5, figsize=(13, 6))
    for digit, axis in enumerate(axes.flat):
        mesh = axis.pcolormesh(
            edges, edges, maps[digit], cmap="RdBu_r", vmin=0.1 - most, vmax=0.1 + most
        )
        axis.contour(means[digit], [80], colors="black")
        axis.set(title=digit, xticks=[], yticks=[])
        axis.set(xlim=(-0.5, 27.5), ylim=(27.5, -0.5))  # row 0 is at the top
    figure.colorbar(mesh, ax=axes, label="coupling to the true digit")
    return figure, routing_title(report)


def draw_coupling_histograms(report: dict) -> tuple:
    """HOW MANY capsules have turned to the true digit."""
    to_true, to_others = report["coupling_histograms"]
    figure, axis = plt.subplots(figsize=(11, 7))
    style = {"fill": True, "alpha": 0.5}
    axis.stairs(to_true, EDGES, color=RED, label="to the true digit", **style)
    axis.stairs(to_others, EDGES, color=BLUE, label="to the nine others", **style)
    axis.axvline(0.1, label="equal share", **GREY)
    axis.set(xlabel="coupling", ylabel="share of the couplings of each colour, in %")
    axis.set_yscale("log")
    last_bin = np.flatnonzero(np.add(to_true, to_others)).max()
    axis.set_xlim(0, EDGES[last_bin + 1])
    axis.legend()
    return figure, routing_title(report)


def routing_title(report: dict) -> str:
    means = " → ".join(f"{value:.3f}" for value in report["coupling_to_true"])
    return f"mean coupling to the true digit, iteration by iteration: {means}"


@torch.inference_mode()
def decode(model, capsules: Tensor, classes: Tensor) -> Tensor:
    """Draw from the capsules of `classes` [n]: [n, J, D] -> [n, 28, 28], on the CPU.

    The drawings are in 0..1, where 0 is black.
    """
    drawn = model.decoder(capsules, classes.to(capsules.device))  # [n, 1, 28, 28]
    return drawn.squeeze(1).cpu()


@torch.inference_mode()
def draw_reconstructions(model, lengths, images: Tensor, labels: Tensor) -> tuple:
    """Ten digits and the four worst mistakes, each redrawn from two capsules.

    One is the true digit's, the other is the longest. They differ only if the network is
    wrong. If the true digit's capsule has almost no length, its drawing is a blur of all
    digits.
    """
    ten = first_of_each_class(labels, 1)
    mistakes = torch.from_numpy(worst_mistakes(lengths, labels.numpy()))
    shown = torch.cat([ten, mistakes[:4]])
    true = labels[shown]
    inputs = images_to_input(images[shown].to(device_of(model)), model)
    capsules = model(inputs)
    answers = model.scores(capsules).argmax(dim=1).cpu()
    rows = {
        "input": model.target(inputs).squeeze(1).cpu(),
        "true digit's\ncapsule": decode(model, capsules, true),
        "longest\ncapsule": decode(model, capsules, answers),
    }
    columns = []
    for digit, answer in zip(true.tolist(), answers.tolist(), strict=True):
        columns.append(f"{digit}" if digit == answer else f"{digit} → {answer}")
    drawings = torch.stack(list(rows.values()))  # [3, n, 28, 28]
    figure = draw_grid(drawings, list(rows), columns, figsize=(13, 3.7))
    numbers = f"the {model.digits.D} numbers of one capsule"
    return figure, f"redrawn from {numbers} (right: mistakes, true → predicted)"


@torch.inference_mode()
def draw_perturbations(model, images: Tensor, labels: Tensor) -> tuple:
    """Change one number of a capsule and redraw the capsule: [S17] figure 4.

    For each digit, this is the number that changes the drawing most.
    """
    ten = first_of_each_class(labels, 1)
    inputs = images_to_input(images[ten].to(device_of(model)), model)
    capsules = model(inputs)  # [10, J, D]
    drawings = []
    rows = []
    for digit in range(10):
        drawn = move_each_number(model, capsules[digit], digit)  # [D, steps, 28, 28]
        change = (drawn[:, -1] - drawn[:, 0]).abs().mean(dim=(1, 2))  # [D]
        most = int(change.argmax())
        drawings.append(drawn[most])
        rows.append(f"no. {most}")
    columns = [f"{step:+.2f}" for step in STEPS]
    figure = draw_grid(torch.stack(drawings), rows, columns, figsize=(12, 11))
    D = model.digits.D
    number = f"one of the capsule's {D} numbers (no. 0 to {D - 1})"
    return figure, f"each row: {number} is changed by"


def move_each_number(model, capsules: Tensor, digit: int) -> Tensor:
    """The capsules [J, D] of one image -> drawings [D, steps, 28, 28] on the CPU.

    For drawing [k, s], STEPS[s] was added to number k of the digit's capsule.
    """
    D = capsules.shape[1]
    moved = capsules.repeat(D, len(STEPS), 1, 1)  # [J, D] -> [D, steps, J, D]
    for k in range(D):
        moved[k, :, digit, k] += STEPS.to(capsules.device)
    moved = moved.flatten(0, 1)  # -> [D * steps, J, D]
    classes = torch.full([len(moved)], digit)
    drawn = decode(model, moved, classes)  # -> [D * steps, 28, 28]
    return drawn.unflatten(0, (D, len(STEPS)))


def draw_grid(drawings: Tensor, rows: list[str], columns: list[str], figsize: tuple):
    """A figure of drawings [rows, columns, 28, 28] in 0..1, as ink on paper."""
    framed = nn.functional.pad(drawings, (1, 1, 1, 1), value=0.3)  # a grey frame: 30x30
    # [rows, columns, 30, 30] -> [rows, 30, columns, 30] -> [rows * 30, columns * 30]
    page = framed.permute(0, 2, 1, 3)
    page = page.reshape(30 * len(rows), 30 * len(columns))
    figure, axis = plt.subplots(figsize=figsize)
    axis.imshow(page.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axis.set_xticks(30 * np.arange(len(columns)) + 14.5, columns)  # places, labels
    axis.set_yticks(30 * np.arange(len(rows)) + 14.5, rows)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.grid(False)
    return figure


def save_comparison(rows: list[dict], file: Path) -> None:
    """Validation accuracy over epochs and over time; a band spans a row's seeds."""
    common, names = short_names(rows)
    figure, axes = plt.subplots(1, 2, figsize=(13, 6 + 0.3 * len(rows)), sharey=True)
    left, right = axes
    for k, (row, name) in enumerate(zip(rows, names, strict=True)):
        curves = []
        for run in row["runs"]:
            curves.append([epoch["val_accuracy"] for epoch in run["history"]])
        style = {"color": COLOURS[k % 7], "marker": "os^vD"[k % 5]}
        style["label"] = f"{name}, n = {row['n']}"
        # All runs of a row have equally many epochs: their description says how many.
        epochs = np.arange(1, len(curves[0]) + 1)
        minutes = epochs * row["seconds"] / 60  # of training, without validation
        draw_accuracy(left, epochs, curves, **style)
        draw_accuracy(right, minutes, curves, **style)
    left.locator_params(axis="x", integer=True)
    left.set_xlabel("epoch")
    right.set(xlabel="minutes of training, at the fastest epoch's speed", xlim=(0, None), ylabel="")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center")  # below both
    save(figure, f"Validation accuracy over epochs and over time\n{join_words(common)}", file)


# -- 4. Your own digits ------------------------------------------------------------

SIDE = 480  # pixels: the longer side of every photo. All sizes below assume it.
# The lead of the longest capsule over the second. Between 1 and 4 % of MNIST's test digits
# have less, depending on the network.
MIN_LEAD = 0.5
DIGITS_PER_PAGE = 6  # of own-digits.png


def read_digit(file: Path) -> dict:
    """Find the digit in a photo, scan or drawing, before any network sees it.

    Returns file; photo, uint8 [h, w]; box, the digit's rows and columns in it; digit,
    uint8 [28, 28], as MNIST has it; doubts, a list of reasons why it may be wrong.
    """
    photo = read_brightness(file)
    light = paper_lightness(photo)
    if abs(light) < 0.03:  # a thick digit that fills the picture has hardly any paper
        photo = with_margin(photo)
        light = paper_lightness(photo)
    dark_on_light = photo if light > 0 else 1 - photo
    ink = without_rules(find_ink(dark_on_light))
    # Ink only in the outermost pixels does not count. A very narrow picture has no others,
    # hence initial=0. A TIFF of floats may hold nan.
    darkest = ink[1:-1, 1:-1].max(initial=0)
    if np.isnan(darkest) or darkest < 0.1:
        raise UserError(f"{file}: no digit can be seen: use a darker pen or more light")
    place, doubts = find_digit(ink)
    if abs(light) < 0.02:
        doubts.append("as much ink as paper")
    return {
        "file": file,
        "photo": (255 * photo).astype(np.uint8),
        "box": ndimage.find_objects(place.astype(int))[0],
        "digit": as_mnist(ink * place),
        "doubts": doubts,
    }


def read_brightness(file: Path) -> np.ndarray:
    """An image file -> brightness [h, w], 0 to 1; the longer side has SIDE pixels."""
    try:
        image = Image.open(file)
        # Let the JPEG decoder shrink a large photo while it reads it: faster.
        image.draft(None, (2 * SIDE, 2 * SIDE))
        image = ImageOps.exif_transpose(image)  # phones note how they were held
        deep = image.mode[0] in "IF"  # 16 or 32 bits a pixel, and no colours
        image = image.convert("F" if deep else "RGBA")
        image = ImageOps.contain(image, (SIDE, SIDE))
        if 0 in image.size:
            raise ValueError("it is too long and thin")
    except Exception as error:  # noqa: BLE001 - PIL fails in many ways
        formats = "PNG, JPEG, WebP, GIF, TIFF and BMP work"
        text = f"{file} is not an image that can be read: {error} ({formats})"
        raise UserError(text) from None
    if not deep:
        opaque = image.getchannel("A")
        page = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(page, image).convert("L")
        if np.median(opaque) < 128:  # transparent paper: the rest is ink, even white
            image = ImageOps.invert(opaque)
    brightness = np.asarray(image, dtype=np.float32)
    brightness = ndimage.gaussian_filter(brightness, 1)  # against grain: 1 pixel
    # The lightest pixel becomes 1: a photo may be dark, and a 16-bit image often uses only
    # a small part of its range.
    return brightness / max(1, brightness.max())


def paper_lightness(brightness: np.ndarray) -> float:
    """Above 0 if the paper is light, below 0 if it is dark.

    Near ink, most pixels are paper. So on light paper, a pixel is lighter on average than
    the middle between its lightest and its darkest neighbour. Areas without contrast add
    almost nothing.
    """
    near = SIDE // 8
    # A digit may fill the whole picture: continue the paper beyond its edges.
    brightness = np.pad(brightness, near, mode="edge")
    lightest = ndimage.maximum_filter(brightness, near)
    darkest = ndimage.minimum_filter(brightness, near)
    middle = (lightest + darkest) / 2
    return np.sum(brightness - middle) / np.sum(lightest - darkest + 1e-9)


def with_margin(brightness: np.ndarray) -> np.ndarray:
    """If the edge is light, halve the picture [h, w] and add paper around it."""
    edges = [brightness[0], brightness[-1], brightness[:, 0], brightness[:, -1]]
    edge = np.median(np.concatenate(edges))
    if edge < 0.5:  # this may be a desk, not paper
        return brightness
    half = brightness[::2, ::2]  # so that the picture is as large as before, with its margin
    return np.pad(half, SIDE // 4, constant_values=edge)


def find_ink(brightness: np.ndarray) -> np.ndarray:
    """Brightness [h, w] -> ink, 0 to 1: how much darker than the paper a pixel is."""
    # A closing removes what is dark and narrow: strokes. Wide shadows and desks remain.
    paper = ndimage.grey_closing(brightness, SIDE // 4)
    # The closing's window is a square, which does not fit into the rounded corner of a
    # shadow: there the paper is too light. Let the shadow spread into the corner, 2 pixels
    # in each step. The paper never becomes darker than the picture, and under a stroke it
    # stays light, because the paper around the stroke is light.
    for _ in range(12):
        paper = np.maximum(ndimage.minimum_filter(paper, 5), brightness)
    # Divide by at least 0.4, so that the grain of a black desk does not count as ink.
    return (paper - brightness) / np.maximum(paper, 0.4)


def find_rules(ink: np.ndarray) -> np.ndarray:
    """Ink [h, w] -> the ink of thin straight lines from the left edge to the right."""
    height, width = ink.shape
    columns = np.arange(0, width, 4)  # a quarter of the columns is enough
    # No line is quite straight, so widen everything by a pixel upwards and downwards.
    dark = ndimage.maximum_filter(ink, (3, 1))[:, columns]
    thin = ndimage.white_tophat(dark, (SIDE // 30, 1))  # what is less than 16 pixels high
    rules = np.zeros_like(dark)
    for slope in np.linspace(-0.1, 0.1, 21):
        rise = np.round(slope * columns).astype(int)
        # rows[y] follows the line that begins at height y. If it leaves the picture, it
        # comes back at the opposite edge.
        rows = (np.arange(height)[:, None] + rise) % height
        dark_along = np.take_along_axis(dark, rows, axis=0)
        thin_along = np.take_along_axis(thin, rows, axis=0)
        # A rule has few gaps: 80 % of the line have at least this much ink.
        ink_on_most = np.quantile(dark_along, 0.2, axis=1, keepdims=True)
        # A rule is thin, unlike the edge of a desk: a third of the line has at least this
        # much thin ink. (Elsewhere strokes may cross it.)
        ink_on_a_third = np.quantile(thin_along, 2 / 3, axis=1, keepdims=True)
        rule = np.minimum(ink_on_most, ink_on_a_third)  # [height, 1]
        known = np.take_along_axis(rules, rows, axis=0)
        np.put_along_axis(rules, rows, np.maximum(known, rule), axis=0)
    return rules.repeat(4, axis=1)[:, :width]


def without_rules(ink: np.ndarray) -> np.ndarray:
    """Ink without the lines of lined and squared paper, margins and frames."""
    rules = np.maximum(find_rules(ink), find_rules(ink.T).T)
    others = np.where(ink > 1.5 * rules, ink, 0)  # a stroke that crosses a rule is darker
    if others.max() < 0.3 * ink.max():  # hardly any ink remains: the line was a digit 1
        return ink
    return others


def without_boxes(parts: np.ndarray) -> np.ndarray:
    """Numbered parts [h, w] -> the same without a form's boxes around other parts."""
    remaining = parts.copy()
    for number, place in enumerate(ndimage.find_objects(parts), start=1):
        own = parts[place] == number
        hole = ndimage.binary_fill_holes(own) & ~own
        inside = np.count_nonzero(parts[place][hole])
        if inside > 0.2 * own.sum():  # more than a speck
            remaining[place][own] = 0
    return remaining


def with_near_parts(candidates: np.ndarray, main: np.ndarray) -> np.ndarray:
    """The main part of a digit, and candidates within a tenth of its height: bool [h, w].

    Broken strokes belong to a digit, and so does the roof of a 5.
    """
    height = np.ptp(main.nonzero()[0]) + 1
    # Parts that are a tenth apart touch if each grows by a twentieth.
    near = ndimage.distance_transform_edt(~candidates) < 0.05 * height
    groups, _ = ndimage.label(near, np.ones((3, 3)))  # diagonal neighbours, too
    return candidates & (groups == groups[main][0])


def find_digit(ink: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Ink [h, w] -> where the digit is, bool [h, w], and the reasons to doubt it."""
    height, width = ink.shape
    # 1 in the middle of the picture, exactly 0 at its edges
    centrality = np.outer(np.hanning(height), np.hanning(width))
    central = ink * centrality
    # The darkest ink of all may be a desk at the edge, so the threshold is relative to
    # the darkest ink near the middle.
    parts, count = ndimage.label(ink > 0.3 * central.max(), np.ones((3, 3)))
    parts = without_boxes(parts)
    numbers = np.arange(count + 1)  # 0 is the paper
    # The main part has the most ink near the middle.
    at_edge = np.isin(numbers, parts[centrality == 0])
    weight = ndimage.sum_labels(central, parts, numbers)
    weight[at_edge] *= 0.3
    weight[0] = 0
    main = weight.argmax()
    # Which other parts may belong to it?
    darkest = ndimage.maximum(ink, parts, numbers)
    is_candidate = darkest > 0.5 * darkest[main]  # what is fainter is shadow or grain
    if not at_edge[main]:
        is_candidate &= ~at_edge  # these are a desk, a finger or a neighbour
    candidates = is_candidate[parts] & (parts > 0)
    digit = with_near_parts(candidates, parts == main)
    others = candidates & ~digit
    ys, xs = digit.nonzero()
    doubts = {
        "several candidates": central[others].sum() > 0.2 * central[digit].sum(),
        "ink at the edge of the picture": at_edge[main],
        "wider than a digit": np.ptp(xs) > 1.3 * np.ptp(ys),
        "very small": np.ptp(ys) < 20,  # pixels: MNIST's digits are 20 high
    }
    return digit, [reason for reason, holds in doubts.items() if holds]


def as_mnist(ink: np.ndarray) -> np.ndarray:
    """The ink of one digit [h, w] -> uint8 [28, 28], light on black, like MNIST's."""
    ink = ink / ink.max() - 0.3  # the rim of a stroke is half paper
    ink = np.clip(ink, 0, None)
    box = ndimage.find_objects((ink > 0).astype(int))[0]
    digit = Image.fromarray(ink[box])
    scale = 20 / max(digit.size)  # MNIST's digits fit into 20x20
    size = [max(1, round(scale * length)) for length in digit.size]
    small = np.asarray(digit.resize(size, Image.Resampling.BILINEAR))
    # The centre of mass goes to the middle, unless a row or a column would be cut off.
    height, width = small.shape
    y, x = ndimage.center_of_mass(small)
    top = np.clip(round(14 - y), 0, 28 - height)
    left = np.clip(round(14 - x), 0, 28 - width)
    picture = np.zeros((28, 28), np.uint8)
    picture[top : top + height, left : left + width] = 255 * small / small.max()
    return picture


def read_own_digits(run: dict, args: argparse.Namespace, out: Path) -> None:
    """Print and draw what the network says about the user's images."""
    # All files are read first: if one is bad, nothing is printed.
    readings = [read_digit(file) for file in progress(args.image, "images")]
    digits = torch.from_numpy(np.stack([reading["digit"] for reading in readings]))
    model = load_network(run, args.device)
    capsules = outputs(model, digits, title="your digits")
    all_lengths = model.scores(capsules).cpu()
    for reading, lengths in zip(readings, all_lengths.numpy(), strict=True):
        reading["lengths"] = lengths
        second, longest = np.sort(lengths)[-2:]
        if longest - second < MIN_LEAD:
            reading["doubts"].append("no clear winner")
        print(describe_reading(reading))
    if model.decoder is not None:
        drawings = decode(model, capsules, all_lengths.argmax(dim=1))
        for reading, drawing in zip(readings, drawings.numpy(), strict=True):
            reading["redrawn"] = drawing
    save_pages(run, readings, out)


def save_pages(run: dict, readings: list[dict], out: Path) -> None:
    """Draw own-digits.png and, if there are many digits, own-digits-2.png, ..."""
    pages = math.ceil(len(readings) / DIGITS_PER_PAGE)
    for page in progress(range(pages), "pages"):
        first = page * DIGITS_PER_PAGE
        figure = draw_readings(readings[first : first + DIGITS_PER_PAGE])
        number = f"-{page + 1}" if page > 0 else ""
        title = f"{describe(run)}\npage {page + 1} of {pages}"
        save(figure, title, out / f"own-digits{number}.png")


def describe_reading(reading: dict) -> str:
    """The line that is printed for one image."""
    lengths = reading["lengths"]
    numbers = " ".join(f"{length:.2f}" for length in lengths)
    text = f"{reading['file']}: {lengths.argmax()}, lengths {numbers}"
    if reading["doubts"]:
        text += f", unsure: {', '.join(reading['doubts'])}"
    return text


def draw_readings(readings: list[dict]):
    """A row for each image: the photo, the digit, perhaps redrawn, and the lengths."""
    widths = {"photo": 4, "digit": 3, "redrawn": 3, "lengths": 6}
    if "redrawn" not in readings[0]:  # without a decoder
        del widths["redrawn"]
    figure, axes = plt.subplots(
        len(readings),
        len(widths),
        figsize=(13, 1.4 + 2.6 * len(readings)),  # inches
        width_ratios=list(widths.values()),
        squeeze=False,
    )
    for row, reading in zip(axes, readings, strict=True):
        for axis, column in zip(row, widths, strict=True):
            if column == "photo":
                draw_photo(axis, reading)
            elif column == "lengths":
                draw_lengths(axis, reading)
            else:
                most = 255 if column == "digit" else 1  # of 0..255, or of 0..1
                axis.imshow(reading[column], cmap="gray_r", vmin=0, vmax=most)  # ink on paper
                axis.set(xticks=[], yticks=[])
    for axis, column in zip(axes[0], widths, strict=True):
        if column != "lengths":  # they have titles of their own
            axis.set_title(column)
    return figure


def draw_photo(axis, reading: dict) -> None:
    """The photo with a box around the digit."""
    rows, columns = reading["box"]
    width = columns.stop - columns.start
    height = rows.stop - rows.start
    corner = (columns.start, rows.start)
    box = plt.Rectangle(corner, width, height, fill=False, edgecolor=RED, linewidth=2.5)
    axis.imshow(reading["photo"], cmap="gray", vmin=0, vmax=255)
    axis.add_patch(box)
    axis.set(xticks=[], yticks=[])


def draw_lengths(axis, reading: dict) -> None:
    """The lengths of the ten capsules; above them the answer and the first doubt."""
    lengths = reading["lengths"]
    answer = lengths.argmax()
    colours = ["grey"] * 10
    colours[answer] = RED
    axis.bar(range(10), lengths, color=colours)
    axis.set(xticks=range(10), ylim=(0, 1), ylabel="length")
    name = ascii(reading["file"].name)[1:-1]  # the font lacks many characters
    title = f"{name}: {answer}"
    if reading["doubts"]:
        title += f"\nunsure: {reading['doubts'][0]}"
    axis.set_title(title, parse_math=False)  # a $ does not begin a formula


# -- 5. Main -----------------------------------------------------------------------


def evaluate_run(run: dict, args: argparse.Namespace, out: Path) -> None:
    """Print the report of a run, and write it to `out` with all pictures.

    The report of an archived run stays as it is: only its pictures are written.
    """
    config = run["config"]
    data_dir = args.data_dir or config["data_dir"]
    images, labels = load(config["dataset"], data_dir, "test")
    model = load_network(run, args.device) if weights_file(run) else None
    if is_archived(run):
        lengths = read_lengths(run, labels.numpy())
    else:
        run["report"], lengths = measure(run, model, images, labels)
        routed = first_of_each_class(labels, ROUTED)
        run["report"] |= routing_summary(model, images[routed], labels[routed])
        write_json(out / "report.json", run["report"])
        write_lengths(out / "lengths.npy", lengths)
        for name in ("reconstructions.png", "perturbations.png"):
            (out / name).unlink(missing_ok=True)  # of a run with a decoder, now replaced
    print(report_text(run, labels.numpy(), lengths.argmax(axis=1)))
    save_pictures(run, lengths, images, labels, out)
    if model is not None and model.decoder is not None:
        save_decoder_pictures(run, model, lengths, images, labels, out)


def compare(runs: list[dict], out: Path) -> None:
    """Print the table of several runs, and write it with its picture."""
    for run in runs:
        if run["report"] is None:
            folder = run["folder"]
            hint = f"first run python evaluate.py {shell_path(folder)}"
            raise UserError(f"{folder} has no report of its best epoch: {hint}")
        if run["config"]["dataset"] != runs[0]["config"]["dataset"]:
            hint = "choose runs on the same dataset"
            raise UserError(f"runs on mnist and on digits cannot be compared: {hint}")
    rows = make_rows(runs)
    text = comparison_text(rows)
    print(text)
    write_file(out / "comparison.md", text.encode())
    columns = [name for name in rows[0] if name not in ("runs", "values")]
    write_csv(out / "comparison.csv", columns, rows)
    save_comparison(rows, out / "comparison.png")


def read_arguments() -> argparse.Namespace:
    """The command line. UserError if it makes no sense."""
    parser = train_single.Parser(__doc__)
    flag = parser.add_argument
    flag("runs", nargs="+", type=some_path, metavar="RUN", help="folder of a run")
    flag("--image", nargs="+", type=some_path, metavar="FILE", help="your own digits")
    flag("--out", type=some_path, metavar="DIR", help="write here and nowhere else")
    data_help = "folder that holds MNIST/raw; default: the one used in training"
    flag("--data-dir", type=some_path, metavar="DIR", help=data_help)
    device_help = "cpu, cuda, cuda:1 ...; default: the GPU if there is one"
    flag("--device", help=device_help)
    # Our Parser leaves out a flag that is not given.
    parser.set_defaults(image=None, out=None, data_dir=None, device=None)
    args = parser.parse_args()
    if len(args.runs) > 1 and args.image:
        parser.error("--image needs exactly one run")
    args.device = train_single.find_device(args.device)
    return args


def some_path(text: str) -> Path:
    """A type for argparse."""
    return Path(train_single.nonempty_path(text))


def usual_folder(runs: list[dict]) -> Path:
    """Where the files go without --out. An archived run's folder stays as it is."""
    if len(runs) > 1:
        return Path("runs/comparison")
    folder = runs[0]["folder"]
    if is_archived(runs[0]):
        return Path("runs") / f"{folder.resolve().name}-evaluated"
    return folder


def main() -> None:
    args = read_arguments()
    runs = [read_run(folder) for folder in args.runs]
    out = args.out or usual_folder(runs)
    out.mkdir(parents=True, exist_ok=True)
    if args.image:
        read_own_digits(runs[0], args, out)
    elif len(runs) == 1:
        evaluate_run(runs[0], args, out)
    else:
        compare(runs, out)
    print(f"written to {out}")


# -- 6. The files of a run, and how they are checked -------------------------------


def check_like(values: dict, examples: dict) -> None:
    """ValueError unless each value has the type and the shape of its example.

    Numbers must also be finite and at least 0. For a float, a whole number will do.
    """
    for name, example in examples.items():
        if example is None:
            continue
        expected = np.array(example)
        found = np.array(values[name])
        kind = found.dtype.kind  # i: int, f: float, b: bool, U: text
        if kind == "i" and expected.dtype.kind == "f":
            kind = "f"
        fits = kind == expected.dtype.kind and found.shape == expected.shape
        if fits and kind in ("i", "f"):
            fits = np.all((found >= 0) & (found < 1e15))  # False for nan
        if not fits:
            shown = repr(values[name])[:60]
            raise ValueError(f"{name} is {shown}")


# For check_like: a value of the right type and shape for each name in a file. The value
# itself does not matter. If it is None, the name is not checked.
SETTINGS = train_single.DEFAULTS | {  # config.json
    "model": "alexcaps",
    "device": "cpu",
    "hardware": "2 CPU threads",
    "train_images": 55_000,
}
EPOCH = {  # a line of metrics.csv
    "train_loss": 0.01,
    "train_accuracy": 99.5,
    "val_loss": 0.01,
    "val_accuracy": 99.5,
    "seconds": 100.0,
}
REPORT = {  # report.json
    "kept_epoch": 20,
    "kept_val_accuracy": 99.0,
    "parameters": 2_677_696,
    "flops_per_image": 261_220_352,
    "test_images": 10_000,
    "errors": 100,
    "accuracy": 99.0,
    "interval_95": [98.8, 99.2],
    "auc": np.ones(10),
    "confusion": np.ones((10, 10), dtype=int),
}


def read_run(folder: Path) -> dict:
    """A run's folder, config (settings), history (of epochs), best epoch and report.

    The report is None if it is missing or of an earlier epoch. Then best.pt must be
    there to make a new one. UserError if the folder holds no run, or a damaged one.
    """
    config = read_checked(folder / "config.json", parse_config)
    if config["model"] not in MODELS:
        text = f"{folder} belongs to another network, {config['model']}"
        hint = "for a plain network, write -m results.plain before the script's name"
        raise UserError(f"{text}: {hint}")
    history = read_checked(folder / "metrics.csv", parse_history)
    if not history:
        raise UserError(f"{folder} has no finished epoch yet: continue its training")
    # The row of best.pt: if several are equal, it is the earliest.
    best = max(history, key=lambda row: row["val_accuracy"])
    run = {"folder": folder, "config": config, "history": history, "best": best}
    run["report"] = None
    if (folder / "report.json").exists():
        network = MODELS[config["model"]]
        report = read_checked(folder / "report.json", parse_report, network)
        kept = (report["kept_epoch"], report["kept_val_accuracy"])
        if kept == (best["epoch"], best["val_accuracy"]):
            run["report"] = report
    if run["report"] is None and is_archived(run):
        raise UserError(f"{folder} has neither best.pt nor a report of its best epoch")
    return run


def read_checked(file: Path, parse, *more):
    """parse(content of the file, *more). UserError if it is missing or damaged."""
    try:
        return parse(file.read_bytes(), *more)
    except FileNotFoundError:
        raise UserError(f"{file.parent} holds no run: {file.name} is missing") from None
    except KeyError as error:
        reason = f"{error} is missing"
    except (OSError, ValueError, TypeError, RecursionError, csv.Error) as error:
        reason = str(error)
    raise UserError(f"{file} is damaged, or does not belong to a run: {reason}")


def parse_config(content: bytes) -> dict:
    """config.json -> the settings. Older runs lack some: these get their defaults."""
    config = train_single.DEFAULTS | json.loads(content)
    check_like(config, SETTINGS)
    if config["dataset"] not in VALIDATION_SIZE:
        raise ValueError(f"dataset is {config['dataset']!r:.60}")
    return config


def parse_history(content: bytes) -> list[dict]:
    """metrics.csv -> a row of numbers for each epoch."""
    history = []
    lines = io.StringIO(content.decode(), newline="")
    for epoch, texts in enumerate(csv.DictReader(lines), start=1):
        row = {name: float(text) for name, text in texts.items()}
        check_like(row, EPOCH)
        row["epoch"] = epoch  # a whole number
        history.append(row)
    return history


def parse_report(content: bytes, network) -> dict:
    """report.json -> the figures. Those of routing are checked if there are any."""
    report = json.loads(content)
    check_like(report, REPORT)
    accuracies = at_angles(report)
    turned_images = report["rotation"]["images"]
    found = {"rotation": accuracies, "images": turned_images}
    check_like(found, {"rotation": [99.0] * len(ANGLES), "images": 1000})
    if max(report["accuracy"], *accuracies) > 100:
        raise ValueError("an accuracy is above 100 %")
    if min(report["test_images"], turned_images) < 1:
        raise ValueError("it was measured on no images")
    if "coupling_maps" in report:
        routing = {
            "coupling_to_true": [0.1] * len(report["coupling_to_true"]),
            "coupling_maps": np.ones((10, network.map_side**2)),
            "coupling_histograms": np.ones((2, len(EDGES) - 1)),
        }
        check_like(report, routing)
        if np.sum(report["coupling_histograms"], axis=1).min() == 0:
            raise ValueError("a histogram of couplings is empty")
    return report


def read_lengths(run: dict, labels: np.ndarray) -> np.ndarray:
    """lengths.npy of an archived run, [n, 10] for n labels: see predict.

    UserError if it is missing, damaged, or does not match report.json.
    """
    file = run["folder"] / "lengths.npy"
    if not file.exists():
        hint = "the run can be compared, but its pictures cannot be drawn"
        raise UserError(f"{file} is missing: {hint}")
    lengths = read_checked(file, parse_lengths)
    if len(lengths) == len(labels):
        confusion = metrics.confusion_matrix(labels, lengths.argmax(axis=1), labels=range(10))
        if confusion.tolist() == run["report"]["confusion"]:
            return lengths
    hint = "is one of them from another run?"
    raise UserError(f"{file} does not match the report.json beside it: {hint}")


def parse_lengths(content: bytes) -> np.ndarray:
    """lengths.npy -> float32 [n, 10]. Older runs kept float16."""
    try:
        lengths = np.load(io.BytesIO(content), allow_pickle=False)
        fits = lengths.dtype in (np.float16, np.float32) and lengths.shape[1:] == (10,)
        fits = fits and np.isfinite(lengths).all()
    except Exception:  # noqa: BLE001 - a damaged file makes NumPy fail in many ways
        fits = False
    if not fits:
        raise ValueError("it does not hold ten lengths for each image")
    return lengths.astype(np.float32)


def is_archived(run: dict) -> bool:
    """True if best.pt is gone. Then no new report can be made."""
    return not (run["folder"] / "best.pt").exists()


def weights_file(run: dict) -> Path | None:
    """best.pt of a run; if it is archived, weights.pt; None if it has neither."""
    for name in ("best.pt", "weights.pt"):
        if (run["folder"] / name).exists():
            return run["folder"] / name
    return None


def load_network(run: dict, device: torch.device) -> nn.Module:
    """The network of a run with the weights of its best epoch, ready to evaluate.

    best.pt has them in float32. weights.pt has them rounded to float16: good enough to
    draw and to read own digits, but no figure of a report comes from it. From here on,
    this process computes without TF32.
    """
    # Training may use TF32 on a GPU. A report may not: TF32 has 10 bits of mantissa,
    # float32 has 23.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    file = weights_file(run)
    if file is None:
        hint = "choose a run with best.pt or weights.pt"
        raise UserError(f"{run['folder']} has figures, but no weights: {hint}")
    if file.name == "best.pt":
        checkpoint = train_single.load_checkpoint(file)
        history = checkpoint["history"]
        # Training writes last.pt, best.pt and metrics.csv, and may be killed in between.
        if not history or history[-1] != run["best"]:
            hint = "if the run is still training, try again, otherwise resume it"
            raise UserError(f"{file} does not match metrics.csv's best epoch: {hint}")
        weights = checkpoint["model"]
    else:
        weights = train_single.load_saved(file)
    model = train_single.make_network(run["config"])
    try:
        model.load_state_dict(weights)  # into float32, whatever the file has
    except (RuntimeError, TypeError, AttributeError):  # other names or shapes
        hint = "is one of them from another run, or from other code?"
        text = f"{file} does not fit the network of the config.json beside it: {hint}"
        raise UserError(text) from None
    # [B, H, W, C] in memory is faster.
    return model.to(device, memory_format=torch.channels_last).eval()


def write_json(file: Path, values: dict) -> None:
    """Write JSON with one line for each key."""
    lines = [f'"{name}": {json.dumps(value)}' for name, value in values.items()]
    text = "{" + ",\n ".join(lines) + "}\n"
    write_file(file, text.encode())


def write_lengths(file: Path, lengths: np.ndarray) -> None:
    """Write an array [n, 10] in NumPy's format."""
    buffer = io.BytesIO()
    np.save(buffer, lengths)
    write_file(file, buffer.getvalue())


if __name__ == "__main__":
    train_single.run_main(main)
