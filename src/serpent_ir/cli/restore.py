"""serpent restore."""

from serpent_ir.cli.files import convert_files, plan_files
from serpent_ir.cli.shell import Device, Inputs, Name, Output, Weights, model_name, shell_command
from serpent_ir.errors import UsageError


@shell_command("Restore images. Outputs keep size (with sr8, 8 times that), depth, format and metadata.")
def restore(
    inputs: Inputs, output: Output, name: Name = None, weights: Weights = None, device: Device = "auto"
) -> None:
    """Restore image files and folders of them into a folder, or one file into one file.

    A folder is mirrored under `output`, subfolders too. A file that fails is reported on stderr, the others are done.
    Formats that are read but not written become PNG.

    Args:
        inputs: files and folders.
        output: folder, made if missing; or, for one input file, a file with the suffix of an image.
        name: weights that ship (default `serpent_l.deblur`), or the network that `weights` are for.
        weights: safetensors file; without `name`, its metadata says the network.
        device: as `serpent_ir.inference.pick_device` takes it.

    Raises:
        UsageError: before any work, for a missing path, a folder without images, an unknown name or device, or outputs
            that would overwrite an input or each other.
        SerpentError: at the end, where files failed.
    """
    from serpent_ir.degradations import create_degradation
    from serpent_ir.inference import pick_device, restore_picture
    from serpent_ir.models import create_model

    pairs = plan_files(inputs, output)
    name = model_name(name, weights)
    model = create_model(name, pretrained=weights is None, checkpoint_path=weights)
    task = getattr(model.config, "task", "")
    if not task:
        raise UsageError(f"{weights}: does not say which task it is for; name it with -n, as {name}.deblur")
    create_degradation(task)  # an unknown one is no fault of an image
    model = model.to(pick_device(device))
    convert_files(pairs, lambda _, picture: restore_picture(picture, model), "restored")
