# shellcheck shell=bash
# The environment that setup_env.sh made; nothing where the Python in force has what is needed already.
has_torch() { python -c 'import sys, importlib.util as u; sys.exit(u.find_spec("torch") is None)' 2>/dev/null; }
# shellcheck source=/dev/null
if ! has_torch && [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi
if ! has_torch && command -v conda >/dev/null; then
  eval "$(conda shell.bash hook)"
  conda activate DiT
fi
has_torch || { echo "no Python with torch: run 'bash setup_env.sh' once, then submit from the folder that it is in" >&2; exit 2; }
