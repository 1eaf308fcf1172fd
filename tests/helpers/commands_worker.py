"""Runs several ``hourglass`` commands in one process, which saves a start for each: standard input
has a list of their arguments, as JSON, standard output gets a list of exit codes and outputs."""

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import entry_points

(command,) = entry_points(group="console_scripts", name="hourglass")
main, results = command.load(), []
for arguments in json.load(sys.stdin):
    sys.argv, code = ["hourglass", *arguments], 0
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as end:
            code = end.code
    results.append([code, out.getvalue(), err.getvalue()])
json.dump(results, sys.stdout)
