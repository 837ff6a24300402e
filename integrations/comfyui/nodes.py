"""The two nodes: one loads weights, one restores images. Images are ComfyUI's, tensors (B, H, W, 3) in [0, 1]."""

from typing import Any

import torch

FOLDER = "upscale_models"
"""ComfyUI's folder of files that restore or enlarge images."""


def _files() -> list[str]:
    import folder_paths  # pyright: ignore[reportMissingImports]  # ComfyUI's own

    return folder_paths.get_filename_list(FOLDER)


class LoadSerpent:
    """Loads weights that ship with serpent-ir, or a file of `upscale_models` that `serpent_ir.load_model` takes."""

    CATEGORY = "image/serpent-ir"
    FUNCTION = "load"
    RETURN_TYPES = ("SERPENT_RESTORER",)
    RETURN_NAMES = ("restorer",)
    DESCRIPTION = "Loads a network that restores images: Serpent, SwinIR, Restormer, MambaIR and its kin, or another's."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  # ComfyUI's name
        from serpent_ir import list_models

        return {"required": {"weights": ([*list_models(pretrained=True), *_files()],)}}

    def load(self, weights: str) -> tuple[Any]:
        from serpent_ir import Restorer, create_model, list_models, load_model

        if weights in list_models(pretrained=True):
            return (Restorer(create_model(weights, pretrained=True)),)
        import folder_paths  # pyright: ignore[reportMissingImports]

        return (Restorer(load_model(folder_paths.get_full_path(FOLDER, weights))),)


class RestoreWithSerpent:
    """Restores each image of a batch; the result is as many times larger as the network makes it."""

    CATEGORY = "image/serpent-ir"
    FUNCTION = "restore"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    DESCRIPTION = "Restores images, whole where they fit in memory and else in seamless tiles."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"restorer": ("SERPENT_RESTORER",), "image": ("IMAGE",)}}

    def restore(self, restorer: Any, image: torch.Tensor) -> tuple[torch.Tensor]:
        restored = restorer(image.movedim(-1, 1).float())
        return (restored.movedim(1, -1).clamp(0, 1).cpu().contiguous(),)


NODE_CLASS_MAPPINGS = {"LoadSerpent": LoadSerpent, "RestoreWithSerpent": RestoreWithSerpent}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadSerpent": "Load serpent-ir weights", "RestoreWithSerpent": "Restore (serpent-ir)"}
