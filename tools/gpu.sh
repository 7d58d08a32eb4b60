#!/bin/sh
# The most valuable things first on a GPU, within a given time.
#
#   tools/gpu.sh 480                 everything below, in at most 480 seconds
#   tools/gpu.sh 480 check train     only these, in this order
#
#   check    the tests that compare another device with the CPU, on the real one
#   train    NET (cifar10-base) trained as far as the time goes, from its checkpoint
#   tables   CHAPTERS (17 10 11 12) at full size, one after the other, in slices
#   bench    what sampling, the closed form and ART-RL cost there
#
# Each takes at most its share of what is left, stops by itself, and goes on where it
# was when it is asked for again. No Jupyter and no repository history is needed, only
# torch and what artlib imports; ARTLIB_COMMIT names the commit in the results. What was
# made lies in OUT (_build/gpu) as one archive in pieces of PIECE (15m), beside the log:
#
#   cat OUT/made.tar.gz.* | tar -xzf -
#
# unpacks it in the clone. MORE are further arguments of the training, such as
# "--steps 4 --batch 2" to try all of this on a CPU.

set -u
cd "$(dirname "$0")/.." || exit 1
case ${1:-} in
'' | *[!0-9]*)
	sed -n '3,5p' "$0" | cut -c3- >&2
	exit 2
	;;
esac
END=$(($(date +%s) + $1))
shift
[ $# -gt 0 ] || set -- check train tables bench
for task in "$@"; do
	case $task in
	check | train | tables | bench) ;;
	*)
		echo "unknown task $task: there are check, train, tables, bench" >&2
		exit 2
		;;
	esac
done
PYTHON=${PYTHON:-python3}
NET=${NET:-cifar10-base}
CHAPTERS=${CHAPTERS:-17 10 11 12}
OUT=${OUT:-_build/gpu}
PIECE=${PIECE:-15m}
STATE=_build/zoo
PAUSED=75 # the status of tools/run_chapter.py when its time was over
export PYTHONPATH=. PYTHONUNBUFFERED=1
mkdir -p "$OUT" "$STATE" || exit 1
STAMP=$OUT/.begin
: >"$STAMP" || exit 1
SUMMARY=

left() {
	echo $((END - $(date +%s)))
}

share() { # of what is left, in per cent, but at least one second
	seconds=$(($(left) * $1 / 100))
	echo $((seconds > 1 ? seconds : 1))
}

check() {
	timeout -k 5 "$1" "$PYTHON" -m pytest -q -p no:cacheprovider \
		${CHECKS:-tests/test_other_device.py tests/test_precision.py}
}

train() {
	# On an H200 cifar10-base learns 30,000 images a second and compiled 45,000, but the
	# compiler takes 50 s: it pays from 150 s on.
	compile=
	[ "$1" -lt 150 ] || compile=--compile
	# shellcheck disable=SC2086  # MORE is several arguments
	"$PYTHON" -m artlib.zoo.train "$NET" --fast $compile --seconds "$1" --quiet \
		--out "$STATE" --checkpoints "$STATE" ${MORE:-}
}

tables() {
	for chapter in $CHAPTERS; do
		[ "$(left)" -gt 5 ] || return $PAUSED
		ARTLIB_FULL=1 "$PYTHON" tools/run_chapter.py "$chapter" --seconds "$(share 60)"
		status=$?
		[ $status -eq 0 ] || [ $status -eq $PAUSED ] || return $status
		[ $status -eq 0 ] || stopped=$PAUSED
	done
	return ${stopped:-0}
}

bench() {
	timeout -k 5 "$1" "$PYTHON" ${BENCH:-tools/bench.py}
}

part_of() { # of the time that is left when its turn comes, in per cent
	case $1 in
	check) echo 20 ;;
	train) echo 50 ;;
	tables) echo 80 ;;
	bench) echo 95 ;;
	esac
}

echo "== plan: $* in $(left) s on $("$PYTHON" -c '
import torch
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU")')"
failed=0
for task in "$@"; do
	if [ "$(left)" -le 5 ]; then
		SUMMARY="$SUMMARY$task: not begun, the time is over\n"
		continue
	fi
	seconds=$(share "$(part_of "$task")")
	began=$(date +%s)
	echo "== $task, $seconds s"
	"$task" "$seconds" >"$OUT/$task.log" 2>&1
	status=$?
	tail -n 5 "$OUT/$task.log"
	case $status in
	0) how=done ;;
	"$PAUSED" | 124) how="stopped, more is left" ;;
	*)
		how="FAILED with status $status, see $OUT/$task.log"
		failed=1
		;;
	esac
	SUMMARY="$SUMMARY$task: $how, $(($(date +%s) - began)) s\n"
done
rm -f "$OUT"/made.tar.gz.*
find notebooks/results "$STATE" _build -maxdepth 1 -type f -newer "$STAMP" |
	sort -u >"$OUT/.made"
if [ -s "$OUT/.made" ]; then
	tar -czf - -T "$OUT/.made" | split -b "$PIECE" -d - "$OUT/made.tar.gz."
fi
echo "== summary"
printf "%b" "$SUMMARY"
echo "made: $(wc -l <"$OUT/.made") files, in $OUT"
rm -f "$STAMP" "$OUT/.made"
exit $failed
