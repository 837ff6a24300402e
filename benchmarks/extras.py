"""Seconds per frame of `serpent video`, and milliseconds of exported files compared with PyTorch, on this CPU.

python benchmarks/extras.py [--name serpent_l.deblur] [--frames 24] [--size 1280x720] --out FILE.json

Both run in separate processes. The clip is a moving photo with a tone, made here; its file is H.264 at 24 frames/s.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from skimage import data

from serpent_ir.export import export


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="serpent_l.deblur")
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--size", default="1280x720", help="WIDTHxHEIGHT")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    row = {"name": args.name, "machine": platform.processor() or platform.machine(), "system": platform.platform()}
    with tempfile.TemporaryDirectory() as folder:
        clip, target = Path(folder, "clip.mp4"), Path(folder, "restored.mp4")
        make_clip(clip, args.frames, width, height)
        call = [sys.executable, "-m", "serpent_ir.cli", "video", clip, "-o", target, "-n", args.name]
        start = time.perf_counter()
        subprocess.run([*call, "--device", "cpu"], check=True)
        seconds = time.perf_counter() - start
        video = {"frames": args.frames, "width": width, "height": height, "seconds": seconds}
        row["video"] = {**video, "bytes_written": target.stat().st_size}
        for format in ("onnx", "pt2"):
            start = time.perf_counter()
            file = Path(folder, f"network.{format}")
            _, checks = export(args.name, file, format=format, dynamic=True)
            row[format] = {"export_seconds": time.perf_counter() - start, "bytes": file.stat().st_size}
            row[format]["checks"] = [vars(check) for check in checks]
    args.out.write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row, indent=1))


def make_clip(path: Path, frames: int, width: int, height: int) -> None:
    photo = np.tile(data.astronaut(), (-(-(height + frames) // 512), -(-(width + frames) // 512), 1))
    with av.open(str(path), "w") as file:
        video = file.add_stream("libx264", rate=24, options={"crf": "18"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        audio = file.add_stream("aac", rate=48000, layout="stereo")
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(photo[i : i + height, i : i + width]), "rgb24")
            file.mux(video.encode(frame))
        file.mux(video.encode(None))
        for i in range(frames * 2000 // 1024):
            wave = 0.3 * np.sin(2 * np.pi * 440 * (np.arange(1024) + i * 1024) / 48000).astype(np.float32)
            tone = av.AudioFrame.from_ndarray(np.stack([wave, wave]), format="fltp", layout="stereo")
            tone.rate, tone.pts, tone.time_base = 48000, i * 1024, Fraction(1, 48000)
            file.mux(audio.encode(tone))
        file.mux(audio.encode(None))


if __name__ == "__main__":
    main()
