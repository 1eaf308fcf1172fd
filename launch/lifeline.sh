#!/usr/bin/env bash
# Runs a command for as long as somebody at the other end of standard input gives a sign of life, a line every two minutes:
#
#   lifeline.sh SECONDS COMMAND ...
#
# After that the command gets SIGTERM, and SIGKILL when it is still there SECONDS later. Ends with its exit code.
set -u

seconds=$1
shift
exec 3<&0 </dev/null > >(exec tee -p /dev/null) 2>&1 # tee: words that nobody hears any more end nothing

"$@" 3<&- &
command=$!
trap 'kill -TERM "$command" 2>/dev/null' TERM INT HUP QUIT USR1
(
  trap - TERM INT HUP QUIT USR1
  while read -r -t 120 -u 3; do :; done
  kill -TERM "$command"
  for ((second = 0; second < seconds; second++)); do
    sleep 1
    kill -0 "$command" || exit 0
  done
  kill -KILL "$command"
) >/dev/null 2>&1 &
watcher=$!
exec 3<&-

code=0
while kill -0 "$command" 2>/dev/null; do # a signal ends a wait, too
  wait "$command"
  code=$?
done
kill "$watcher" 2>/dev/null
exit "$code"
