#!/bin/sh
# Installs ckptfuse from its source into a new virtual environment, with the versions of
# constraints.txt and no others: what both images do, and what works on a machine without images.
#
#   infra/images/install.sh SOURCE VENV [EXTRA,...]
#
# Extras: server (what Prefect's and MLflow's servers need for PostgreSQL and Redis), kubernetes
# (the worker that starts jobs there). Which build of torch it becomes is up to pip's settings: with
# PIP_EXTRA_INDEX_URL of the CPU builds those, else the ordinary one; its own metadata pin the CUDA
# libraries that it needs, so they need no line in constraints.txt.
set -eu

if [ $# -lt 2 ]; then
    echo "usage: $0 SOURCE VENV [EXTRA,...]" >&2
    exit 2
fi
source=$1
venv=$2
extras=${3:-}
constraints=$source/constraints.txt

python3 -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# pip and the build backend first: without build isolation no newer setuptools gets in.
pip install --quiet -c "$constraints" pip setuptools
pip install --quiet -c "$constraints" --no-build-isolation "$source${extras:+[$extras]}"
pip check
