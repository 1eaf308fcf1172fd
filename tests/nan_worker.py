"""Trains with a loss that is no number at the steps given first, on rank 1 only: a fault that no
batch of text causes at will."""

import os
import sys

from hourglass_dist import train
from hourglass_dist.engine import Engine
from hourglass_dist.model.hourglass import HourglassLM

steps = {int(step) for step in sys.argv[1].split(",")}
now = 0
step, forward = Engine.step, HourglassLM.forward


def noted(self, rows, number):
    global now
    now = number + 1
    return step(self, rows, number)


def broken(self, *args, **kwargs):
    nats, count = forward(self, *args, **kwargs)
    bad = now in steps and self.training and os.environ["RANK"] == "1"
    return nats * float("nan") if bad else nats, count


Engine.step, HourglassLM.forward = noted, broken
sys.exit(train.main(sys.argv[2:]))
