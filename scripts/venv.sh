# SPDX-License-Identifier: Apache-2.0
# Sourced by the other scripts: makes a virtual environment with the pinned
# dependencies and this source tree, once, and again after they change.

# make_venv FOLDER PYTHON LOCK [PIP_ARGUMENT ...]
make_venv() {
  local folder=$1 python=$2 lock=$3
  shift 3
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $python is $("$python" -V 2>&1); Python 3.11 or newer is" \
      "needed. Set PYTHON to one." >&2
    return 1
  fi
  local here stamp
  here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  stamp=$(cat "$lock" <(echo "$here" "$@") | cksum | cut -d' ' -f1)
  stamp="$folder/.installed-$stamp"
  [ -e "$stamp" ] && return
  echo "Installing the pinned dependencies into ${folder#"$PWD"/} (once) ..." >&2
  "$python" -m venv "$folder"
  # Python compiles what is imported; of all that is installed, that is little.
  "$folder/bin/pip" install --quiet --disable-pip-version-check --no-compile \
    -r "$lock" "$@" 2> "$folder/install.log" || {
      cat "$folder/install.log" >&2
      echo "error: the dependencies could not be installed, see above." >&2
      return 1
    }
  echo "$here" > "$("$folder/bin/python" -c \
    'import sysconfig; print(sysconfig.get_path("purelib"))')/sarathi_jax.pth"
  touch "$stamp"
}

# A Python that takes the newest JAX: $PYTHON, or one of 3.12 or newer. Nothing
# if there is none.
newest_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    echo "$PYTHON"
    return
  fi
  for candidate in python3.13 python3.12 \
      "$HOME"/.pyenv/versions/3.1[23]*/bin/python3; do
    if "$candidate" -c '' 2> /dev/null; then
      echo "$candidate"
      return
    fi
  done
}

# The JAX plugin for an NVIDIA GPU, where there is one.
gpu_plugin() {
  if command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; then
    local jax
    jax=$("$1/bin/python" -c 'import jax; print(jax.__version__)')
    local cuda=cuda13
    case $jax in 0.10.*) cuda=cuda12 ;; esac
    "$1/bin/python" -c "import jax_${cuda}_plugin" 2> /dev/null || {
      echo "Installing JAX's $cuda plugin (once) ..." >&2
      "$1/bin/pip" install --quiet "jax[$cuda]==$jax"
    }
  fi
}
