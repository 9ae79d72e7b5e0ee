# Install some extras by themselves, with the lowest versions that they admit, into .venv/lowest:
# sh tests/install_lowest.sh PYTHON EXTRA ...
set -eu
python=$1
shift
rm -rf .venv/lowest
"$python" -m venv .venv/lowest
"$python" tests/lowest.py "$@" > .venv/lowest/constraints.txt
extras=$(echo "$*" | tr " " ",")
.venv/lowest/bin/python -m pip install --quiet --constraint .venv/lowest/constraints.txt ".[$extras]"
