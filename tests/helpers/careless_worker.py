"""Trains, and names a checkpoint before it is whole: what the kill drill must notice."""

import shutil
import sys
import time

from hourglass_dist import train
from hourglass_dist.checkpoint import save
from hourglass_dist.checkpoint.save import Checkpoints
from hourglass_dist.core import ranks
from hourglass_dist.core.files import replace

complete = Checkpoints._complete


def careless(self, folder, progress):
    path = complete(self, folder, progress)
    kept = path.with_name(f".unfinished_copy_of_{path.name}")
    path.rename(kept)
    path.mkdir()
    replace(self.folder / "latest", path.name + "\n")
    for file in sorted(kept.iterdir()):  # the manifest first
        shutil.copy(file, path)
        time.sleep(0.01)
    shutil.rmtree(kept)
    return path


Checkpoints._complete = careless
assert save.Checkpoints is Checkpoints
ranks.leave(train.main(sys.argv[1:]))
