"""Keep runs in results/ and write the tables of README.md from what is kept here.

    python -m results.tables                                 the tables anew, from results/
    python -m results.tables runs/alexcaps-single ...        keep these runs first: config.json,
                                                             metrics.csv, report.json, pictures

Run evaluate.py on a run before it is kept. In README.md each table stands between two markers,
<!-- results: NAME --> and <!-- end -->; nothing between them is written by hand. The line numbers
of its equations are brought up to date, too.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import evaluate
from results.benchmark import report_table, speed_table
from train_single import (
    UsageError,
    epoch_line,
    intro,
    load_config,
    run_main,
    write_atomically,
)

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
KEPT = ("config.json", "metrics.csv", "report.json")  # and, for the first seed, the pictures
HEADLINE = {
    "model": ("network", ""), "setup": ("trained by", ""), "report_accuracy": ("report, %", ".2f"),
    "report_epochs": ("epochs", ""), "accuracy": ("**ours, %**", ".2f"), "runs": ("n", ""),
    "epochs": ("epochs", ""), "train_images": ("digits", ","), "hardware": ("hardware", ""),
}
ACCURACY = {
    name: evaluate.RESULT_COLUMNS[name]
    for name in (
        *("model", "setup", "precision", "effective_batch", "epochs", "runs", "val_accuracy"),
        *("accuracy", "interval_low", "interval_high", "errors", "best_epoch", "epochs_to_target"),
    )
}
ABLATION = {
    "change": ("changed", ""), "steps": ("steps an epoch", ","), "runs": ("n", ""),
    "val_accuracy": ("validation, %", ".2f"), "difference": ("minus the first row's", "+.2f"),
    "accuracy": ("test, %", ".2f"), "turned_15": ("turned by ±15°", ".1f"),
    "turned_30": ("by ±30°", ".1f"), "turned_45": ("by ±45°", ".1f"),
}


def check(run_dir: Path) -> None:
    """UsageError if a run is not of MNIST or has not been evaluated."""
    run = evaluate.read_run(run_dir)
    if run["config"]["dataset"] != "mnist":
        raise UsageError(f"{run_dir} is not of MNIST: it cannot stand beside the report's figures")
    if evaluate.read_report(run) is None:
        raise UsageError(f"{run_dir} has no report of its best.pt: run evaluate.py on it first")


def keep(run_dir: Path) -> None:
    """Copy what stays of a run."""
    ablation = run_dir.absolute().parent.name == "ablation"
    target = HERE / ("ablation" if ablation else "") / run_dir.name
    target.mkdir(exist_ok=True, parents=True)
    pictures = run_dir.glob("*.png") if load_config(run_dir)["seed"] == 0 and not ablation else ()
    for path in (*(run_dir / name for name in KEPT), *pictures):
        shutil.copy(path, target / path.name)


def kept_rows(folder: str = "") -> list[dict]:
    """The rows of all runs kept here, or in a folder here."""
    configs = sorted((HERE / folder).glob("*/config.json"))
    runs = [evaluate.read_run(path.parent) for path in configs]
    return evaluate.make_rows([run | {"report": evaluate.read_report(run)} for run in runs])


def headline(rows: list[dict]) -> str:
    """Of each network and setup the longest training, beside the report's figure."""
    longest: dict[tuple, dict] = {}
    for row in sorted(rows, key=lambda row: (row["train_images"], row["epochs"])):
        longest[row["model"], row["setup"]] = row
    chosen = [row for row in rows if longest[row["model"], row["setup"]] is row]
    return evaluate.results_table(chosen, HEADLINE)


def ablation(rows: list[dict]) -> str:
    """One change at a time; first the runs without any."""
    if not rows:
        return "Not measured.\n"
    for row in rows:
        row["change"] = " ".join(evaluate.unusual(row))
        row["steps"] = -(-row["train_images"] // row["effective_batch"])
    by_number = [(re.split(r"(\d+)", row["change"]), row) for row in rows]
    by_number.sort(key=lambda pair: [int(x) if x.isdigit() else x for x in pair[0]])
    rows = [row for _, row in by_number]
    for row in rows:
        row["difference"] = row["val_accuracy"] - rows[0]["val_accuracy"]
        row["change"] = f"`{row['change']}`" if row["change"] else "nothing"
    rows[0]["difference"] = None
    return evaluate.results_table(rows, ABLATION)


def sample(run_dir: Path) -> str:
    """What a run printed, from what it left."""
    run = evaluate.read_run(run_dir)
    config = run["config"]
    lines = [epoch_line(row, config["epochs"]) for row in run["history"]]
    return "\n".join(["```", intro(config), f"run folder: runs/{run_dir.name}", *lines, "```", ""])


def sections(rows: list[dict]) -> dict[str, str]:
    """Marker's name -> the Markdown between the markers."""
    return {
        "headline": headline(rows),
        "accuracy": evaluate.results_table(rows, ACCURACY),
        "cost": evaluate.cost_table(rows),
        "claims": evaluate.claims_table(rows),
        "sample": sample(HERE / "alexcaps-single"),
        "ablation": ablation(kept_rows("ablation")),
        "speed": "\n".join(
            speed_table(json.loads(path.read_text())) for path in sorted(HERE.glob("speed-*.json"))
        ),
        "report-code": report_table(json.loads((HERE / "report-code-cpu.json").read_text())),
    }


def fill(text: str, tables: dict[str, str]) -> str:
    """The README's text with each table between its markers."""
    for name, table in tables.items():
        pattern = rf"(<!-- results: {name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(
            pattern, lambda m, t=table: f"{m[1]}\n{t}\n{m[2]}", text, flags=re.DOTALL
        )
        if found != 1:
            raise UsageError(f"README.md has {found} places for the table {name!r} instead of one")
    return text


def renumber(text: str) -> str:
    """The README's text with the present line number of each line of code that it quotes."""

    def place(match: re.Match) -> str:
        lines = (HERE.parent / match[1]).read_text().splitlines()
        number = next((k for k, line in enumerate(lines, 1) if match[2] in line), None)
        if number is None:
            raise UsageError(f"README.md quotes {match[2]!r}, which is not in {match[1]}")
        return f"| {match[1]}:{number} | `{match[2]}` |"

    return re.sub(r"\| (\w+\.py):\d+ \| `(.+?)` \|", place, text)


def main() -> None:
    runs = [Path(argument) for argument in sys.argv[1:]]
    for work in (check, keep):  # all are checked before the first is copied
        for run_dir in runs:
            work(run_dir)
    rows = kept_rows()
    write_atomically(HERE / "comparison.md", evaluate.comparison_text(rows))
    write_atomically(HERE / "comparison.csv", evaluate.comparison_csv(rows))
    evaluate.draw_comparison(rows, HERE)
    write_atomically(README, renumber(fill(README.read_text(), sections(rows))))
    print(f"{len(rows)} rows from {HERE}: comparison.md, .csv, .png and the tables of README.md")


if __name__ == "__main__":
    run_main(main)
