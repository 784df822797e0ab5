"""Does a capsule know the pose of its digit? Probe the capsules of trained networks.

    bash results/pose.sh                      train nine networks, then probe them
    python -m results.pose runs/pose/*        probe runs that have their weights
    python -m results.pose RUN --digit 7      draw a 7 instead of a 4

A capsule's LENGTH says how sure the network is that its digit is there. Its DIRECTION
should say in which pose. A probe measures that: linear regression predicts the pose
from the numbers of the true digit's capsule, with one probe for each digit class.

    slant    how far a digit leans to the right as it was written, in degrees
    stroke   how wide its strokes are, in pixels
    turn     the digits are turned by known angles, uniform in ±30 degrees; above 0 is
             counter-clockwise
    right    the digits are moved by known distances, uniform in ±3 pixels
    down     the same, downwards

R² is the share of a pose's variance within a class that the probe explains: 1 is
perfect, 0 is no better than the class mean. The probes are fitted on half of the 10,000
test digits and evaluated on the other half. Only digits that the network recognises
count. A plain CNN and the pixels are probed in the same way, for comparison.

The measurements go to pose.json, from which results.tables makes the tables of both
pages. knobs.png shows what a decoder redraws if the mean capsule of a class is moved in
the direction that goes with each pose. The last of the given runs that has a decoder
draws it. Probing a run of AlexCapsNet takes about a minute on one CPU core.
"""

import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import evaluate
from alexcaps import AlexCapsNet
from data import UserError, images_to_input, load
from results import plain
from results.claims import of_mean, over_seeds
from train_single import MODELS, Parser, find_device, run_main, write_file

# The poses that we choose instead of measuring them. Largest values: degrees, pixels
CHOSEN = {"turn": 30.0, "right": 3.0, "down": 3.0}
RIDGE = 1.0  # small compared with the 500 digits on which a probe is fitted
COMPONENTS = 16  # as many as a digit capsule has numbers
BATCH = 250  # images at a time
STEPS = 3  # drawn to either side of the mean capsule
# The poses, each with the format of its values in knobs.png
POSES = {
    "slant": "{:+.0f}°",
    "stroke": "{:.1f} px",
    "turn": "{:+.0f}°",
    "right": "{:+.0f} px",
    "down": "{:+.0f} px",
}
# What a probe may see, and how many numbers that is
CAPSULE = "whole capsule (16)"
DIRECTION = "direction (16)"
LENGTH = "length (1)"
LOGITS = "logits (10)"
HIDDEN = "hidden layer (16 PCs)"  # principal components
PIXELS = "pixels (16 PCs)"
UNTRAINED = ""  # "training" of the pixels in pose.json: no network was trained

# -- 1. Digits whose pose is known ----------------------------------------------------


class View(NamedTuple):
    """The test digits in one version, and what is known of their pose there."""

    name: str
    poses: dict[str, Tensor]  # by name, each [n]
    moves: dict[str, Tensor]  # arguments of images_to_input: degrees [n] or shifts [n, 2]

    def inputs(self, images: Tensor, chosen: Tensor, model) -> Tensor:
        """What `model` sees of the chosen images: [B, 1, side, side]."""
        moves = {name: values[chosen] for name, values in self.moves.items()}
        return images_to_input(images[chosen], model, **moves)


def make_views(images: Tensor) -> list[View]:
    """The three versions of uint8 images [n, 28, 28].

    Every call with n images draws the same angles and shifts.
    """
    generator = torch.Generator().manual_seed(1)
    uniform = 2 * torch.rand(3, len(images), generator=generator) - 1
    turn = CHOSEN["turn"] * uniform[0]
    right = CHOSEN["right"] * uniform[1]
    down = CHOSEN["down"] * uniform[2]
    shifts = torch.stack([right, down], dim=1)
    measured = {"slant": slant(images), "stroke": stroke_width(images)}
    return [
        View("as written", measured, {}),
        View("turned", {"turn": turn}, {"degrees": turn}),
        View("shifted", {"right": right, "down": down}, {"shifts": shifts}),
    ]


def slant(images: Tensor) -> Tensor:
    """How far digits [n, 28, 28] lean to the right, in degrees: [n].

    From the moments of the ink: regression of x on y gives the shear of the digit.
    """
    ink = images.double()
    ys, xs = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    total = ink.sum(dim=(1, 2), keepdim=True)
    dx = xs - (ink * xs).sum(dim=(1, 2), keepdim=True) / total  # from the centre of mass
    dy = ys - (ink * ys).sum(dim=(1, 2), keepdim=True) / total
    shear = (ink * dx * dy).sum(dim=(1, 2)) / (ink * dy * dy).sum(dim=(1, 2))
    return -torch.rad2deg(shear.atan())  # y points down


def stroke_width(images: Tensor) -> Tensor:
    """How wide the strokes of digits [n, 28, 28] are, in pixels: [n].

    A stroke of length L and width w has an area of L w and a perimeter of 2 L, so w is
    2 area / perimeter. The perimeter is the sum of the gradient's magnitude, because
    brightness rises from 0 to 1 across an edge. Below 2 pixels the result is too large,
    because such a stroke may have no pixel that is all ink.
    """
    ink = nn.functional.pad(images.double() / 255, (1, 1, 1, 1))
    # Take both diagonals of each 2x2 pixels. With differences to the right and down,
    # strokes that lean to the left would seem 10 % thinner than their mirror images.
    falling = ink[:, 1:, 1:] - ink[:, :-1, :-1]
    rising = ink[:, :-1, 1:] - ink[:, 1:, :-1]
    gradient = torch.hypot(falling, rising) / math.sqrt(2)  # a diagonal has length √2
    return 2 * ink.sum(dim=(1, 2)) / gradient.sum(dim=(1, 2))


# -- 2. The probe ---------------------------------------------------------------------


def probe(features: Tensor, values: Tensor, labels: Tensor, fit: Tensor) -> float:
    """R² of a pose's values [n], predicted class by class from features [n, k].

    The probes are fitted on the digits whose `fit` [n] is True, and evaluated on the
    others. Squares are summed over all classes.
    """
    errors = 0.0
    squares = 0.0
    for digit in labels.unique():
        own = labels == digit
        half = fit[own]
        x = standardise(features[own].double(), half)
        y = values[own].double()
        y = y - y[half].mean()
        weights = ridge_regression(x[half], y[half])
        errors += (y[~half] - x[~half] @ weights).square().sum().item()
        squares += y[~half].square().sum().item()
    return 1 - errors / squares


def standardise(x: Tensor, half: Tensor) -> Tensor:
    """Features [n, k] with mean 0 and standard deviation 1 in the rows of `half`.

    If there are more than COMPONENTS, their first principal components replace them.
    """
    x = x - x[half].mean(dim=0)
    if x.shape[1] > COMPONENTS:
        axes = torch.linalg.svd(x[half], full_matrices=False).Vh  # a row is an axis
        x = x @ axes[:COMPONENTS].T  # [n, k] -> [n, COMPONENTS]
    return x / (x[half].std(dim=0) + 1e-12)  # a feature may be constant


def ridge_regression(x: Tensor, y: Tensor) -> Tensor:
    """The weights [k] that predict y [n] from x [n, k], both with mean 0."""
    #   w = (x^T x + RIDGE I)^-1 x^T y
    penalty = RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(x.T @ x + penalty, x.T @ y)


# -- 3. One network -------------------------------------------------------------------


@torch.inference_mode()
def look(model, images: Tensor, labels: Tensor, view: View) -> tuple[dict, Tensor]:
    """What a probe may see, {name: [n, k]}, and which digits are recognised: [n].

    Without a model (None) a probe sees the pixels, and all digits count as recognised.
    """
    indices = torch.arange(len(labels))
    if model is None:
        # AlexCapsNet sees the digits at their own size, 28x28.
        pixels = view.inputs(images, indices, AlexCapsNet).flatten(1)
        return {PIXELS: pixels}, torch.ones(len(labels), dtype=torch.bool)
    device = evaluate.device_of(model)
    pieces = defaultdict(list)  # of the features, batch by batch
    recognised = []
    for chosen in indices.split(BATCH):
        x = view.inputs(images, chosen, model).to(device)
        digits = labels[chosen]
        if isinstance(model, plain.WithoutCapsules):
            hidden = model.hidden(x)
            scores = model.scores(model.digits(hidden)).cpu()
            pieces[LOGITS].append(scores)
            pieces[HIDDEN].append(hidden.cpu())
        else:
            capsules = model(x)  # [B, J, D]
            scores = model.scores(capsules).cpu()
            rows = torch.arange(len(digits))
            capsule = capsules.cpu()[rows, digits]  # [B, J, D] -> [B, D]
            length = scores[rows, digits].unsqueeze(1)  # [B, J] -> [B, 1]
            pieces[LENGTH].append(length)
            pieces[DIRECTION].append(capsule / length)
            pieces[CAPSULE].append(capsule)
        recognised.append(scores.argmax(dim=1) == digits)
    features = {name: torch.cat(batches) for name, batches in pieces.items()}
    return features, torch.cat(recognised)


def measure(name, model, images: Tensor, labels: Tensor) -> dict:
    """For each view: accuracy in percent, digits used. For each feature and pose: R².

    UserError, which begins with `name`, if a class has too few recognised digits.
    """
    # MNIST's test digits are not in random order, so the halves are drawn at random.
    # They are the same for all networks.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    fit = torch.zeros(len(labels), dtype=torch.bool)
    fit[order[: len(labels) // 2]] = True
    found = {"accuracy": {}, "digits": {}, "r2": defaultdict(dict)}
    for view in make_views(images):
        features, used = look(model, images, labels, view)
        if labels[used].bincount(minlength=10).min() < 2 * COMPONENTS:
            hint = "train it for longer"
            raise UserError(f"{name} recognises too few digits of a class: {hint}")
        if model is not None:
            found["accuracy"][view.name] = round(100 * used.double().mean().item(), 2)
        found["digits"][view.name] = int(used.sum())
        for feature, x in features.items():
            for pose, values in view.poses.items():
                r2 = probe(x[used], values[used], labels[used], fit[used])
                found["r2"][feature][pose] = round(r2, 4)
    return found


def identify(run: dict) -> dict:
    """Which network this is. Those with the same "training" can be compared."""
    model = run["model"]
    if isinstance(model, plain.WithoutCapsules):
        kind = "plain CNN"
    elif model.decoder is None:
        kind = "capsules"
    else:
        kind = "capsules and decoder"
    # Describe the training without the words that tell the three kinds apart.
    words = evaluate.settings_in_words(run)
    words["model"] = run["config"]["model"].removeprefix("plain-")
    words["reconstruction"] = ""
    return {
        "network": evaluate.describe(run),
        "kind": kind,
        "training": evaluate.join_words(words.values()),
        "seed": run["config"]["seed"],
    }


# -- 4. Seeds together ----------------------------------------------------------------


def pool(measured: list[dict]) -> list[dict]:
    """Runs -> one entry for all runs that differ only in their seed.

    Instead of each R², an entry has a summary of all seeds.
    """
    groups = defaultdict(list)
    for found in measured:
        groups[found["network"]].append(found)
    entries = []
    for group in groups.values():
        group.sort(key=lambda found: found["seed"] or 0)  # None is the pixels'
        entry = {name: group[0][name] for name in ("network", "kind", "training")}
        entry["seeds"] = [found["seed"] for found in group]
        entry["accuracy"] = [found["accuracy"] for found in group]
        entry["digits"] = [found["digits"] for found in group]
        entry["r2"] = defaultdict(dict)
        for feature in group[0]["r2"]:
            for pose in POSES:
                values = [found["r2"][feature][pose] for found in group]
                entry["r2"][feature][pose] = summary(values)
        entries.append(entry)
    return entries


def summary(values: list[float]) -> dict:
    """The values of all seeds, their mean, and its 95 % interval: None for one seed."""
    interval = None
    if len(values) > 1:
        _, low, high = of_mean(values)
        interval = [round(low, 4), round(high, 4)]
    return {"values": values, "n": len(values), "mean": mean(values), "interval": interval}


def difference(first: dict, second: dict) -> dict:
    """The first summary's mean minus the second's, and its 95 % interval."""
    gap = first["mean"] - second["mean"]
    interval = None
    if first["n"] + second["n"] > 2:
        _, low, high = over_seeds(first["values"], second["values"])
        interval = [low, high]
    return {"mean": gap, "interval": interval}


def trained_alike(probed: dict) -> dict:
    """The networks that were trained alike, {kind: entry}, and the pixels.

    Only these can be compared. If there are several such groups, take the largest. If
    several networks of a group are of one kind (decoders with different weights of their
    loss, for example), take the first.
    """
    groups = defaultdict(dict)
    for entry in probed["networks"]:
        groups[entry["training"]].setdefault(entry["kind"], entry)
    pixels = groups.pop(UNTRAINED)
    return max(groups.values(), key=len) | pixels


def differences(probed: dict) -> dict:
    """Differences between networks that were trained alike: {title: {pose: difference}}."""
    entries = trained_alike(probed)
    by_title = {}
    for kind, other, seen_of_other in (
        ("capsules", "plain CNN", LOGITS),
        ("capsules", "plain CNN", HIDDEN),
        ("capsules and decoder", "plain CNN", LOGITS),
        ("capsules and decoder", "plain CNN", HIDDEN),
        ("capsules and decoder", "capsules", DIRECTION),
    ):
        if kind in entries and other in entries:
            first = entries[kind]["r2"][DIRECTION]
            second = entries[other]["r2"][seen_of_other]
            title = f"{kind}: {DIRECTION}, minus {other}: {seen_of_other}"
            by_title[title] = {pose: difference(first[pose], second[pose]) for pose in POSES}
    return by_title


# -- 5. Tables, made from pose.json ----------------------------------------------------


def with_interval(figure: dict, form: str) -> str:
    """A mean and its interval: 0.46 (0.41 to 0.50)."""
    text = f"{figure['mean']:{form}}"
    if figure["interval"]:
        low, high = figure["interval"]
        text += f" ({low:{form}} to {high:{form}})"
    return text


def pose_table(probed: dict) -> str:
    """R² of every network, feature and pose, with 95 % intervals, in Markdown."""
    lines = []
    for entry in probed["networks"]:
        for feature, r2 in entry["r2"].items():
            cells = [with_interval(r2[pose], ".2f") for pose in POSES]
            lines.append([entry["network"], str(len(entry["seeds"])), feature, *cells])
    return evaluate.markdown_table(["network", "n", "the probe sees", *POSES], lines)


def short_table(probed: dict) -> str:
    """The mean R² of networks that were trained alike, and of the pixels, in Markdown.

    The whole capsule is left out: it says hardly more than its direction.
    """
    lines = []
    for kind, entry in trained_alike(probed).items():
        for feature, r2 in entry["r2"].items():
            if feature == CAPSULE:
                continue
            cells = [f"{r2[pose]['mean']:.2f}" for pose in POSES]
            lines.append([kind, feature, *cells])
    return evaluate.markdown_table(["network", "the probe sees", *POSES], lines)


def difference_table(probed: dict) -> str:
    """The differences in R², with 95 % intervals over seeds, in Markdown."""
    lines = []
    for title, gaps in differences(probed).items():
        cells = [with_interval(gaps[pose], "+.2f") for pose in POSES]
        lines.append([title, *cells])
    return evaluate.markdown_table(["difference in R²", *POSES], lines)


# -- 6. The picture -------------------------------------------------------------------


@torch.inference_mode()
def turn_knobs(model, images: Tensor, digit: int) -> dict:
    """Move the mean capsule of a class in each pose's direction, and redraw it.

    Images uint8 [n, 28, 28], all of class `digit` -> {pose: (values [7], pictures
    [7, 28, 28] in 0..1)}.
    """
    labels = torch.full([len(images)], digit)
    views = make_views(images)
    looks = [look(model, images, labels, view) for view in views]
    features_as_written, used_as_written = looks[0]
    centre = features_as_written[CAPSULE][used_as_written].mean(dim=0)  # the mean capsule: [D]
    drawn = {}
    for view, seen in zip(views, looks, strict=True):
        features, used = seen
        capsules = features[CAPSULE][used]  # [n, D]
        poses = torch.stack(list(view.poses.values()), dim=1)[used].float()  # [n, p]
        # Regression of the capsule on all poses of the view at once: a slope says how
        # the capsule changes with one pose if the view's other pose stays the same.
        x = poses - poses.mean(dim=0)
        y = capsules - capsules.mean(dim=0)
        slopes = torch.linalg.lstsq(x, y).solution  # [p, D]
        for pose, column, slope in zip(view.poses, poses.T, slopes, strict=True):
            values = knob_values(pose, column)
            steps = values - values[STEPS]  # from the middle
            moved = centre + steps.unsqueeze(1) * slope  # [7, D]
            drawn[pose] = (values, redraw(model, moved, digit))
    return drawn


def knob_values(pose: str, measured: Tensor) -> Tensor:
    """Seven evenly spaced values of a pose to draw; the digits' own values are `measured`."""
    steps = torch.arange(-STEPS, STEPS + 1) / STEPS  # -1..1
    if pose in CHOSEN:
        return CHOSEN[pose] * steps
    return measured.mean() + 2 * measured.std() * steps


def redraw(model, capsules: Tensor, digit: int) -> Tensor:
    """What the decoder draws from capsules [n, D] of a class: [n, 28, 28] in 0..1."""
    classes = torch.full([len(capsules)], digit)
    all_capsules = torch.zeros(len(capsules), 10, capsules.shape[1])  # [n, J, D]
    all_capsules[:, digit] = capsules
    return evaluate.decode(model, all_capsules.to(evaluate.device_of(model)), classes)


def draw_knobs(drawn: dict, title: str, file: Path) -> None:
    """Draw a row of pictures for each pose. The mean capsule's picture is framed."""
    figure, axes = plt.subplots(len(POSES), 2 * STEPS + 1, figsize=(14, 12))
    for row, (pose, form) in zip(axes, POSES.items(), strict=True):
        values, pictures = drawn[pose]
        row[0].set_ylabel(pose, fontsize=24)
        for axis, value, picture in zip(row, values, pictures.numpy(), strict=True):
            axis.imshow(picture, cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.set_title(form.format(value), fontsize=20)
        row[STEPS].spines[:].set(color=evaluate.BLUE, linewidth=5)
    evaluate.save(figure, title, file)


# -- 7. Main --------------------------------------------------------------------------


def read_runs(folders: list[Path]) -> list[dict]:
    """The runs, checked before anything is computed. UserError if one cannot be probed."""
    runs = [evaluate.read_run(folder) for folder in folders]
    seen = set()
    for run in runs:
        folder = run["folder"]
        if evaluate.weights_file(run) is None:
            raise UserError(f"{folder} has no weights: give a run with best.pt or weights.pt")
        if run["config"]["dataset"] != "mnist":
            raise UserError(f"{folder} was not trained on MNIST: train with --dataset mnist")
        name = (evaluate.describe(run), run["config"]["seed"])
        if name in seen:
            hint = "leave one out"
            raise UserError(f"{folder} has the settings and seed of another run: {hint}")
        seen.add(name)
    return runs


def main() -> None:
    parser = Parser(__doc__)
    parser.set_defaults(digit=4, data_dir=None, out=Path("runs/pose-probed"))
    flag = parser.add_argument
    flag("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run with weights")
    digit_help = "the digit that knobs.png shows (default: 4)"
    flag("--digit", type=int, choices=range(10), help=digit_help)
    flag("--data-dir", metavar="DIR", help="holds MNIST/raw; default: the one used in training")
    flag("--out", type=Path, metavar="DIR", help="default: runs/pose-probed")
    args = parser.parse_args()
    MODELS.update(plain.NETWORKS)
    runs = read_runs(args.runs)
    data_dir = args.data_dir or runs[0]["config"]["data_dir"]
    images, labels = load("mnist", data_dir, "test")
    for run in runs:
        run["model"] = evaluate.load_network(run, find_device(None))
    args.out.mkdir(parents=True, exist_ok=True)

    nothing = "no network"
    pixels = {"network": nothing, "kind": nothing, "training": UNTRAINED, "seed": None}
    measured = [pixels | measure("the pixels", None, images, labels)]
    for run in runs:
        found = measure(run["folder"], run["model"], images, labels)
        accuracies = [f"{value} % {view}" for view, value in found["accuracy"].items()]
        print(f"{run['folder']}: {', '.join(accuracies)}", flush=True)
        measured.append(identify(run) | found)
    probed = {"networks": pool(measured)}
    write_file(args.out / "pose.json", f"{json.dumps(probed, indent=1)}\n".encode())
    print(f"\n{pose_table(probed)}\n{difference_table(probed)}\n")

    with_decoder = [run for run in runs if run["model"].decoder is not None]
    if with_decoder:
        run = with_decoder[-1]
        drawn = turn_knobs(run["model"], images[labels == args.digit], args.digit)
        title = f"the mean capsule of a {args.digit}, moved along each pose and redrawn"
        title = f"{evaluate.describe(run)}\n{title}"
        draw_knobs(drawn, title, args.out / "knobs.png")
    print(f"written to {args.out}")


if __name__ == "__main__":
    run_main(main)
