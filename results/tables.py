"""Keep runs in results/, and write every table and picture that shows what is kept.

    python -m results.tables                              rewrite everything from results/
    python -m results.tables runs/alexcaps-single ...     keep these runs first
    python -m results.tables runs/ablation/*              (kept in results/ablation/)

Run evaluate.py on a run before you keep it. Runs whose folders differ only in -seedN
share a row. Runs on a GPU have rows of their own, NAME-cuda, because TF32 and float16
are not the CPU's settings. The script writes:

    README.md, results/README.md   tables, from <!-- results: NAME --> to <!-- end -->
    comparison.md, .csv, .png      the student report's four setups, on the CPU
    NAME/*.png                     pictures of each run that has its lengths.npy here
    DECODER/weights.pt             the only weights that are kept, in float16

claims.py says how the report is judged. Read it first, then this file downwards:
    1. how a figure is written
    2. the tables
    3. the two pages
    4. keeping runs, and reading what is kept
    5. pictures, and main
"""

import io
import json
import math
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean, median

import torch
from torch import Tensor, nn

import evaluate
from data import UserError, load
from results import plain, pose
from results.claims import (
    TEST_IMAGES,
    VALIDATION_IMAGES,
    Claim,
    Estimate,
    accuracy_difference,
    efficiency,
    of_mean,
    report_claims,
)
from train_single import MODELS, Parser, run_main, write_file

HERE = Path(__file__).parent
# The student report's own figures, not ours: test accuracy in percent, and epochs
STUDENT_REPORT = {
    "alexcaps-single": (98.06, 10),
    "alexcaps-ddp": (96.28, 20),
    "rescaps-single": (98.70, 20),
    "rescaps-ddp": (97.86, 10),
}
TRAINED_ON = {"single": "one device", "ddp": "several (DDP)"}
DECODER = "alexcaps-ddp-reconstruction"  # the run whose weights are kept
# The accuracies in the ablation's tables, and the number of images behind each
ACCURACIES = {
    "val_accuracy": VALIDATION_IMAGES,
    "accuracy": TEST_IMAGES,
    "turned_15": 1_000,  # the same digits, turned both ways
    "turned_30": 1_000,
    "turned_45": 1_000,
}

# -- 1. How a figure is written ------------------------------------------------------


def format_number(x: float) -> str:
    """Four significant digits, or all before the decimal point: "0.1235", "1,234,568"."""
    if abs(x) >= 1000:
        return f"{x:,.0f}"
    return f"{x:.4g}"


def format_estimate(estimate: Estimate, form: str, unit: str = "") -> str:
    """For example "+0.46 points (+0.11 to +0.80)". An exact figure has no interval."""
    text = f"{estimate.value:{form}}{unit}"
    if estimate.low < estimate.high:
        text += f" ({estimate.low:{form}} to {estimate.high:{form}})"
    return text


def mean_and_deviation(row: dict, name: str) -> str:
    """For example "99.51 ± 0.12", over the row's seeds. One run has no deviation."""
    text = f"{row[name]:.2f}"
    deviation = row[f"{name}_std"]
    if deviation is not None:
        text += f" ± {deviation:.2f}"
    return text


def table(rows: list[dict], *names: str) -> str:
    """Rows {heading: cell} as Markdown: all columns, or only those with these names."""
    if not rows:
        return "not measured\n"
    names = names or tuple(rows[0])
    lines = []
    for row in rows:
        lines.append([format_cell(row[name]) for name in names])
    return evaluate.markdown_table(names, lines)


def format_cell(cell) -> str:
    is_number = isinstance(cell, (int, float)) and not isinstance(cell, bool)
    return format_number(cell) if is_number else str(cell)


# -- 2. The tables -------------------------------------------------------------------

# `kept` is {name of a run without -seedN: row}. evaluate.make_row makes a row. It holds the
# settings, the mean NAME of each metric and its standard deviation NAME_std. "runs" is the
# list of the runs, and "values" is {metric: its values, one for each run}.


def headline(kept: dict[str, dict]) -> str:
    """Four rows: the report's accuracy and ours."""
    rows = []
    for setup, (accuracy, epochs) in STUDENT_REPORT.items():
        network, script = setup.split("-")
        row = {
            "network": MODELS[network].__name__,
            "trained on": TRAINED_ON[script],
            "the report, %": f"{accuracy:.2f}",
            "report's epochs": epochs,
            "**ours, %**": "",
            "our epochs": "",
            "n": 0,
        }
        if setup in kept:
            ours = kept[setup]
            row["**ours, %**"] = mean_and_deviation(ours, "accuracy")
            row["our epochs"] = ours["epochs"]
            row["n"] = ours["n"]
        rows.append(row)
    return table(rows)


def run_table(kept: dict[str, dict]) -> str:
    """What the runs of each name achieve, and what they cost."""
    rows = []
    for name, row in kept.items():
        if row["n"] > 1:
            _, low, high = of_mean(row["values"]["accuracy"])  # over seeds
        else:
            low, high = row["runs"][0]["report"]["interval_95"]  # over images
        batch = row["batch_size"] * row["accumulation_steps"] * row["world_size"]
        cells = {
            "run": name,
            "precision": row["precision"],
            "batch": batch,
            "epochs": row["epochs"],
            "n": row["n"],
            "validation, %": mean_and_deviation(row, "val_accuracy"),
            "**test, %**": mean_and_deviation(row, "accuracy"),
            "95 %": f"{low:.2f} to {high:.2f}",
            "MFLOPs per image": row["flops_per_image"] / 1e6,
            "processes": row["world_size"],
            "hardware": row["hardware"],
            "seconds per epoch": row["seconds"],
            "parameters": f"{row['parameters']:,}",
        }
        rows.append(cells)
    return table(rows)


def claim_figure(claim: Claim, estimate: Estimate) -> str:
    """For example "single: -0.20 points (-0.43 to +0.03)"."""
    return f"{estimate.label}: {format_estimate(estimate, claim.form, claim.unit)}"


def bounds(claim: Claim) -> str:
    """For example "+0.10 to +2.00 points" or "+0.00 points or more"."""
    low = f"{claim.at_least:{claim.form}}"
    if claim.at_most == math.inf:
        return f"{low}{claim.unit} or more"
    return f"{low} to {claim.at_most:{claim.form}}{claim.unit}"


def claim_rows(claims: list[Claim]) -> list[dict]:
    """Each claim with all its figures, and "short", the first figure that decides."""
    rows = []
    for number, claim in enumerate(claims, start=1):
        figures = [claim_figure(claim, estimate) for estimate in claim.estimates]
        short = claim_figure(claim, claim.deciding) if claim.deciding else ""
        counts = [estimate.n for estimate in claim.estimates if estimate.n]
        if len(set(counts)) == 1:
            counts = counts[:1]  # the same for all: given once
        row = {
            "#": number,
            "the report says": claim.report_says,
            "metric": claim.metric,
            "agree if": bounds(claim),
            "measured": "; ".join(figures),
            "n": "; ".join(counts),
            "verdict": claim.verdict,
            "short": short,
        }
        rows.append(row)
    return rows


def claim_table(claims: list[Claim]) -> str:
    """All figures of each claim, for results/README.md."""
    names = ("#", "the report says", "metric", "agree if", "measured", "n", "verdict")
    return table(claim_rows(claims), *names)


def short_claim_table(claims: list[Claim]) -> str:
    """The first figure that decides each claim, for README.md."""
    rows = claim_rows(claims)
    for row in rows:
        row["measured"] = row["short"]
    return table(rows, "#", "the report says", "measured", "verdict")


def changed_flags(row: dict, base: dict) -> str:
    """How a row's settings differ from the base's: "--rotate 0.0"."""
    flags = []
    for name in ("model", *evaluate.USUAL, "epochs", "precision"):
        if row[name] != base[name]:
            flags.append(f"--{name.replace('_', '-')} {row[name]}")
    return " ".join(flags)


def natural_order(name: str) -> list:
    """A key for sort that puts batch-64 before batch-256: it compares numbers as numbers."""
    pieces = re.split(r"(\d+)", name)  # text, digits, text, digits, ..., text
    return [int(piece) if piece.isdigit() else piece for piece in pieces]


def baseline_first(kept: dict[str, dict]) -> list[dict]:
    """The rows in the order of the ablation's tables; [] if there is no baseline."""
    if "baseline" not in kept:
        return []
    others = [name for name in kept if name != "baseline"]
    others.sort(key=natural_order)
    return [kept[name] for name in ("baseline", *others)]


def ablation_table(kept: dict[str, dict]) -> str:
    """One change at a time: the accuracies."""
    rows = []
    for row in baseline_first(kept):
        flags = changed_flags(row, kept["baseline"])
        cells = {"changed": flags or "nothing", "n": row["n"]}
        for name in ACCURACIES:
            cells[name] = mean_and_deviation(row, name)
        rows.append(cells)
    return table(rows)


def difference_table(kept: dict[str, dict]) -> str:
    """One change at a time: the accuracies minus the baseline's, in points."""
    rows = []
    for row in baseline_first(kept):
        base = kept["baseline"]
        flags = changed_flags(row, base)
        if not flags:
            continue  # the baseline itself
        cells = {"changed": flags, "n": row["n"]}
        for name, images in ACCURACIES.items():
            first = row["values"][name]
            second = base["values"][name]
            gap = accuracy_difference(name, first, second, images)
            cells[name] = format_estimate(gap, "+.2f")
        rows.append(cells)
    return table(rows)


def full_length_tables(kept: dict[str, dict]) -> str:
    """For each setup of the report, a table of how its variants differ from it.

    The variants of alexcaps-ddp are plain-alexcaps-ddp, alexcaps-ddp-shift, ...
    """
    tables = []
    for setup in STUDENT_REPORT:
        if setup not in kept:
            continue
        rows = {"baseline": kept[setup]}  # difference_table compares with this name
        for name, row in kept.items():
            is_plain = name == f"plain-{setup}"
            is_changed = name.startswith(f"{setup}-") and "-cuda" not in name
            if is_plain or is_changed:
                rows[name] = row
        if len(rows) > 1:
            tables.append(difference_table(rows))
    return "\n".join(tables)


def scaling_cells(row: dict) -> dict:
    """A row of scaling: medians of images/s over the rounds, and efficiencies."""
    cells = {"network": row["network"], "precision": row["precision"]}
    for contestant in ("one", "apart", "ddp"):
        cells[f"{contestant}, images/s"] = median(row[contestant])
    for contestant in ("apart", "ddp"):
        estimate = efficiency(row, contestant)
        cells[f"{contestant} / (2 x one)"] = format_estimate(estimate, ".2f")
    return cells


def speed_text(speed: dict) -> str:
    """The content of one speed-*.json: a table for each part, below its hardware."""
    text = ""
    for part, measured in speed.items():
        rows = measured["rows"]
        if part == "scaling":
            rows = [scaling_cells(row) for row in rows]
        text += f"*{part}*: {measured['hardware']}, PyTorch {measured['torch']}\n\n"
        text += f"{table(rows)}\n"
    return text


def first_epoch_with(accuracy: float, run: dict) -> int | None:
    """The first epoch that reaches this validation accuracy, in percent. None: no epoch."""
    for row in run["history"]:
        if row["val_accuracy"] >= accuracy:
            return row["epoch"]
    return None


def sooner_table(report_code: dict, kept: dict[str, dict]) -> str:
    """How long the report's code and ours take to reach an accuracy."""
    milliseconds = {}  # {part of the table: milliseconds per step of our code in float32}
    for row in report_code["rows"]:
        if row["code"] == "ours" and row["setting"] == "fp32":
            milliseconds[row["part"]] = row["ms"]
    rows = []
    for row in report_code["to an accuracy"]:
        if row["ours"] not in kept:
            continue
        runs = kept[row["ours"]]["runs"]
        epochs = [first_epoch_with(row["accuracy, %"], run) for run in runs]
        if None in epochs:
            continue
        seconds_a_step = milliseconds[f"{row['network']}, step with its data"] / 1000
        seconds_an_epoch = seconds_a_step * 55_000 / 32  # images / batch = steps
        seconds = mean(epochs) * seconds_an_epoch
        cells = {
            "our epochs": ", ".join(map(str, epochs)),
            "our seconds": seconds,
            "speed-up": row["report's seconds"] / seconds,
        }
        rows.append(row | cells)
    return table(rows)


# -- 3. The two pages ----------------------------------------------------------------


def pages(kept: dict[str, dict]) -> dict[Path, str]:
    """{page: its text}: both pages, with tables made from what is in this folder."""
    ablation = rows_by_name(read_kept(HERE / "ablation"))
    report_code = json.loads((HERE / "report-code-cpu.json").read_text())
    speeds = []
    scaling = []
    for path in sorted(HERE.glob("speed-*.json")):
        speed = json.loads(path.read_text())
        speeds.append(speed)
        if "scaling" in speed:
            scaling += speed["scaling"]["rows"]
    claims = report_claims(kept, scaling)
    probed = json.loads((HERE / "pose.json").read_text())
    short = {
        "headline": headline(kept),
        "claims": short_claim_table(claims),
        "pose": pose.short_table(probed),
    }
    full = {
        "runs": run_table(kept),
        "claims": claim_table(claims),
        "ablation": ablation_table(ablation),
        "differences": difference_table(ablation),
        "full-length": full_length_tables(kept),
        "pose": f"{pose.pose_table(probed)}\n{pose.difference_table(probed)}",
        "speed": "".join(speed_text(speed) for speed in speeds),
        "sooner": sooner_table(report_code, kept),
        "report-code": table(report_code["rows"], *report_code["columns"]),
    }
    readme = HERE.parent / "README.md"
    results = HERE / "README.md"
    return {readme: fill(readme, short), results: fill(results, full)}


def fill(page: Path, tables: dict[str, str]) -> str:
    """The text of a page with each table between its markers."""
    text = page.read_text()
    for name, lines in tables.items():
        start = f"<!-- results: {name} -->"
        end = "<!-- end -->"
        before, rest = text.split(start)  # each table has exactly one place
        _, after = rest.split(end, 1)
        text = f"{before}{start}\n\n{lines.strip()}\n\n{end}{after}"
    return text


# -- 4. Keeping runs, and reading what is kept ---------------------------------------


def read_kept(folder: Path) -> dict[Path, dict]:
    """{folder of a run: the run} for all runs kept in `folder`."""
    files = folder.glob("*/config.json")
    return {file.parent: evaluate.read_run(file.parent) for file in files}


def rows_by_name(runs: dict[Path, dict]) -> dict[str, dict]:
    """{folder: run} -> {name without -seedN: row of evaluate.make_rows}.

    UserError if runs of one name differ in a setting other than the seed.
    """
    groups = defaultdict(list)
    for target in sorted(runs):
        name = re.sub(r"-seed\d+$", "", target.name)
        groups[target.parent / name].append(runs[target])
    kept = {}
    for path, group in groups.items():
        rows = evaluate.make_rows(group)
        if len(rows) > 1:
            hint = "rename the run that should not be among them"
            names = " / ".join(row["name"] for row in rows)
            raise UserError(f"the runs of {path} differ ({names}): {hint}")
        kept[path.name] = rows[0]
    return kept


def place(run: dict, overwrite: bool) -> Path:
    """The folder in which a run will be kept. UserError if it may not be kept."""
    folder = run["folder"].absolute()
    if not re.fullmatch(r"\w[\w.-]*", folder.name) or folder.name == "ablation":
        hint = "use letters, digits, dots and hyphens, but not 'ablation'"
        raise UserError(f"{str(folder)!r} cannot be kept under its name: {hint}")
    config = run["config"]
    if config["dataset"] != "mnist":
        raise UserError(f"{folder} was not trained on MNIST: train with --dataset mnist")
    if len(run["history"]) < config["epochs"]:
        raise UserError(f"{folder} is not finished: resume it")
    if not run["report"]:
        raise UserError(f"{folder} has no report: run evaluate.py on it")
    target = target_folder(folder, config["device"])
    if (target / "config.json").exists() and not overwrite:
        before = evaluate.read_run(target)["config"]
        for size in ("epochs", "train_images"):
            if config[size] < before[size]:
                hint = "--overwrite replaces it"
                raise UserError(f"{target} has more epochs or images than {folder}: {hint}")
    return target


def target_folder(folder: Path, device: str) -> Path:
    """runs/NAME -> results/NAME; runs/ablation/NAME -> results/ablation/NAME.

    If it was trained on a GPU, NAME becomes NAME-cuda, and NAME-seed1 becomes
    NAME-cuda-seed1, except in ablation/.
    """
    if folder.parent.name == "ablation":
        return HERE / "ablation" / folder.name
    name = folder.name
    if device != "cpu" and "-cuda" not in name:
        # It goes before the seed, if there is one. (Without count=1, the empty string at
        # the end would be replaced, too: NAME-cuda-seed1-cuda.)
        name = re.sub(r"(-seed\d+)?$", r"-cuda\1", name, count=1)
    return HERE / name


def half_weights(model: nn.Module) -> bytes:
    """The content of weights.pt: float16, which takes half the bytes of float32."""
    weights = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():  # BatchNorm's count of batches is an integer
            tensor = tensor.half()
        weights[name] = tensor
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()


def keep(run: dict, target: Path) -> None:
    """Copy to `target` the files of a run that results/ keeps.

    config.json then says "data" for data_dir, so that it names no path of this machine.
    UserError, before anything is written, if the run is DECODER and has no weights.
    """
    weights = None
    if target == HERE / DECODER:
        model = evaluate.load_network(run, torch.device("cpu"))
        weights = half_weights(model)
    target.mkdir(exist_ok=True, parents=True)
    if weights is not None:
        write_file(target / "weights.pt", weights)
    config = run["config"] | {"data_dir": "data"}
    text = json.dumps(config, indent=2) + "\n"
    write_file(target / "config.json", text.encode())
    names = ["metrics.csv", "report.json"]
    is_drawn = config["seed"] == 0 and target.parent == HERE
    if is_drawn and (run["folder"] / "lengths.npy").exists():
        names.append("lengths.npy")  # 400 kB
    else:  # a run that was here before may have left these
        for file in (target / "lengths.npy", *target.glob("*.png")):
            file.unlink(missing_ok=True)
    for name in names:
        write_file(target / name, (run["folder"] / name).read_bytes())


# -- 5. Pictures, and main -----------------------------------------------------------


def draw(kept: dict[str, dict], images: Tensor, labels: Tensor) -> None:
    """Draw each run that has its lengths.npy, beside its plain CNN if that is kept."""
    for name, row in kept.items():
        run = row["runs"][0]
        if not (run["folder"] / "lengths.npy").exists():
            continue
        lengths = evaluate.read_lengths(run, labels.numpy())
        plain_accuracies = None
        if f"plain-{name}" in kept:
            plain_run = kept[f"plain-{name}"]["runs"][0]
            plain_accuracies = evaluate.at_angles(plain_run["report"])
        evaluate.save_pictures(run, lengths, images, labels, run["folder"], plain_accuracies)
        if name == DECODER:
            model = evaluate.load_network(run, torch.device("cpu"))
            evaluate.save_decoder_pictures(run, model, lengths, images, labels, run["folder"])


def main() -> None:
    parser = Parser(__doc__)
    parser.set_defaults(runs=[], overwrite=False, data_dir="data")
    flag = parser.add_argument
    flag("runs", nargs="*", type=Path, metavar="RUN", help="a run to add to results/ first")
    flag("--overwrite", action="store_true", help="replace kept runs even if they are longer")
    flag("--data-dir", help="holds MNIST/raw, for the pictures (default: data)")
    args = parser.parse_args()
    MODELS.update(plain.NETWORKS)  # their runs are kept, too
    images, labels = load("mnist", args.data_dir, "test")
    new = {}  # {target: run}. They are checked, together, before anything is written.
    for folder in args.runs:
        run = evaluate.read_run(folder)
        target = place(run, args.overwrite)
        if target in new:
            raise UserError("two of these runs have the same name: keep one of them")
        new[target] = run
    # This is only a check: UserError if runs of one name differ.
    rows_by_name(read_kept(HERE) | read_kept(HERE / "ablation") | new)
    for target, run in new.items():
        keep(run, target)
    kept = rows_by_name(read_kept(HERE))
    for page, text in pages(kept).items():
        write_file(page, text.encode())
    compared = []
    for setup in STUDENT_REPORT:
        if setup in kept:
            compared += kept[setup]["runs"]
    evaluate.compare(compared, HERE)
    draw(kept, images, labels)


if __name__ == "__main__":
    run_main(main)
