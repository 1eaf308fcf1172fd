"""How well batches are mixed, beside webdataset's shuffle buffer:

python -m tests.measure.shuffle
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from topics import ours, webdatasets

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "wds").mkdir()
        print(
            f"stream                    {ours(Path(temporary), 100_000):.3f} of independent draws"
        )
        print(f"webdataset.shuffle(10000) {webdatasets(Path(temporary) / 'wds', 100_000):.3f}")
