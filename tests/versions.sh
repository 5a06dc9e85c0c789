#!/usr/bin/env bash
# Do the tests pass wherever people are? Run by hand: bash tests/versions.sh
# On Python 3.10 to 3.13 with what pip takes today, and on 3.10 with the oldest versions that
# requirements.txt names. It needs commands python3.10 to python3.13, and 6 GB of the disk.
set -eu
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git clone -q . "$folder/clone"
cd "$folder/clone"
sed 's/>=/==/' requirements.txt > "$folder/oldest"
touch "$folder/newest"
for each in 3.10-newest 3.11-newest 3.12-newest 3.13-newest 3.10-oldest; do
    echo "Python $each"
    "python${each%-*}" -m venv --clear .venv
    .venv/bin/pip install -q -r tests/requirements.txt -c "$folder/${each#*-}"
    .venv/bin/python -m pytest -q -rs tests -W ignore || status=1
done
exit "${status:-0}"
