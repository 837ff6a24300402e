"""What `import serpent_ir` brings and costs, and what an installation offers."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

import serpent_ir

HEAVY = {"triton", "gradio", "accelerate", "matplotlib", "torchmetrics", "cv2", "typer", "yaml"}


def run(*command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def loaded_by(statement: str) -> set[str]:
    """Top-level packages that a new Python has loaded after a statement."""
    return set(
        run(sys.executable, "-c", f"{statement}\nimport sys; print(*{{m.split('.')[0] for m in sys.modules}})").split()
    )


def test_import_loads_nothing_but_itself():
    brought = loaded_by("import serpent_ir") - loaded_by("pass") - sys.stdlib_module_names
    assert brought == {"serpent_ir"}


def test_public_names_resolve_without_what_they_do_not_need():
    assert set(serpent_ir.__all__) <= set(dir(serpent_ir))
    loaded = loaded_by("from serpent_ir import *")
    assert "torch" in loaded
    # The scan's FLOP formula and the hub's mixin bring Triton and PyYAML themselves, where those are installed.
    by_others = loaded_by("import torch.utils.flop_counter; from huggingface_hub import PyTorchModelHubMixin")
    assert not (loaded - by_others) & HEAVY


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'serpent_ir' has no attribute 'serpent'"):
        _ = serpent_ir.serpent


def test_the_installed_command():
    version = importlib.metadata.version("serpent-ir")
    assert version == serpent_ir.__version__
    assert run(str(Path(sys.executable).parent / "serpent"), "--version") == f"serpent {version}\n"


@pytest.mark.parametrize(("words", "status", "printed"), [(["--version"], 0, "serpent "), (["restore"], 2, "")])
def test_the_command_ends_early_but_not_before_its_output_and_what_is_to_be_done_at_the_end(words, status, printed):
    code = "import atexit, sys; atexit.register(print, 'the end'); from serpent_ir.__main__ import main; main()"
    ended = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert ended.returncode == status
    assert ended.stdout.startswith(printed)
    assert ended.stdout.endswith("the end\n")
    assert bool(ended.stderr) == bool(status)
