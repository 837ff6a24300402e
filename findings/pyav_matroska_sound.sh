#!/bin/bash
# PyAV 18.1.0 asks a muxer what it takes by FFmpeg's normal rule, by which Matroska has no sound of Windows Media or
# ADPCM, though `ffmpeg -c copy` writes both there (as A_MS/ACM). FFmpeg's tee has no rule: through it PyAV's copy works.
# Seen: matroska refused ("format does not support"), tee copied 5 packets that read back the same.
set -e
D=$(mktemp -d); trap 'rm -rf "$D"' EXIT
python3 -m venv "$D/venv"
"$D/venv/bin/pip" -q install av==18.1.0 numpy
cd "$D"
venv/bin/python - <<'P'
import sys
from fractions import Fraction
import av, numpy as np
with av.open("in.avi", "w") as file:
    sound = file.add_stream("adpcm_ima_wav", rate=44100, layout="mono")
    for i in range(5):
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 2041), np.int16), format="s16p", layout="mono")
        tone.sample_rate, tone.pts, tone.time_base = 44100, 2041 * i, Fraction(1, 44100)
        file.mux(sound.encode(tone))
    file.mux(sound.encode(None))
def copy(name, **how):
    with av.open("in.avi") as old, av.open(name, "w", **how) as new:
        stream = new.add_stream_from_template(old.streams.audio[0])
        for packet in old.demux(audio=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
try:
    copy("plain.mkv", format="matroska")
    refused = ""
except ValueError as error:
    refused = str(error)
with open("tee.mkv", "wb") as out:
    copy("[f=matroska]x", format="tee", io_open=lambda *_: out)
packets = []
for name in ("in.avi", "tee.mkv"):
    with av.open(name) as file:
        packets.append([bytes(packet) for packet in file.demux(audio=0) if packet.size])
print(av.__version__, repr(refused), len(packets[1]), packets[0] == packets[1])
sys.exit("does not support" not in refused or packets[0] != packets[1])
P
