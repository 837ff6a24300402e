"""Put the page of docs/browser together with a network and onnxruntime-web, as static files for any file server.

    npm install onnxruntime-web
    python tools/browser_page.py site/browser --ort node_modules/onnxruntime-web/dist

The network is exported for any size with its weights as float16, unless --model names an ONNX file that is there.
"""

import argparse
import shutil
import sys
from pathlib import Path

from serpent_ir.errors import SerpentError
from serpent_ir.export import export

PAGE = Path(__file__).parents[1] / "docs" / "browser"
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder to write; it is made")
    parser.add_argument("--ort", type=Path, required=True, help="the folder dist of npm's onnxruntime-web")
    parser.add_argument("--name", default="serpent_l.photo", help="the network")
    parser.add_argument("--model", type=Path, help="an ONNX file instead of a network")
    arguments = parser.parse_args()
    if missing := [name for name in RUNTIME if not (arguments.ort / name).is_file()]:
        sys.exit(f"{arguments.ort}: has no {missing[0]}; npm install onnxruntime-web, and name its folder dist")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for file in (*PAGE.iterdir(), *(arguments.ort / name for name in RUNTIME)):
        shutil.copy(file, arguments.out)
    if arguments.model:
        shutil.copy(arguments.model, arguments.out / "network.onnx")
        return
    try:
        export(arguments.name, arguments.out / "network.onnx", dynamic=True, half=True)
    except SerpentError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
