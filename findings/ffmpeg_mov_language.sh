#!/bin/bash
# FFmpeg's QuickTime muxer (through PyAV 18.1.0, FFmpeg 8.1.2) keeps a track's language by one of the two codes that
# ISO 639-2 has for it: "ger" and "fra" come back from a .mov, "deu" and "fre" are dropped without an error or a warning;
# .mp4 keeps all four. Seen: mov {'ger': 'ger', 'deu': None, 'fra': 'fra', 'fre': None}; mp4 all as they were.
set -e
D=$(mktemp -d); trap 'rm -rf "$D"' EXIT
python3 -m venv "$D/venv"
"$D/venv/bin/pip" -q install av==18.1.0 numpy
cd "$D"
venv/bin/python - <<'P'
import sys
import av, numpy as np
seen = {}
for container in ("mov", "mp4"):
    for language in ("ger", "deu", "fra", "fre"):
        name = f"{language}.{container}"
        with av.open(name, "w", format=container) as file:
            video = file.add_stream("mpeg4", rate=10)
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            video.metadata["language"] = language
            file.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
            file.mux(video.encode(None))
        with av.open(name) as file:
            seen.setdefault(container, {})[language] = file.streams[0].metadata.get("language")
print(av.__version__, seen)
expected = {"mov": {"ger": "ger", "deu": None, "fra": "fra", "fre": None}, "mp4": {c: c for c in ("ger", "deu", "fra", "fre")}}
sys.exit(seen != expected)
P
