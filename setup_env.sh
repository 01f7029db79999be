#!/usr/bin/env bash
# Make the environment of this project, on a cluster or at home; start it again at any time.
#   bash setup_env.sh            with conda (environment.yml, named DiT) where there is one, else a venv in .venv
#   bash setup_env.sh venv       a venv in any case; `bash setup_env.sh conda` likewise
# The batch scripts in slurm/ find either of them by themselves.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

die() { echo "setup_env.sh: $1" >&2; exit 2; }
fits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

kind=${1-}
if [ -z "$kind" ]; then if command -v conda >/dev/null; then kind=conda; else kind=venv; fi; fi
case $kind in
  conda)
    command -v conda >/dev/null || die "there is no conda here; load or install it, or take: bash setup_env.sh venv"
    if conda env list | grep -qE '^DiT[[:space:]]'; then conda env update --name DiT --file environment.yml
    else conda env create --file environment.yml; fi
    python=(conda run --name DiT python) activate="conda activate DiT";;
  venv)
    if ! { [ -x .venv/bin/python ] && .venv/bin/python -m pip --version >/dev/null 2>&1; }; then
      for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do if fits "$p"; then break; fi; done
      fits "$p" || die "Python 3.10 or later is needed and not found; load or install it"
      "$p" -m venv --clear .venv || die "$p cannot make a venv (on Debian and Ubuntu: apt install python3-venv)"
    fi
    .venv/bin/python -m pip install --editable '.[dev]'
    python=(.venv/bin/python) activate=". .venv/bin/activate";;
  *) die "conda or venv, got $kind";;
esac

"${python[@]}" -c 'import torch, mixmix_nb; print("torch", torch.__version__, "with", torch.cuda.device_count(), "GPUs here; mixmix_nb", mixmix_nb.__version__)'
echo "ready. At home:       $activate && python -m mixmix_nb.train"
echo "       On a cluster:  sbatch slurm/train.sh --data-path my/images"
