"""The baseline: each network's convolutions without capsules. Do capsules earn their cost?

    python -m results.plain train_single.py --model plain-alexcaps
    python -m results.plain train_ddp.py --model plain-rescaps --precision fp32
    python -m results.plain evaluate.py runs/plain-alexcaps-single

These are the scripts themselves, loop, data, seeds and all, with two networks more. What is left
out is what makes a network one of capsules: squash, votes, routing and margin loss. One linear
layer and cross-entropy stand in their place.
"""

from torch import Tensor, nn

import evaluate
import train_ddp
import train_single
from alexcaps import AlexCapsNet
from capsules import at_least_float32
from rescaps import ResCapsNet


class WithoutCapsules(nn.Module):
    """Stands before a capsule network as a base class, and takes the capsules from it.

    The convolutions, the primary capsules' included, are the network's own and start with its own
    weights. ReLU stands for squash. [B, 1, side, side] -> ten scores, logits [B, 10].
    """

    def __init__(self, routing_iterations: int = 3):
        super().__init__(routing_iterations)
        N, I, _ = self.digits.weight.shape  # one matrix for each primary capsule
        self.digits = nn.Linear(N * I, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.primary.conv(self.features(images)).relu()  # [B, types*I, H', W'], N = H'*W'*types
        return self.digits(x.flatten(1))  # [B, N*I] -> [B, 10]


class PlainAlexNet(WithoutCapsules, AlexCapsNet):
    """AlexCapsNet's six convolutions and a linear layer."""


class PlainResNet(WithoutCapsules, ResCapsNet):
    """ResCapsNet's convolutions and a linear layer."""


def take_part() -> None:
    """Add the two networks to the scripts, whose scores and loss become those of a plain network.

    The scripts look both functions up by these names, in each step. Float32 is for logits what it
    is for lengths: bfloat16 has too few digits for a loss.
    """
    train_single.MODELS |= {"plain-alexcaps": PlainAlexNet, "plain-rescaps": PlainResNet}
    for script in (train_single, train_ddp, evaluate):
        script.capsule_lengths = at_least_float32
        script.margin_loss = nn.functional.cross_entropy
