"""Trains with a fault that no text causes at will: fault_worker.py KIND STEPS CONFIG key=value ...

nan 3,6    the loss of rank 1 is no number at these steps
hold 12    every rank stands still at this step, until it is killed or asked to stop
lr 12      a step far too long on the batch that is read at this step, whenever it is read
"""

import os
import sys
import time

import torch

from hourglass_dist import train
from hourglass_dist.core import ranks
from hourglass_dist.core.stop import StopRequests
from hourglass_dist.engine import optim
from hourglass_dist.engine.engine import Engine
from hourglass_dist.model.hourglass import HourglassLM

kind, steps = sys.argv[1], {int(step) for step in sys.argv[2].split(",")}
now, bad, signals = 0, [], []
step, forward, learning_rate = Engine.step, HourglassLM.forward, optim.learning_rate
note = StopRequests._note


def noted(self, rows, number, stop_flags):
    global now, is_bad
    now = number + 1
    while kind == "hold" and now in steps and not signals:
        time.sleep(0.01)
    if now in steps and len(bad) < len(steps):
        bad.append(rows["tokens_BL"].clone())
    is_bad = any(torch.equal(tokens, rows["tokens_BL"]) for tokens in bad)
    return step(self, rows, number, stop_flags)


def broken(self, *args, **kwargs):
    nats, count = forward(self, *args, **kwargs)
    fault = now in steps and self.training and os.environ["RANK"] == "1"
    return nats * float("nan") if fault else nats, count


def heard(self, number, frame):
    signals.append(number)
    note(self, number, frame)


Engine.step = noted
StopRequests._note = heard
if kind == "nan":
    HourglassLM.forward = broken
elif kind == "lr":
    optim.learning_rate = lambda *a: 1.0 if is_bad else learning_rate(*a)
ranks.leave(train.main(sys.argv[3:]))
