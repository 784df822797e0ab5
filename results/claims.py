"""Nine claims of the student report, judged by measurements: a lesson in statistics.

The student report is the text that this repository reproduces (README.md, Sources).

Train a network twice, with two seeds, and you get two test accuracies. So a difference
of 0.1 points between two networks may be chance. That is why each figure that varies
has a 95 % confidence interval here. Imagine repeating the measurement 100 times, with
an interval from the new values each time: about 95 of these intervals would contain the
true value.
There are three kinds of interval, because three things can be repeated:

    over seeds    New initial weights, angles and orders of the images, but the same
                  test digits. This needs several runs, whose scatter sets the width.
    over images   New test digits, but the same trained networks. One run of each is
                  enough. The interval says nothing about other seeds.
    over rounds   New rounds of benchmark.py on the same machine: for times and speeds.

One interval in 20 misses the true value, and nothing shows which one. A claim with
several intervals is more likely to include a miss.

A claim also needs bounds. The report gives none, so they are ours: "about 2x slower"
means 1.5 to 2.5 times the time. Then there are three verdicts:

    agree         Every interval lies within the bounds.
    disagree      At least one interval lies outside the bounds.
    undecided     No interval lies outside, but one contains a bound: the true value may
                  be on either side of it. Without this third verdict, chance would
                  decide. With more seeds, the interval becomes narrower.

Read it downwards:
    1. a figure and its interval
    2. a claim and its verdict
    3. the nine claims
    4. what was measured for each of them
Then open tables.py, which prints them.
"""

import math
from statistics import mean, stdev
from typing import NamedTuple

from scipy import stats

import evaluate
from data import VALIDATION_SIZE

VALIDATION_IMAGES = VALIDATION_SIZE["mnist"]
TEST_IMAGES = 10_000
# A run's name is NETWORK-SCRIPT, and on a GPU NETWORK-SCRIPT-cuda
NETWORKS = ("alexcaps", "rescaps")
SCRIPTS = ("single", "ddp")  # train_single.py and train_ddp.py
DEVICES = ("", "-cuda")
# Accuracies of two networks are compared only if they agree in these settings.
TRAINED_ALIKE = (*evaluate.USUAL, "train_images", "world_size", "precision")

# -- 1. A figure and its interval ----------------------------------------------------


class Estimate(NamedTuple):
    """A figure and its 95 % interval, from `low` to `high`.

    `n` says what the interval rests on: seeds ("3 + 3"), images or rounds.
    """

    label: str
    value: float
    low: float
    high: float
    n: str


def exact(label: str, value: float) -> Estimate:
    """A figure that does not scatter, such as a number of parameters."""
    return Estimate(label, value, low=value, high=value, n="")


def t_factor(freedom: int) -> float:
    """How many standard errors the 95 % interval reaches to either side.

    For very many values it is 1.96. A few values only hint at how much values scatter,
    so their interval has to be wider: Student's t distribution says by how much. With 4
    degrees of freedom (3 + 3 values minus 2 means) the factor is 2.78. With 1 degree of
    freedom it is 12.7.
    """
    return float(stats.t.ppf(0.975, freedom))  # 2.5 % are left out on either side


def of_mean(values: list[float]) -> tuple[float, float, float]:
    """The mean of two or more values, and its interval -> (mean, low, high)."""
    n = len(values)
    # The mean of n values scatters less than one value, by a factor of sqrt(n).
    half = t_factor(n - 1) * stdev(values) / math.sqrt(n)
    return mean(values), mean(values) - half, mean(values) + half


def over_seeds(first: list[float], second: list[float]) -> tuple[float, float, float]:
    """mean(first) - mean(second), and its interval -> (difference, low, high).

    Each list has a value per seed. Both together need at least three values. The interval
    says how other seeds would move the difference (Student's t, with one variance for both
    lists: three seeds are too few to estimate two variances).
    """
    difference = mean(first) - mean(second)
    freedom = len(first) + len(second) - 2  # each mean uses up one
    deviations = [x - mean(first) for x in first]
    deviations += [x - mean(second) for x in second]
    variance = sum(x**2 for x in deviations) / freedom
    # The standard error: how much the difference of the two means scatters
    error = math.sqrt(variance * (1 / len(first) + 1 / len(second)))
    half = t_factor(freedom) * error
    return difference, difference - half, difference + half


def over_images(first: float, second: float, n: int) -> tuple[float, float, float]:
    """first - second, and its interval -> (difference, low, high).

    Both are accuracies in percent on n images, of one run each. The interval says how
    other images would move the difference (R. Newcombe 1998, method 10). The method
    assumes two independent samples of images. Here both networks see the same images and
    tend to fail on the same ones, so this interval is a little too wide.
    """
    low_1, high_1 = evaluate.wilson(first * n / 100, n)
    low_2, high_2 = evaluate.wilson(second * n / 100, n)
    difference = first - second
    # The difference is lowest if the first is low while the second is high. Both rarely
    # happen at once, so the two distances are added as squares.
    low = difference - math.hypot(first - low_1, high_2 - second)
    high = difference + math.hypot(high_1 - first, second - low_2)
    return difference, low, high


def accuracy_difference(
    label: str, first: list[float], second: list[float], images: int
) -> Estimate:
    """First minus second, in points: over seeds or, with one run each, over images.

    Each list has an accuracy per seed, in percent on that many images.
    """
    if len(first) + len(second) > 2:
        value, low, high = over_seeds(first, second)
        n = f"{len(first)} + {len(second)}"
    else:
        value, low, high = over_images(first[0], second[0], images)
        n = f"1 + 1, {images:,} images"
    return Estimate(label, value, low, high, n)


def ratio(label: str, first: list[float], second: list[float]) -> Estimate:
    """First over second, round by round: whatever slows the machine slows both."""
    ratios = [x / y for x, y in zip(first, second, strict=True)]
    value, low, high = of_mean(ratios)
    return Estimate(label, value, low, high, n=f"{len(ratios)} rounds")


# -- 2. A claim and its verdict ------------------------------------------------------


def judge(estimate: Estimate, at_least: float, at_most: float) -> str:
    """What one estimate says about a claim: "agree", "disagree" or "undecided"."""
    if at_least < estimate.low and estimate.high < at_most:
        return "agree"
    if estimate.high < at_least or at_most < estimate.low:
        return "disagree"
    return "undecided"


class Claim(NamedTuple):
    """What the report says, what was measured for it, and the bounds that decide.

    `form` and `unit` say how tables.py writes the figures: "+.2f" and " points" write
    "+0.46 points".
    """

    report_says: str
    metric: str
    estimates: list[Estimate]
    at_least: float
    at_most: float
    form: str
    unit: str

    @property
    def verdict(self) -> str:
        """The verdict of all estimates: one "disagree" is enough, "agree" needs all."""
        found = [judge(e, self.at_least, self.at_most) for e in self.estimates]
        for word in ("disagree", "undecided", "agree"):
            if word in found:
                return word
        return "not measured"

    @property
    def deciding(self) -> Estimate | None:
        """The first estimate that has the claim's verdict on its own."""
        for estimate in self.estimates:
            if judge(estimate, self.at_least, self.at_most) == self.verdict:
                return estimate
        return None


# -- 3. The nine claims --------------------------------------------------------------


def report_claims(rows: dict[str, dict], scaling: list[dict]) -> list[Claim]:
    """The nine claims, in the report's order, with what we measured.

    `rows` are the runs in this folder, by name: "alexcaps-ddp-cuda" is one row for all
    seeds of that setup (evaluate.make_rows). `scaling` is what benchmark.py measured in
    its part "scaling": images/s, round by round.
    """
    return [
        Claim(
            "AlexCapsNet converges faster",
            "validation accuracy after epoch 1: AlexCapsNet minus ResCapsNet",
            gaps_after_epoch_1(rows),
            at_least=0.0,
            at_most=math.inf,
            form="+.2f",
            unit=" points",
        ),
        Claim(
            "ResCapsNet ends slightly more accurate",
            "test accuracy: ResCapsNet minus AlexCapsNet",
            gaps_at_the_end(rows),
            at_least=0.1,
            at_most=2.0,
            form="+.2f",
            unit=" points",
        ),
        Claim(
            "AlexCapsNet: tens of millions of weights",
            "parameters in the report's code",
            [exact("its code", 2_683_840)],  # counted in the report's notebook
            at_least=10_000_000,
            at_most=100_000_000,
            form=",.0f",
            unit="",
        ),
        Claim(
            "ResCapsNet: a few million weights",
            "parameters in the report's code",
            [exact("its code", 2_022_272)],  # counted in the report's notebook
            at_least=1_000_000,
            at_most=10_000_000,
            form=",.0f",
            unit="",
        ),
        Claim(
            "AlexCapsNet is about 2x slower per epoch",
            "time per image: AlexCapsNet / ResCapsNet",
            time_ratios(scaling, "alexcaps", "rescaps"),
            at_least=1.5,
            at_most=2.5,
            form=".2f",
            unit="x",
        ),
        Claim(
            "DDP helps AlexCapsNet significantly",
            "speed-up divided by processes (bf16, one CPU core per process)",
            ddp_efficiency(scaling, "alexcaps"),
            at_least=0.75,
            at_most=math.inf,
            form=".2f",
            unit=" of ideal",
        ),
        Claim(
            "DDP helps ResCapsNet moderately",
            "speed-up divided by processes (bf16, one CPU core per process)",
            ddp_efficiency(scaling, "rescaps"),
            at_least=0.55,
            at_most=0.75,
            form=".2f",
            unit=" of ideal",
        ),
        Claim(
            "both do well under DDP",
            "test accuracy: two processes minus one",
            gaps_under_ddp(rows),
            at_least=-0.3,
            at_most=math.inf,
            form="+.2f",
            unit=" points",
        ),
        Claim(
            "ResCapsNet suits scarce resources",
            "FLOPs and time per image: ResCapsNet / AlexCapsNet",
            cost_ratios(rows, scaling),
            at_least=0.0,
            at_most=1.0,
            form=".2f",
            unit="x",
        ),
    ]


# -- 4. What was measured for each of them -------------------------------------------


def same_settings(settings: tuple[str, ...], a: dict | None, b: dict | None) -> bool:
    """True if both rows exist and agree in all of these settings."""
    if a is None or b is None:
        return False
    return all(a[setting] == b[setting] for setting in settings)


def network_pairs(rows: dict[str, dict], settings: tuple[str, ...]) -> list[tuple]:
    """(training, AlexCapsNet's row, ResCapsNet's row) for each training of both networks.

    A training is a script on a device: "single", "single-cuda", "ddp", "ddp-cuda". Runs
    on a CPU are compared only with runs on a CPU. A training is left out if the networks
    differ in one of these settings.
    """
    pairs = []
    for script in SCRIPTS:
        for device in DEVICES:
            training = script + device
            alex = rows.get(f"alexcaps-{training}")
            res = rows.get(f"rescaps-{training}")
            if same_settings(settings, alex, res):
                pairs.append((training, alex, res))
    return pairs


def gaps_after_epoch_1(rows: dict[str, dict]) -> list[Estimate]:
    """Validation accuracy after one epoch, AlexCapsNet's minus ResCapsNet's."""
    gaps = []
    for training, alex, res in network_pairs(rows, TRAINED_ALIKE):
        first = [run["history"][0]["val_accuracy"] for run in alex["runs"]]
        second = [run["history"][0]["val_accuracy"] for run in res["runs"]]
        gaps.append(accuracy_difference(training, first, second, VALIDATION_IMAGES))
    return gaps


def gaps_at_the_end(rows: dict[str, dict]) -> list[Estimate]:
    """ResCapsNet's test accuracy minus AlexCapsNet's, after equally many epochs.

    (Each was tested with the weights of its best epoch.)
    """
    gaps = []
    for training, alex, res in network_pairs(rows, (*TRAINED_ALIKE, "epochs")):
        first = res["values"]["accuracy"]
        second = alex["values"]["accuracy"]
        gaps.append(accuracy_difference(training, first, second, TEST_IMAGES))
    return gaps


def find_speeds(scaling: list[dict], network: str, precision: str) -> dict | None:
    """benchmark.py's row for this network and precision; None if there is none."""
    for speeds in scaling:
        if speeds["network"] == network and speeds["precision"] == precision:
            return speeds
    return None


def time_ratios(scaling: list[dict], first: str, second: str) -> list[Estimate]:
    """Time per image, the first network's over the second's.

    It is measured in float32 with one process ("one" in benchmark.py's rows), and in
    bfloat16 with two processes under DDP ("ddp").
    """
    contestants = [("fp32", "fp32", "one"), ("bf16, DDP", "bf16", "ddp")]
    ratios = []
    for label, precision, contestant in contestants:
        speeds_1 = find_speeds(scaling, first, precision)
        speeds_2 = find_speeds(scaling, second, precision)
        if speeds_1 and speeds_2:
            # benchmark.py measures images/s. The time per image is 1 / speed, so the
            # ratio of the times is the inverse ratio of the speeds.
            ratios.append(ratio(label, speeds_2[contestant], speeds_1[contestant]))
    return ratios


def efficiency(speeds: dict, contestant: str) -> Estimate:
    """The speed of two processes, divided by twice the speed of one; 1 is ideal.

    `speeds` is a row of benchmark.py's part "scaling". `contestant` is "ddp", or "apart"
    for two processes that share nothing.
    """
    twice = [2 * speed for speed in speeds["one"]]
    return ratio(speeds["precision"], speeds[contestant], twice)


def ddp_efficiency(scaling: list[dict], network: str) -> list[Estimate]:
    """The efficiency of DDP in bfloat16: the report's runs use half precision, too."""
    speeds = find_speeds(scaling, network, "bf16")
    return [efficiency(speeds, "ddp")] if speeds else []


def gaps_under_ddp(rows: dict[str, dict]) -> list[Estimate]:
    """Test accuracy of train_ddp.py's two processes minus train_single.py's one.

    They also differ in precision, and two processes have twice as many images in a step.
    The claim is about both networks: unless both were measured, the list is empty.
    """
    gaps = []
    measured = set()
    for network in NETWORKS:
        for device in DEVICES:
            one = rows.get(f"{network}-single{device}")
            two = rows.get(f"{network}-ddp{device}")
            if same_settings((*evaluate.USUAL, "train_images", "epochs"), one, two):
                label = network.removesuffix("caps") + device
                first = two["values"]["accuracy"]
                second = one["values"]["accuracy"]
                gaps.append(accuracy_difference(label, first, second, TEST_IMAGES))
                measured.add(network)
    return gaps if len(measured) == len(NETWORKS) else []


def cost_ratios(rows: dict[str, dict], scaling: list[dict]) -> list[Estimate]:
    """FLOPs and times per image, ResCapsNet's over AlexCapsNet's."""
    ratios = []
    pairs = network_pairs(rows, settings=("routing_iterations",))
    if pairs:
        _, alex, res = pairs[0]  # any will do: they have the same FLOPs
        flops = res["flops_per_image"] / alex["flops_per_image"]
        ratios.append(exact("FLOPs", flops))
    for estimate in time_ratios(scaling, "rescaps", "alexcaps"):
        label = f"{estimate.label}, time"
        ratios.append(estimate._replace(label=label))
    return ratios
