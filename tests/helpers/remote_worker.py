"""Reads a remote dataset through a cache and prints a checksum of its batches.

remote_worker.py URL CACHE STEPS
"""

from __future__ import annotations

import sys
import zlib
from itertools import islice

from hourglass_dist.config.data import CacheConfig
from hourglass_dist.config.loader import print_error
from hourglass_dist.data.mixture import open_dataset, simple_plan
from hourglass_dist.data.stream import Stream


def main() -> int:
    url, folder, steps = sys.argv[1:]
    settings = CacheConfig(dir=folder, timeout_s=10.0, deadline_s=30.0)
    crc = 0
    try:
        dataset = open_dataset(url, cache=settings)
        stream = Stream([dataset], simple_plan(dataset, 8, 12, 5))
        for batch in islice(stream.batches(), int(steps)):
            crc = zlib.crc32(batch.targets_BL.numpy().tobytes(), crc)
    except (ValueError, OSError) as error:
        print_error(error)
        return 2
    print(crc)
    return 0


if __name__ == "__main__":
    sys.exit(main())
