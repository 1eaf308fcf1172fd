"""torchrun, but it ends as its ranks do, and has words for what goes wrong between nodes: see
hourglass_dist/launch/agent.py."""

import os
import sys
from pathlib import Path

# the code beside this file, also where another checkout, or none, is installed
sys.path[0] = str(Path(__file__).parents[1])
from hourglass_dist.launch.agent import main  # noqa: E402

code = main(sys.argv[1:])
sys.exit(code if code in (0, 2) else int(os.environ.get("RETRY_EXIT_CODE", code)))
