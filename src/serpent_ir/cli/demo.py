"""The command `serpent demo`: serves the web page on this machine."""

from typing import Annotated

import typer

from serpent_ir.cli.files import terminated_like_interrupted
from serpent_ir.cli.shell import Device, shell_command


@shell_command("Serve a web page that restores photos. Only this machine can reach it unless --host says otherwise.")
def demo(
    host: Annotated[str, typer.Option(help="Address to serve on; 0.0.0.0 means all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve on.")] = 7860,
    device: Device = "auto",
    max_megapixels: Annotated[float, typer.Option(min=0.01, help="Largest restored image.")] = 16.0,
    max_seconds: Annotated[float, typer.Option(min=0.01, help="Longest time that one image may take.")] = 120.0,
) -> None:
    """Serve the page of `serpent_ir.demo` until it is interrupted."""
    from serpent_ir.demo import Limits, serve
    from serpent_ir.inference import pick_device

    pick_device(device)  # raises if there is no such device
    with terminated_like_interrupted():  # so that the temporary folder is removed
        serve(host=host, port=port, device=device, limits=Limits(max_megapixels, max_seconds))
