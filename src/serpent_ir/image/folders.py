"""The image files of a folder."""

from pathlib import Path

from serpent_ir.errors import UsageError

# What counts as an image in a folder. A file that is named is read whatever its suffix is.
SUFFIXES = frozenset(
    [
        ".apng",
        ".avif",
        ".bmp",
        ".dds",
        ".dib",
        ".gif",
        ".heic",
        ".heif",
        ".hif",
        ".ico",
        ".j2c",
        ".j2k",
        ".jfif",
        ".jp2",
        ".jpc",
        ".jpe",
        ".jpeg",
        ".jpf",
        ".jpg",
        ".jpx",
        ".mpo",
        ".pbm",
        ".pcx",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".qoi",
        ".sgi",
        ".tga",
        ".tif",
        ".tiff",
        ".webp",
    ]
)


def find_images(folder: Path) -> list[Path]:
    """All image files under a folder, subfolders included, in the order of their paths.

    Not those that macOS puts beside each on other disks, `._NAME`, which hold its notes and no pixels.

    Raises:
        UsageError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: {'is a file; give the folder of it' if folder.is_file() else 'no such folder'}")
    files = sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("._") and p.is_file()
    )
    if not files:
        raise UsageError(f"{folder}: no images in this folder")
    return files
