"""The page of docs/browser in headless Chromium, from a plain file server: its pixels, and what it says of files."""

import functools
import http.server
import io
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from serpent_ir.export import export_network
from serpent_ir.image.tensors import to_tensor
from serpent_ir.models.serpent import Serpent, SerpentConfig

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ROOT = Path(__file__).parents[1]
ORT = Path(os.environ.get("ONNXRUNTIME_WEB", ROOT / "node_modules/onnxruntime-web/dist"))


def drawing(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / (7 + c) + y / (11 - c)) for c in range(3)]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


class Quiet(http.server.SimpleHTTPRequestHandler):
    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}  # noqa: RUF012

    def log_message(self, format, *args):
        pass


@pytest.mark.slow
def test_the_page(tmp_path):
    pytest.importorskip("onnxruntime", reason="pip install 'serpent-ir[export]'")
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium (or any that is on the PATH)")
    if not (ORT / "ort.wasm.min.mjs").is_file():
        pytest.skip("no onnxruntime-web here: npm install onnxruntime-web, or name its dist in ONNXRUNTIME_WEB")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Serpent(SerpentConfig(patch_size=4, dim=8, blocks=(1,), task="photo")).eval()
    export_network(model, tmp_path / "x.onnx", dynamic=True, size=16)
    page_files = tmp_path / "page"
    command = [sys.executable, str(ROOT / "tools/browser_page.py"), str(page_files), "--ort", str(ORT)]
    subprocess.run([*command, "--model", str(tmp_path / "x.onnx")], check=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=page_files))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    image = drawing(512, 384)
    with torch.no_grad():
        expected = (model(to_tensor(np.asarray(image)))[0].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    try:
        with api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            context = browser.new_context()
            page = context.new_page()
            page.goto(f"http://127.0.0.1:{server.server_port}/index.html")
            page.get_by_text("Ready.").wait_for()
            context.set_offline(True)  # nothing else is fetched once the page is there
            chosen = page.locator("#file")
            for name, content, message in [
                ("broken.png", b"no picture", "is not a picture that this browser reads"),
                ("huge.png", png(Image.new("L", (6000, 4001))), "has 24 megapixels; this page takes 24"),
            ]:
                chosen.set_input_files({"name": name, "mimeType": "image/png", "buffer": content})
                page.get_by_role("alert").get_by_text(message).wait_for()
            chosen.set_input_files({"name": "photo.png", "mimeType": "image/png", "buffer": png(image)})
            page.get_by_text("Done.").wait_for()
            with page.expect_download() as download:
                page.locator("#download").click()
            restored = np.asarray(Image.open(download.value.path()).convert("RGB"))
            page.locator("#slider").fill("100")
            assert page.locator("#after").evaluate("e => e.style.clipPath") == "inset(0px 0px 0px 100%)"
            chosen.set_input_files({"name": "wide.png", "mimeType": "image/png", "buffer": png(drawing(1100, 300))})
            page.locator("#view").wait_for(state="hidden")
            page.get_by_text("Done.").wait_for()
            assert page.locator("#after").evaluate("e => [e.width, e.height]") == [1100, 300]
            browser.close()
    finally:
        server.shutdown()
        server.server_close()
    assert np.abs(restored.astype(int) - expected.astype(int)).max() <= 1
