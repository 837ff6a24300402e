#!/usr/bin/env bash
# brisque 0.2.0 (PyPI, February 2026, "numpy>=1.20") scores no image beside NumPy 2.4: `BRISQUE().score(image)` raises
# TypeError, since it passes arrays of one element to float(), which NumPy 2.4 refuses. Beside NumPy 2.3 it gives a score.
# Seen: "2.3.5 astronaut 10.795", "2.4.6 TypeError: only 0-dimensional arrays can be converted to Python scalars".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" install -q --disable-pip-version-check)
"${pip[@]}" "brisque[opencv-python-headless]==0.2.0" scikit-image==0.26.0 scipy==1.17.1 numpy==2.3.5
cat > "$folder/score.py" <<'PY'
import warnings

import numpy as np

warnings.simplefilter("ignore")
from brisque import BRISQUE
from skimage import data

try:
    print(np.__version__, "astronaut", round(BRISQUE(url=False).score(data.astronaut()), 3))
except TypeError as error:
    print(np.__version__, "TypeError:", error)
PY
before=$("$folder/venv/bin/python" "$folder/score.py")
"${pip[@]}" numpy==2.4.6
after=$("$folder/venv/bin/python" "$folder/score.py")
echo "$before"
echo "$after"
[[ $before == "2.3.5 astronaut 10.795" && $after == "2.4.6 TypeError: only 0-dimensional arrays"* ]]
