"""Keep runs in results/, and write every table and picture that shows what is kept.

    python -m results.tables                              all anew, from results/
    python -m results.tables runs/alexcaps-single ...     keep these runs first
    python -m results.tables runs/ablation/*              (they go into results/ablation/)

Run evaluate.py on a run before it is kept. Runs whose folders differ only in -seedN are one row.
Written are results/README.md with the wide tables; two short ones in README.md, each between
<!-- results: NAME --> and <!-- end -->; comparison.md, .csv and .png; the pictures of each run kept
for seed 0. Nothing of all this is written by hand.

Every difference comes with its 95 % interval, and a claim of the report is undecided where that
interval contains a bound of "agree if".
"""

import csv
import io
import json
import math
import re
import shutil
from collections import defaultdict
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

from scipy import stats

import evaluate
from data import UserError
from train_single import write_file

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
NETWORKS = {"alexcaps": "AlexCapsNet", "rescaps": "ResCapsNet"}
SETUPS = ("single", "ddp")  # trained by which script
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
    """A figure with its 95 % interval, and how many runs it rests on."""

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
    """A ratio of times: the difference of their logarithms. One run each has no interval."""
    n = f"{len(first)} + {len(second)}"
    if len(first) + len(second) > 2:
        logs = over_seeds([math.log(x) for x in first], [math.log(x) for x in second])
        return Estimate(label, *(math.exp(x) for x in logs), n)
    value = first[0] / second[0]
    return Estimate(label, value, value, value, f"{n}, no interval")


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
    for word in ("disagree", "undecided", "agree"):  # one "disagree" is enough
        if word in said:
            return word
    return "not measured"


# -- The report's claims ---------------------------------------------------------------------------

# A claim holds where its metric lies within least..most.
CLAIMS = """
key;claim;metric;least;most;form;unit
fast;AlexCapsNet converges faster;validation after epoch 1, AlexCapsNet's - ResCapsNet's;0;inf;+.2f; points
end;ResCapsNet ends slightly more accurate;test, ResCapsNet's - AlexCapsNet's;0.1;2;+.2f; points
alexcaps;AlexCapsNet: tens of millions of weights;parameters in the report's code;1e7;1e8;,.0f;
rescaps;ResCapsNet: a few million weights;parameters in the report's code;1e6;1e7;,.0f;
time;AlexCapsNet is about 2x slower per epoch;fastest epoch, AlexCapsNet's / ResCapsNet's;1.5;2.5;.2f;x
alexcaps ddp;DDP helps AlexCapsNet significantly;speed-up / processes, a CPU core each;0.75;inf;.2f;
rescaps ddp;DDP helps ResCapsNet moderately;speed-up / processes, a CPU core each;0.55;0.75;.2f;
ddp;both do well under DDP;test, DDP's - one device's;-0.3;inf;+.2f; points
scarce;ResCapsNet suits scarce resources;its FLOPs and seconds / AlexCapsNet's;0;1;.2f;x
"""


def judge(claim: dict, estimates: list[Estimate]) -> dict:
    """A row of CLAIMS with its verdict, its figures, and those of the estimate that decides."""
    form, unit, least, most = claim["form"], claim["unit"], claim["least"], claim["most"]
    bounds = float(least), float(most)
    answer = verdict(estimates, *bounds)
    texts = [f"{e.label}: {written(e, form, unit)}" for e in estimates]
    deciding = [verdict([e], *bounds) for e in estimates].index(answer) if estimates else 0
    figures = {
        "agree if": f"above {least}{unit}" if most == "inf" else f"{least} to {most}{unit}",
        "measured": "; ".join(texts),
        "n": "; ".join(dict.fromkeys(e.n for e in estimates if e.n)),
        "short": texts[deciding] if estimates else "",
    }
    return claim | figures | {"verdict": answer}


def alike(names: tuple[str, ...], *groups: list[dict]) -> bool:
    """Whether each group has runs, and all runs have the same settings of these names."""
    settings = {tuple(run["config"][k] for k in names) for group in groups for run in group}
    return all(groups) and len(settings) == 1


def tested(runs: list[dict]) -> list[float]:
    """Test accuracies in percent."""
    return [run["report"]["accuracy"] for run in runs]


def validated(runs: list[dict]) -> list[float]:
    """Validation accuracies in percent, of the epoch that is kept."""
    return [max(row["val_accuracy"] for row in run["history"]) for run in runs]


def turned(runs: list[dict], angle: int) -> list[float]:
    """Accuracies on 1,000 test digits, turned by this angle to the one side and to the other."""
    found = [run["report"]["rotation"]["accuracy"] for run in runs]
    return [(at[str(angle)] + at[str(-angle)]) / 2 for at in found]


def fastest(runs: list[dict]) -> list[float]:
    """Seconds of each run's fastest epoch: other work on the machine disturbed it least."""
    return [min(row["seconds"] for row in run["history"]) for run in runs]


def efficiency(row: dict, contestant: str) -> Estimate:
    """Speed of two processes on two devices over twice that of one; the interval is over rounds."""
    shares = [two / (2 * one) for one, two in zip(row["one"], row[contestant], strict=True)]
    return Estimate(row["precision"], *of_mean(shares), f"{len(shares)} rounds")


def judged_claims(kept: dict[str, list[dict]], scaling: list[dict]) -> list[dict]:
    """The report's claims, judged by the four setups that are kept, and by benchmark.py's rows."""
    found, recipe = defaultdict(list), ("train_images", "effective_batch", "precision")
    for script in SETUPS:
        alex, res = (kept.get(f"{network}-{script}", []) for network in NETWORKS)
        if alike(recipe, alex, res):
            first = ([r["history"][0]["val_accuracy"] for r in runs] for runs in (alex, res))
            found["fast"].append(points(script, *first, images=5_000))
        if alike((*recipe, "epochs"), alex, res):
            found["end"].append(points(script, tested(res), tested(alex), images=10_000))
        if alike((*recipe, "hardware", "world_size"), alex, res):
            found["time"].append(ratio(script, fastest(alex), fastest(res)))
            flops = [runs[0]["report"]["flops_per_image"] for runs in (res, alex)]
            found["scarce"].append(ratio(f"{script}, FLOPs", flops[:1], flops[1:]))
            found["scarce"].append(ratio(f"{script}, seconds", fastest(res), fastest(alex)))
    for network, name in NETWORKS.items():
        one, many = (kept.get(f"{network}-{script}", []) for script in SETUPS)
        if alike(("train_images", "epochs"), one, many):
            found["ddp"].append(points(name[:4], tested(many), tested(one), images=10_000))
        size = REPORT_PARAMETERS[network]
        found[network].append(Estimate("its code", size, size, size, ""))
    for row in scaling:
        if row["precision"] == "bf16":  # the report's DDP runs are in half precision, too
            found[f"{row['network']} ddp"].append(efficiency(row, "ddp"))
    claims = csv.DictReader(io.StringIO(CLAIMS.strip()), delimiter=";")
    return [judge(claim, found[claim["key"]]) for claim in claims]


# -- Tables ----------------------------------------------------------------------------------------


def kept_runs(folder: Path) -> dict[str, list[dict]]:
    """Runs kept in a folder by name without -seedN; only the longest of a name. {name: runs}"""
    found = defaultdict(list)
    for path in sorted(folder.glob("*/config.json")):
        run = evaluate.read_run(path.parent)
        run["config"]["epochs"] = len(run["history"])  # those that are finished
        found[re.sub(r"-seed\d+$", "", path.parent.name)].append(run)
    for name, runs in found.items():
        most = max(run["config"]["epochs"] for run in runs)
        found[name] = [run for run in runs if run["config"]["epochs"] == most]
    return dict(found)


def table(rows: list[dict], names: tuple[str, ...] = ()) -> str:
    """Rows {heading: cell} as Markdown, or these columns of them; numbers get four digits."""
    names = names or tuple(rows[0])
    cells = [[row[name] for name in names] for row in rows]
    texts = [[f"{x:,.4g}" if isinstance(x, float) else str(x) for x in line] for line in cells]
    return evaluate.markdown_table(names, texts)


def spread(values: list[float], form: str = ".2f") -> str:
    """Mean ± standard deviation over seeds."""
    deviation = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{deviation}"


def headline(kept: dict[str, list[dict]]) -> str:
    """Four rows: the report's figure and ours."""
    rows = []
    for setup, (stated, epochs) in REPORT.items():
        network, script = setup.split("-")
        row = {"network": NETWORKS[network], "trained by": f"train_{script}.py"}
        row |= {"the report, %": f"{stated:.2f}", "its epochs": epochs}
        runs, ours = kept.get(setup, []), ("", "", "")
        if runs:
            ours = spread(tested(runs)), runs[0]["config"]["epochs"], len(runs)
        rows.append(row | dict(zip(("**ours, %**", "epochs", "n"), ours, strict=True)))
    return table(rows)


def run_rows(kept: dict[str, list[dict]]) -> tuple[list[dict], list[dict]]:
    """What the runs of each name achieve, and what they cost.

    The interval is over seeds, or, of a single run, over images (Wilson).
    """
    achieved, cost = [], []
    for name, runs in kept.items():
        config, report, seconds = runs[0]["config"], runs[0]["report"], median(fastest(runs))
        low, high = of_mean(tested(runs))[1:] if len(runs) > 1 else report["interval_95"]
        row = {"run": name, "precision": config["precision"], "batch": config["effective_batch"]}
        row |= {
            "epochs": config["epochs"],
            "n": len(runs),
            "validation, %": spread(validated(runs)),
        }
        row |= {"**test, %**": spread(tested(runs)), "95 %": f"{low:.2f} to {high:.2f}"}
        achieved.append(row)
        row = {"run": name, "hardware": config["hardware"], "processes": config["world_size"]}
        row |= {"parameters": f"{report['parameters']:,}", "seconds an epoch": f"{seconds:,.1f}"}
        row |= {"MFLOPs an image": f"{report['flops_per_image'] / 1e6:,.0f}"}
        cost.append(row | {"images/s": config["train_images"] / seconds})
    return achieved, cost


def ablation_rows(kept: dict[str, list[dict]]) -> tuple[list[dict], list[dict]]:
    """One change at a time: accuracies, and how they differ from the first row's, "baseline"."""
    figures = {"validation": (validated, 5_000), "test": (tested, 10_000)}
    figures |= {f"turned by ±{a}°": (partial(turned, angle=a), 2_000) for a in (15, 30, 45)}
    values, differences, base = [], [], kept["baseline"]
    for name in sorted(kept, key=lambda name: (name != "baseline", len(name), name)):
        runs = kept[name]
        start = {"changed": changed(runs[0]["config"], base[0]["config"]), "n": len(runs)}
        values.append(start | {k: spread(f(runs)) for k, (f, _) in figures.items()})
        if runs is not base:
            gaps = {k: points("", f(runs), f(base), n) for k, (f, n) in figures.items()}
            differences.append(start | {k: written(gap, "+.2f") for k, gap in gaps.items()})
    return values, differences


def changed(config: dict, usual: dict) -> str:
    """What a run does otherwise than the usual one, as flags."""
    names = ("model", "accumulation_steps", "lr", "rotate", "shift", "routing_iterations")
    flags = [f"--{k.replace('_', '-')} {config[k]}" for k in names if config[k] != usual[k]]
    return f"`{' '.join(flags)}`" if flags else "nothing"


def speed_text(speed: dict) -> str:
    """What benchmark.py measured, part by part."""
    parts = []
    for part, found in speed.items():
        rows = found["rows"]
        if part == "scaling":
            rows = [scaling_row(row) for row in rows]
        parts.append(f"{part} ({found['hardware']}, PyTorch {found['torch']}):\n\n{table(rows)}")
    return "\n".join(parts)


def scaling_row(row: dict) -> dict:
    """Medians of images/s over the rounds, and both efficiencies with their intervals."""
    speeds = {f"{name}, images/s": median(row[name]) for name in ("one", "apart", "ddp")}
    shares = {f"{k} / (2 x one)": written(efficiency(row, k), ".2f") for k in ("apart", "ddp")}
    return {"network": row["network"], "precision": row["precision"]} | speeds | shares


def sooner_rows(stored: dict, kept: dict[str, list[dict]]) -> list[dict]:
    """The report's code and ours to the same accuracy; ours: epochs needed x the fastest epoch."""
    rows = []
    for row in stored["time_to_accuracy"]["rows"]:
        ours = []
        for run, seconds in zip(kept[row["ours"]], fastest(kept[row["ours"]]), strict=True):
            reached = [
                e["epoch"] for e in run["history"] if e["val_accuracy"] >= row["accuracy, %"]
            ]
            ours.append(min(reached, default=math.inf) * seconds)
        rows.append(
            row | {"our seconds": median(ours), "times sooner": row["seconds"] / median(ours)}
        )
    return rows


# -- Keeping and writing ---------------------------------------------------------------------------


def place(run: dict, overwrite: bool) -> Path:
    """Where a run will be kept; UserError if it may not be."""
    folder, config = run["folder"].absolute(), run["config"]
    target = HERE / ("ablation" if folder.parent.name == "ablation" else "") / folder.name
    if config["dataset"] != "mnist" or not run["report"]:
        raise UserError(f"{folder}: only runs on MNIST that evaluate.py has seen can be kept")
    if (target / "config.json").exists() and not overwrite:
        before = evaluate.read_run(target)
        sizes = [(len(r["history"]), r["config"]["train_images"]) for r in (run, before)]
        if sizes[0][0] < sizes[1][0] or sizes[0][1] < sizes[1][1]:
            raise UserError(f"{target} is a longer or larger run: --overwrite replaces it")
    return target


def keep(run: dict, target: Path) -> None:
    """Copy what stays of a run, without the folder where its data lay."""
    target.mkdir(exist_ok=True, parents=True)
    for name in ("metrics.csv", "report.json"):
        shutil.copy(run["folder"] / name, target / name)
    config = json.dumps(run["config"] | {"data_dir": "data"}, indent=2)
    write_file(target / "config.json", f"{config}\n".encode())


def fill(text: str, tables: dict[str, str]) -> str:
    """The README's text with each table between its markers."""
    for name, table in tables.items():
        start, end = f"<!-- results: {name} -->", "<!-- end -->"
        if text.count(start) != 1:
            raise UserError(f"README.md has {text.count(start)} places for the table {name!r}")
        before, rest = text.split(start)
        text = f"{before}{start}\n\n{table}\n{end}{rest.split(end, 1)[1]}"
    return text
