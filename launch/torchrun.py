"""torchrun, but it ends as its ranks do, and has words for what goes wrong between nodes: see
hourglass_dist/launch/agent.py."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])
from hourglass_dist.launch.agent import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
