"""Exit codes of every command. Launchers and schedulers decide by them whether to start again.

0    done
1    failed: the loss stayed NaN, a rank hung, was killed or was lost; may be started again
2    a mistake in settings, data or surroundings: starting again does not help
75   stopped on request and saved (EX_TEMPFAIL of sysexits.h): the same command continues
"""

DONE = 0
FAILED = 1
BAD_INPUT = 2
STOPPED = 75
