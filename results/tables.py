"""Keep runs in results/, and write every table and picture that shows what is kept.

    python -m results.tables                              all anew, from results/
    python -m results.tables runs/alexcaps-single ...     keep these runs first
    python -m results.tables runs/ablation/*              (they go into results/ablation/)

Run evaluate.py on a run before it is kept. Runs whose folders differ only in -seedN are one row,
and a GPU's are rows of their own, NAME-cuda: TF32 and float16 are other settings than the CPU's.
Written are the tables in README.md and results/README.md, each between <!-- results: NAME --> and
<!-- end -->; comparison.md, .csv and .png of the report's four setups on the CPU; and the pictures of
each run that has its lengths.npy here.

Every difference comes with its 95 % interval, and a claim of the report is undecided where one
contains a bound of "agree if" and no other figure lies outside.
"""

import argparse
import csv
import json
import math
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

import numpy as np
from scipy import stats

import evaluate
from data import UserError, load
from results import plain
from train_single import MODELS, run_main, write_file

HERE = Path(__file__).parent
SETUPS = ("single", "ddp")  # trained by which script
DEVICES = ("", "-cuda")  # how names of runs end, but for the seed: on the CPU, and on a GPU
# THE REPORT'S figures, not ours: test accuracy in percent and epochs; parameters of its own code
REPORT = {
    "alexcaps-single": (98.06, 10),
    "alexcaps-ddp": (96.28, 20),
    "rescaps-single": (98.70, 20),
    "rescaps-ddp": (97.86, 10),
}
REPORT_PARAMETERS = {"alexcaps": 2_683_840, "rescaps": 2_022_272}

# -- Differences and their intervals ---------------------------------------------------------------


class Estimate(NamedTuple):
    """A figure with its 95 % interval, and what it rests on: seeds, rounds, images."""

    label: str
    value: float
    low: float
    high: float
    n: str


def of_mean(values: list[float]) -> tuple[float, float, float]:
    """A mean and its 95 % interval by Student's t distribution; two values at least."""
    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return mean(values), mean(values) - half, mean(values) + half


def over_seeds(first: list[float], second: list[float]) -> tuple[float, float, float]:
    """Mean of `first` minus mean of `second`, and its 95 % interval by Student's t distribution.

    One variance for both, from all deviations together: three seeds each are too few for two. It
    asks how another choice of seeds would move the difference.
    """
    difference, freedom = mean(first) - mean(second), len(first) + len(second) - 2
    squares = sum((x - mean(group)) ** 2 for group in (first, second) for x in group)
    error = math.sqrt(squares / freedom * (1 / len(first) + 1 / len(second)))
    half = float(stats.t.ppf(0.975, freedom)) * error
    return difference, difference - half, difference + half


def over_images(first: float, second: float, n: int) -> tuple[float, float, float]:
    """The same for one run each: two accuracies, in percent, on n images (R. Newcombe 1998).

    It asks how other images would move the difference, and knows nothing of other seeds.
    """
    low_1, high_1 = evaluate.wilson(first * n / 100, n)
    low_2, high_2 = evaluate.wilson(second * n / 100, n)
    difference = first - second
    low = difference - math.hypot(first - low_1, high_2 - second)
    return difference, low, difference + math.hypot(high_1 - first, second - low_2)


def points(label: str, first: list[float], second: list[float], images: int) -> Estimate:
    """A difference of accuracies, over seeds where there are more than two runs."""
    if len(first) + len(second) > 2:
        return Estimate(label, *over_seeds(first, second), f"{len(first)} + {len(second)}")
    return Estimate(label, *over_images(first[0], second[0], images), f"1 + 1, {images:,} images")


def ratio(label: str, first: list[float], second: list[float]) -> Estimate:
    """Ratios of what was measured in turns, round by round; the interval is over rounds."""
    ratios = [x / y for x, y in zip(first, second, strict=True)]
    return Estimate(label, *of_mean(ratios), f"{len(ratios)} rounds")


def efficiency(row: dict, contestant: str) -> Estimate:
    """Speed of two processes on two devices over twice that of one."""
    return ratio(row["precision"], row[contestant], [2 * one for one in row["one"]])


def written(estimate: Estimate, form: str, unit: str = "") -> str:
    """+0.46 points (+0.11 to +0.80)"""
    text = f"{estimate.value:{form}}{unit}"
    if estimate.low < estimate.high:
        text += f" ({estimate.low:{form}} to {estimate.high:{form}})"
    return text


def verdict(estimates: list[Estimate], least: float, most: float) -> str:
    """A claim holds where each estimate lies within least..most, and fails where one lies outside.

    An estimate whose interval contains a bound lies neither within nor outside.
    """
    said = set()
    for _, value, low, high, _ in estimates:
        if low <= least <= high or low <= most <= high:
            said.add("undecided")
        else:
            said.add("agree" if least < value < most else "disagree")
    order = ("disagree", "undecided", "agree")  # one "disagree" is enough
    return next((word for word in order if word in said), "not measured")


# -- The report's claims ---------------------------------------------------------------------------


def judge(claim: dict, estimates: list[Estimate]) -> dict:
    """A row of claims.csv with its verdict, its figures, and those of the estimate that decides."""
    form, unit, least, most = (claim[name] for name in ("form", "unit", "least", "most"))
    least, most = float(least), float(most)
    answer = verdict(estimates, least, most)
    counts = [e.n for e in estimates if e.n]
    texts = {f"{e.label}: {written(e, form, unit)}": e for e in estimates}
    deciding = [text for text, e in texts.items() if verdict([e], least, most) == answer]
    upper = "" if most == math.inf else f" to {most:{form}}"
    return claim | {
        "agree if": f"from {least:{form}}{upper}{unit}",
        "measured": "; ".join(texts),
        "n": "; ".join(counts if len({*counts}) > 1 else counts[:1]),
        "short": deciding[0] if deciding else "",
        "verdict": answer,
    }


def alike(names: tuple[str, ...], a: dict | None, b: dict | None) -> bool:
    """Whether both rows are there and have the same settings of these names."""
    return bool(a and b) and all(a[name] == b[name] for name in names)


def judged_claims(kept: dict[str, dict], scaling: list[dict]) -> list[dict]:
    """The report's claims, judged by the setups' rows of each device and by benchmark.py's scaling."""
    found, recipe = defaultdict(list), ("train_images", "world_size", "batch_size", "precision")
    both = set()
    for script in [script + device for script in SETUPS for device in DEVICES]:
        alex, res = (kept.get(f"{network}-{script}") for network in REPORT_PARAMETERS)
        if alike(recipe, alex, res):
            one = [[r["history"][0]["val_accuracy"] for r in row["runs"]] for row in (alex, res)]
            found["fast"].append(points(script, *one, images=5_000))
        if alike((*recipe, "epochs"), alex, res):
            tests = res["values"]["accuracy"], alex["values"]["accuracy"]
            found["end"].append(points(script, *tests, images=10_000))
        if alex and res:  # both scripts train the same networks: one estimate
            flops = res["flops_per_image"] / alex["flops_per_image"]
            found["scarce"] = [Estimate("FLOPs", flops, flops, flops, "")]
    speeds = {(row["network"], row["precision"]): row for row in scaling}
    for label, precision, contestant in (("fp32", "fp32", "one"), ("bf16, DDP", "bf16", "ddp")):
        alex, res = (speeds.get((network, precision)) for network in REPORT_PARAMETERS)
        if alex and res:  # images/s: the slower network takes the longer time
            found["time"].append(ratio(label, res[contestant], alex[contestant]))
            found["scarce"].append(ratio(f"{label}, time", alex[contestant], res[contestant]))
    for network, size in REPORT_PARAMETERS.items():
        for device in DEVICES:
            one, many = (kept.get(f"{network}-{script}{device}") for script in SETUPS)
            if alike(("train_images", "epochs"), one, many):
                tests = many["values"]["accuracy"], one["values"]["accuracy"]
                label = network.removesuffix("caps") + device
                found["ddp"].append(points(label, *tests, images=10_000))
                both.add(network)
        found[network].append(Estimate("its code", size, size, size, ""))
        if (network, "bf16") in speeds:  # the report's DDP runs are in half precision, too
            found[f"{network} ddp"].append(efficiency(speeds[network, "bf16"], "ddp"))
    if len(both) < 2:  # the claim is about both networks
        found["ddp"] = []
    claims = csv.DictReader((HERE / "claims.csv").read_text().splitlines())
    return [judge(claim, found[claim["key"]]) for claim in claims]


# -- Tables ----------------------------------------------------------------------------------------


def kept_rows(folder: Path) -> dict[str, dict]:
    """Runs kept in a folder as rows (evaluate.make_rows), by name without -seedN."""
    found, rows = defaultdict(list), {}
    for path in sorted(folder.glob("*/config.json")):
        name = re.sub(r"-seed\d+$", "", path.parent.name)
        found[name].append(evaluate.read_run(path.parent))
    for name, runs in found.items():
        rows[name], *others = evaluate.make_rows(runs)
        if others:
            raise UserError(f"{folder / name}: its seeds differ in settings; delete the wrong ones")
    return rows


def number(x: float) -> str:
    """Four digits, or all before the point."""
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"


def table(rows: list[dict], *names: str) -> str:
    """Rows {heading: cell} as Markdown, or these columns of them; see number."""
    if not rows:
        return "not measured\n"
    names = names or tuple(rows[0])
    cells = [[row[name] for name in names] for row in rows]
    texts = [[number(x) if isinstance(x, float) else str(x) for x in line] for line in cells]
    return evaluate.markdown_table(names, texts)


def spread(row: dict, name: str) -> str:
    """A row's mean ± standard deviation over seeds."""
    deviation = row[f"{name}_std"]
    return f"{row[name]:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def headline(kept: dict[str, dict]) -> str:
    """Four rows: the report's figure and ours."""
    rows = []
    for setup, (stated, epochs) in REPORT.items():
        network, script = setup.split("-")
        row = {"network": MODELS[network].__name__, "trained by": f"train_{script}.py"}
        row |= {"the report, %": f"{stated:.2f}", "its epochs": epochs}
        ours = kept.get(setup, {"epochs": "", "n": 0})
        row["**ours, %**"] = spread(ours, "accuracy") if ours["n"] else ""
        rows.append(row | {"epochs": ours["epochs"], "n": ours["n"]})
    return table(rows)


def run_table(kept: dict[str, dict]) -> str:
    """What the runs of each name achieve, and what they cost.

    The interval is over seeds, or, of a single run, over images (Wilson).
    """
    rows = []
    for name, row in kept.items():
        low, high = row["runs"][0]["report"]["interval_95"]
        if row["n"] > 1:
            _, low, high = of_mean(row["values"]["accuracy"])
        batch = row["batch_size"] * row["accumulation_steps"] * row["world_size"]
        cells = {"run": name, "precision": row["precision"], "batch": batch}
        cells |= {
            "epochs": row["epochs"],
            "n": row["n"],
            "validation, %": spread(row, "val_accuracy"),
        }
        cells |= {"**test, %**": spread(row, "accuracy"), "95 %": f"{low:.2f} to {high:.2f}"}
        cells |= {"MFLOPs an image": row["flops_per_image"] / 1e6, "processes": row["world_size"]}
        cells |= {"hardware": row["hardware"]}
        cells |= {"seconds an epoch": row["seconds"], "parameters": f"{row['parameters']:,}"}
        rows.append(cells)
    return table(rows)


def ablation_tables(kept: dict[str, dict]) -> dict[str, str]:
    """One change at a time: accuracies, and how they differ from the first row's, "baseline"."""
    images = {"val_accuracy": 5_000, "accuracy": 10_000}
    images |= {"turned_15": 2_000, "turned_30": 2_000, "turned_45": 2_000}  # 1,000 to either side
    base, values, gaps = kept.get("baseline"), [], []
    for name in sorted(kept, key=lambda name: (name != "baseline", len(name), name)):
        row = kept[name]
        varied = [k for k in ("model", *evaluate.USUAL) if row[k] != base[k]]
        flags = [f"--{k.replace('_', '-')} {row[k]}" for k in varied]
        start = {"changed": " ".join(flags) or "nothing", "n": row["n"]}
        values.append(start | {figure: spread(row, figure) for figure in images})
        if flags:
            pairs = {k: (row["values"][k], base["values"][k], n) for k, n in images.items()}
            found = {k: points(k, *pair) for k, pair in pairs.items()}
            gaps.append(start | {k: written(gap, "+.2f") for k, gap in found.items()})
    return {"ablation": table(values), "differences": table(gaps)}


def scaling_row(row: dict) -> dict:
    """Medians of images/s over the rounds, and both efficiencies with their intervals."""
    speeds = {f"{name}, images/s": median(row[name]) for name in ("one", "apart", "ddp")}
    shares = {f"{k} / (2 x one)": written(efficiency(row, k), ".2f") for k in ("apart", "ddp")}
    return {"network": row["network"], "precision": row["precision"]} | speeds | shares


def speed_text(speed: dict) -> str:
    """What benchmark.py measured, part by part."""
    text = ""
    for part, found in speed.items():
        rows = [scaling_row(row) if part == "scaling" else row for row in found["rows"]]
        text += f"*{part}*: {found['hardware']}, PyTorch {found['torch']}\n\n{table(rows)}\n"
    return text


def sooner_rows(theirs: dict, kept: dict[str, dict]) -> list[dict]:
    """The report's code and ours to an accuracy; steps were measured in turns."""
    steps = {row["part"]: row["ms"] for row in theirs["rows"] if row["setting"] == "fp32"}
    rows = []
    for row in theirs["to an accuracy"]:
        runs, least = kept[row["ours"]]["runs"], row["accuracy, %"]
        epochs = [min(e["epoch"] for e in r["history"] if e["val_accuracy"] >= least) for r in runs]
        epoch = steps[f"{row['network']}, step with its data"] / 1000 * 55_000 / 32
        row |= {"our epochs": ", ".join(map(str, epochs)), "our seconds": mean(epochs) * epoch}
        rows.append(row | {"times sooner": row["its seconds"] / row["our seconds"]})
    return rows


def pages(kept: dict[str, dict]) -> dict[Path, str]:
    """Both pages as they must be: their text, and between the markers what is kept here."""
    speeds = [json.loads(path.read_text()) for path in sorted(HERE.glob("speed-*.json"))]
    scaling = [row for speed in speeds for row in speed.get("scaling", {"rows": []})["rows"]]
    claims = judged_claims(kept, scaling)
    theirs = json.loads((HERE / "report-code-cpu.json").read_text())
    wide = ("the report says", "metric", "agree if", "measured", "n", "verdict")
    short = [row | {"measured": row["short"]} for row in claims]
    short = table(short, "the report says", "measured", "verdict")
    tables = {"runs": run_table(kept), "claims": table(claims, *wide)}
    tables |= ablation_tables(kept_rows(HERE / "ablation"))
    plains = [(row, kept.get(f"plain-{name}")) for name, row in kept.items()]
    pairs = [ablation_tables({"baseline": base, "plain": row}) for base, row in plains if row]
    tables["plain"] = "\n".join(pair["differences"] for pair in pairs)
    tables["speed"] = "".join(speed_text(speed) for speed in speeds)
    tables["sooner"] = table(sooner_rows(theirs, kept))
    tables["report-code"] = table(theirs["rows"], *theirs["columns"])
    front, here = HERE.parent / "README.md", HERE / "README.md"
    own = {"headline": headline(kept), "claims": short}
    return {front: fill(front, own), here: fill(here, tables)}


def fill(page: Path, tables: dict[str, str]) -> str:
    """The text of a page with each table between its markers."""
    text = page.read_text()
    for name, lines in tables.items():
        start, end = f"<!-- results: {name} -->", "<!-- end -->"
        before, rest = text.split(start)  # there is one place for each
        text = f"{before}{start}\n\n{lines.strip()}\n\n{end}{rest.split(end, 1)[1]}"
    return text


# -- Keeping runs ----------------------------------------------------------------------------------


def place(run: dict, overwrite: bool) -> Path:
    """Where a run will be kept; UserError if it may not be."""
    folder, config = run["folder"].absolute(), run["config"]
    target = HERE / ("ablation" if folder.parent.name == "ablation" else "") / folder.name
    if target.parent == HERE and config["device"] != "cpu" and "-cuda" not in target.name:
        target = HERE / re.sub(r"(-seed\d+)?$", r"-cuda\1", target.name, count=1)
    whole = run["report"] and len(run["history"]) == config["epochs"]
    if config["dataset"] != "mnist" or not whole:
        raise UserError(f"{folder} is not of MNIST, not finished, or not evaluated: not kept")
    if (target / "config.json").exists() and not overwrite:
        before = evaluate.read_run(target)["config"]
        if any(config[size] < before[size] for size in ("epochs", "train_images")):
            raise UserError(f"{target} is longer or larger than {folder}: --overwrite replaces it")
    return target


def keep(run: dict, target: Path) -> None:
    """Copy what stays of a run, without the path where its data lay."""
    target.mkdir(exist_ok=True, parents=True)
    config = json.dumps(run["config"] | {"data_dir": "data"}, indent=2)
    write_file(target / "config.json", f"{config}\n".encode())
    for name in ("metrics.csv", "report.json"):
        write_file(target / name, (run["folder"] / name).read_bytes())
    lengths = run["folder"] / "lengths.npy"  # 200 kB, for the pictures
    if lengths.exists() and run["config"]["seed"] == 0 and target.parent == HERE:
        write_file(target / lengths.name, lengths.read_bytes())


def draw(kept: dict[str, dict], images, labels) -> None:
    """The pictures of all runs with lengths.npy here, with a plain CNN's line where it is kept."""
    for name, row in kept.items():
        run, other = row["runs"][0], kept.get(f"plain-{name}")
        angles = evaluate.at_angles(other["runs"][0]["report"]) if other else None
        if (run["folder"] / "lengths.npy").exists():
            lengths = np.load(run["folder"] / "lengths.npy")
            evaluate.draw_all(run, lengths, images, labels, run["folder"], angles)


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(  # without usage, a mistake is answered by one line
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=style
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="keep this run first")
    parser.add_argument("--overwrite", action="store_true", help="replace longer kept runs, too")
    parser.add_argument("--data-dir", default="data", help="holds MNIST/raw, for the pictures")
    flags = parser.parse_args()
    MODELS.update(plain.NETWORKS)
    images, labels = load("mnist", flags.data_dir, "test")  # or nothing is written
    runs = [evaluate.read_run(folder) for folder in flags.runs]
    places = [place(run, flags.overwrite) for run in runs]  # before one is copied
    for run, target in zip(runs, places, strict=True):
        keep(run, target)
    kept = kept_rows(HERE)
    for page, text in pages(kept).items():
        write_file(page, text.encode())
    named = [run for setup in REPORT if setup in kept for run in kept[setup]["runs"]]
    evaluate.compare(named, HERE)
    draw(kept, images, labels)


if __name__ == "__main__":
    run_main(main)
