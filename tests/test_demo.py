"""The page, driven in a real browser against a real server."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage import data

from serpent_ir.demo import Limits, _without_proxies, degrade_and_restore, restore_upload
from serpent_ir.errors import ImageError

PATIENCE = 180  # seconds for what takes one or two: beside other work the first image takes half a minute
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_the_page_has_the_word_that_the_command_has(tmp_path):
    Image.new("CMYK", (24, 16)).save(tmp_path / "print.jpg")
    result = restore_upload(tmp_path / "print.jpg", tmp_path, "deblur", "serpent_l", "cpu", Limits())
    first, note = result.told.split("\n\n")
    assert first.startswith("24x16 pixels in ")
    assert note.startswith("Note: is CMYK without a usable colour profile; converted to RGB")


def test_another_strength_does_not_run_the_network_again(tmp_path, monkeypatch):
    from serpent_ir import demo
    from serpent_ir.cli import restore

    runs: list[str] = []
    of = demo.Restoration.of
    monkeypatch.setattr(demo.Restoration, "of", lambda *args: (runs.append(""), of(*args))[1])
    photo, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    Image.fromarray(data.astronaut()[60:92, 160:201]).save(photo)
    Image.fromarray((np.arange(32 * 41).reshape(32, 41) < 640).astype(np.uint8) * 255).save(mask)
    for strength, protect in ((1.0, None), (0.5, None), (1.4, mask)):
        restore([photo], tmp_path / "command.png", name="serpent_b.deblur", strength=strength, protect=protect)
        result = restore_upload(
            photo, tmp_path, "deblur", "serpent_b", "cpu", Limits(), strength=strength, protect=protect
        )
        made, wanted = (np.asarray(Image.open(file)).astype(int) for file in (result.file, tmp_path / "command.png"))
        assert np.abs(made - wanted).max() <= 1
        assert (made != wanted).mean() < 0.02
        assert (f"at a strength of {strength:g}" in result.told) == (strength != 1)
    assert len(runs) == 1
    mask.write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"^mask\.png: "):  # not where the server keeps it
        restore_upload(photo, tmp_path, "deblur", "serpent_b", "cpu", Limits(), protect=mask)
    Image.fromarray(data.astronaut()[60:92, 170:211]).save(photo)  # another photo of that name
    restore_upload(photo, tmp_path, "deblur", "serpent_b", "cpu", Limits())
    assert len(runs) == 2


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("gradio", reason="pip install 'serpent-ir[demo]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    command = [sys.executable, "-m", "serpent_ir.cli", "demo", "--port", str(port), "--max-megapixels", "0.3"]
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONWARNINGS": "ignore"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
    url = f"http://127.0.0.1:{port}"
    end = time.monotonic() + PATIENCE
    while "the page is at" not in (folder / "log").read_text():
        assert process.poll() is None, (folder / "log").read_text()
        if time.monotonic() > end:
            process.kill()
            pytest.fail(f"no page after {PATIENCE} s")
        time.sleep(0.1)
    yield url
    process.send_signal(signal.SIGTERM)
    process.wait(PATIENCE)
    assert "SerpentError" not in (folder / "log").read_text()  # what the page has told is no traceback here
    assert [path.name for path in folder.iterdir()] == ["log"]  # uploads and results went with the server


def test_the_page_starts_whatever_proxy_the_environment_names(tmp_path):
    """gradio asks its own address whether it is there, and would ask the proxy."""
    pytest.importorskip("gradio", reason="pip install gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    closed = "127.0.0.1:9"
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"http_proxy": f"http://{closed}", "ALL_PROXY": f"socks5://{closed}", "NO_PROXY": "example.org"}
    environment |= {"TMPDIR": str(tmp_path), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "serpent_ir.cli", "demo", "--port", str(port), "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as run:
        assert run.stdout
        said = run.stdout.readline()
        run.kill()
    assert said == f"serpent: the page is at http://127.0.0.1:{port}\n"


def test_the_environment_keeps_its_proxies(monkeypatch):
    """What the page starts later, and downloads for people, may need them."""
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="taken"), _without_proxies():
        assert not [name for name in os.environ if name.lower().endswith("_proxy")]
        raise OSError("taken")
    assert os.environ["HTTPS_PROXY"] == "http://127.0.0.1:9"


@pytest.mark.parametrize("name", [".png", "..png", "...", "photo", ".PNG"])
def test_names_that_are_all_suffix(name, tmp_path):
    photo, out = tmp_path / name, tmp_path / "out"
    out.mkdir()
    Image.new("RGB", (24, 16)).save(photo, format="PNG")
    for result in (
        restore_upload(photo, out, "deblur", "serpent_b", "cpu", Limits()),
        degrade_and_restore(photo, out, "deblur", "serpent_b", 0, "cpu", Limits()),
    ):
        assert result.file.name == "photo-restored.png"
        with Image.open(result.file) as image:
            assert image.size == (24, 16)


@pytest.fixture
def page(server):
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium (or any that is on the PATH)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 900})
        page.set_default_timeout(1000 * PATIENCE)
        page.goto(server)
        page.get_by_role("button", name="Restore", exact=True).wait_for()
        yield page
        browser.close()


def upload(page, where: str, file: Path) -> None:
    page.locator(f".{where} input[type=file]").set_input_files(file)
    page.locator(f".{where} .download-link").wait_for()


def test_a_photo_is_restored_as_the_command_does(page, tmp_path):
    from serpent_ir.cli import degrade, restore

    Image.fromarray(data.astronaut()[60:188, 160:300]).save(tmp_path / "clean.png", dpi=(300, 300))
    degrade([tmp_path / "clean.png"], tmp_path / "photo.png", task="deblur")
    deep = np.asarray(Image.open(tmp_path / "photo.png")).astype(np.uint16) * 257 + 3
    cv2.imwrite(str(tmp_path / "deep.png"), deep)
    for name in ("photo.png", "deep.png"):
        restore([tmp_path / name], tmp_path / f"by-command-{name}")  # both by default
        upload(page, "photo", tmp_path / name)
        page.get_by_role("button", name="Restore", exact=True).click()
        page.locator(".told").get_by_text("140x128 pixels in").wait_for()
        page.locator(".result").get_by_text(name.removesuffix(".png") + "-restored").wait_for()
        with page.expect_download() as download:
            page.locator(".result .download-link").first.click()
        assert Path(download.value.path()).read_bytes() == (tmp_path / f"by-command-{name}").read_bytes()
        images = page.get_by_test_id("imageslider-image")
        assert images.count() == 2
        widths = images.evaluate_all("all => all.map(image => [image.naturalWidth, image.src])")
        assert [width for width, _ in widths] == [140, 140]
        assert widths[0][1] != widths[1][1]
        assert images.first.is_visible()
        page.locator(".photo button[aria-label='Clear']").first.click()


def test_the_slider_blends_what_is_restored(page, tmp_path):
    from serpent_ir.cli import restore

    Image.fromarray(data.astronaut()[60:124, 160:230]).save(tmp_path / "photo.png")
    restore([tmp_path / "photo.png"], tmp_path / "none.png", strength=0)
    assert page.get_by_label("Strength").count() == 0 or not page.get_by_label("Strength").first.is_visible()
    upload(page, "photo", tmp_path / "photo.png")
    page.get_by_role("button", name="Restore", exact=True).click()
    page.locator(".told").get_by_text("70x64 pixels in").wait_for()
    slider = page.locator(".strength input[type=range]")
    slider.wait_for()
    slider.focus()
    page.keyboard.press("Home")  # strength 0
    slider.dispatch_event("pointerup")
    page.locator(".told").get_by_text("at a strength of 0").wait_for()
    with page.expect_download() as download:
        page.locator(".result .download-link").first.click()
    assert Path(download.value.path()).read_bytes() == (tmp_path / "none.png").read_bytes()


def test_an_upload_whose_name_is_all_suffix_is_restored(page, tmp_path):
    for width, name in ((40, ".png"), (41, "..png")):
        Image.fromarray(data.astronaut()[60:92, 160 : 160 + width]).save(tmp_path / name, format="PNG")
        upload(page, "photo", tmp_path / name)
        page.get_by_role("button", name="Restore", exact=True).click()
        page.locator(".told").get_by_text(f"{width}x32 pixels in").wait_for()
        with page.expect_download() as download:
            page.locator(".result .download-link").first.click()
        with Image.open(download.value.path()) as image:
            assert (image.format, image.size) == ("PNG", (width, 32))
        page.locator(".photo button[aria-label='Clear']").first.click()


def test_degrade_and_restore_tells_the_gain(page, tmp_path):
    Image.fromarray(data.astronaut()[60:188, 160:288]).save(tmp_path / "clean.png")
    page.get_by_role("tab", name="Degrade and restore").click()
    upload(page, "clean", tmp_path / "clean.png")
    page.get_by_role("radio", name=re.compile("^Blurred")).check()
    page.get_by_role("button", name="Degrade and restore").click()
    told = page.locator(".told").get_by_text("PSNR")
    told.wait_for()
    before, after = re.findall(r"([\d.]+) dB", told.inner_text())
    assert float(after) > float(before) + 3


def test_an_example_is_taken_by_a_click(page):
    """With its task, for which the page takes the network that the command takes."""
    page.get_by_text("chelsea-sr8.png").click()
    page.locator(".photo .download-link").wait_for()
    page.get_by_role("button", name="Restore", exact=True).click()
    page.locator(".told").get_by_text("by serpent_l.sr8").wait_for()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("text.png", b"this is not an image", "text.png: "),
        ("short.png", None, "short.png: is damaged or cut short"),
        ("large.png", (900, 400), "large.png: 900x400 px is over this page's 0.3 megapixels"),
    ],
)
def test_a_bad_upload_shows_a_message(page, tmp_path, name, content, told):
    Image.fromarray(data.astronaut()[:40, :50]).save(tmp_path / "good.png")
    upload(page, "photo", tmp_path / "good.png")
    page.get_by_role("button", name="Restore", exact=True).click()
    page.locator(".told").get_by_text("50x40 pixels in").wait_for()
    page.locator(".photo button[aria-label='Clear']").first.click()
    page.locator(".result .download-link").wait_for(state="detached")  # nor is it beside the message
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        Image.new("RGB", content).save(file)
    else:
        Image.fromarray(data.astronaut()[:90, :90]).save(file)
        file.write_bytes(file.read_bytes()[:-3000])
    upload(page, "photo", file)
    page.get_by_role("button", name="Restore", exact=True).click()
    toast = page.get_by_test_id("toast-body")
    toast.wait_for()
    assert told in toast.inner_text()
    assert str(tmp_path.parent) not in toast.inner_text()
    assert "/tmp" not in toast.inner_text()


def test_nothing_else_of_the_server_can_be_read(server, tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8), "red").save(secret)
    for path in (
        "/etc/passwd",
        str(secret),
        "log",
        "../log",
        "../../../../../../etc/passwd",
        "..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
        "%2fetc%2fpasswd",
        "//etc/passwd",
        f"file://{secret}",
        str(Path(sys.executable).parent.parent / "pyvenv.cfg"),
    ):
        for route in ("gradio_api/file=", "file=", "static/", "assets/", "gradio_api/proxy="):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{server}/{route}{path}")
            refused.value.close()
            assert refused.value.code in (400, 403, 404, 405)
    # A call that names a file of the server as if it had been uploaded.
    with urllib.request.urlopen(f"{server}/config") as answer:
        config = json.load(answer)
    for function in config["dependencies"]:
        if not function["inputs"]:  # what empties the outputs has nothing to read
            continue
        for file in (str(secret), "/etc/passwd"):
            inputs = [{"path": file, "meta": {"_type": "gradio.FileData"}}, "deblur", "serpent_l", 0]
            body = {"data": inputs[: len(function["inputs"])], "fn_index": function["id"], "session_hash": "s"}
            request = urllib.request.Request(
                f"{server}/gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            urllib.request.urlopen(request).close()
            with urllib.request.urlopen(f"{server}/gradio_api/queue/data?session_hash=s", timeout=PATIENCE) as events:
                (end,) = [line.decode() for line in events if b"process_completed" in line]
            assert '"success":false' in end.replace(" ", "")
            assert "gradio_api" not in end
