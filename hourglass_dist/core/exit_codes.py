"""Exit codes of every command. Launchers and schedulers use them to decide about a restart.

0    done
1    failed: the loss stayed NaN, a rank hung, was killed or was lost; a restart may help
2    a mistake in settings, data or surroundings: a restart does not help
75   stopped on request and saved (EX_TEMPFAIL of sysexits.h): the same command continues
"""

DONE = 0
FAILED = 1
BAD_INPUT = 2
STOPPED = 75
