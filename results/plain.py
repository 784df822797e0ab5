"""A baseline: each network's convolutions without capsules. Are capsules worth it?

    python -m results.plain train_single.py --model plain-alexcaps
    python -m results.plain train_single.py --resume runs/plain-alexcaps-single
    torchrun --nproc_per_node=2 -m results.plain train_ddp.py --model plain-rescaps
    python -m results.plain evaluate.py runs/plain-alexcaps-single

The first three commands train with the scripts' own loop, data, seeds and flags. The
last one writes report.json (for one run, without flags). The commands that the scripts
print work here, too, with `-m results.plain` before the script's name.

Squash, votes, routing and margin loss are left out. A linear layer and cross-entropy take
their place.
"""

import sys
from pathlib import Path

from torch import Tensor, nn

import evaluate
import train_ddp
import train_single
from alexcaps import AlexCapsNet
from capsules import at_least_float32
from data import UserError, load
from rescaps import ResCapsNet


class WithoutCapsules(nn.Module):
    """A mixin: PlainAlexNet(WithoutCapsules, AlexCapsNet) is AlexCapsNet without capsules.

    The convolutions, including that of the primary capsules, are those of the capsule
    network. With the same seed they start with the same weights. ReLU replaces squash,
    and a linear layer replaces the digit capsules. [B, 1, side, side] -> ten scores, the
    logits [B, 10].
    """

    def __init__(self, routing_iterations: int = 3, reconstruction: float = 0.0):
        if reconstruction > 0:
            reason = "a plain network has no capsule to draw from"
            raise UserError(f"--reconstruction: {reason}; leave it out")
        # In PlainAlexNet, the next class is AlexCapsNet: this builds it with its capsules.
        super().__init__(routing_iterations)
        N, I, _ = self.digits.weight.shape  # [N, I, J*D]
        self.digits = nn.Linear(N * I, 10)

    def hidden(self, images: Tensor) -> Tensor:
        """The numbers that the linear layer sees: [B, N*I]."""
        x = self.primary.conv(self.features(images))  # -> [B, types*I, H', W']
        return x.relu().flatten(1)  # -> [B, N*I], N = H' * W' * types

    def forward(self, images: Tensor) -> Tensor:
        return self.digits(self.hidden(images))  # -> [B, 10]

    def scores(self, logits: Tensor) -> Tensor:
        return at_least_float32(logits)

    def loss(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.scores(logits), labels)


class PlainAlexNet(WithoutCapsules, AlexCapsNet):
    """AlexCapsNet's six convolutions and a linear layer."""


class PlainResNet(WithoutCapsules, ResCapsNet):
    """ResCapsNet's convolutions and a linear layer."""


NETWORKS = {"plain-alexcaps": PlainAlexNet, "plain-rescaps": PlainResNet}


def write_report() -> None:
    """Write report.json for the run that the command line names.

    It holds what evaluate.py's report holds, except for routing.
    """
    if len(sys.argv) != 2:
        raise UserError("a plain network can only be reported: give the folder of one run")
    run = evaluate.read_run(Path(sys.argv[1]))
    if run["config"]["model"] not in NETWORKS:
        raise UserError(f"{run['folder']} has capsules: run python evaluate.py on it")
    images, labels = load(run["config"]["dataset"], run["config"]["data_dir"], "test")
    model = evaluate.load_network(run, train_single.find_device(None))
    report, _ = evaluate.measure(run, model, images, labels)
    evaluate.write_json(run["folder"] / "report.json", report)
    print(f"test accuracy {report['accuracy']:.2f} %, {report['errors']} errors")


def main() -> None:
    scripts = {
        "train_single.py": train_single.main,
        "train_ddp.py": train_ddp.main,
        "evaluate.py": write_report,
    }
    if len(sys.argv) < 2 or sys.argv[1] not in scripts:
        raise UserError(f"the script is missing: begin with one of {', '.join(scripts)}")
    train_single.MODELS.update(NETWORKS)
    script = sys.argv.pop(1)  # it reads its flags from what remains
    scripts[script]()


if __name__ == "__main__":
    train_single.run_main(main, last_to_speak=train_ddp.LOCAL_RANK > 0, leave=train_ddp.leave)
