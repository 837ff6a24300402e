"""The image files of a folder."""

from pathlib import Path

from serpent_ir.errors import UsageError

# Suffixes that count as images in a folder. A file that is named explicitly is read whatever its suffix is.
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
    """All image files under a folder, including subfolders, in the order of their paths.

    The files `._NAME`, which macOS puts beside each file on foreign disks, are skipped: they hold notes and no pixels.

    Raises:
        UsageError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: {'is a file; give the folder of it' if folder.is_file() else 'no such folder'}")
    files = sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("._") and p.is_file()
    )
    if not files:
        raise UsageError(f"{folder}: no images in this folder")
    return files


PASSED_OVER = frozenset(
    [
        ".afphoto",
        ".ai",
        ".avifs",
        ".bpg",
        ".cdr",
        ".cin",
        ".clip",
        ".czi",
        ".dcm",
        ".djv",
        ".djvu",
        ".dpx",
        ".eps",
        ".exr",
        ".fit",
        ".fits",
        ".fts",
        ".flif",
        ".hdp",
        ".hdr",
        ".heics",
        ".jbg",
        ".jls",
        ".jng",
        ".jpm",
        ".jxl",
        ".jxr",
        ".kra",
        ".ktx",
        ".ktx2",
        ".lif",
        ".mng",
        ".mrc",
        ".nd2",
        ".ndpi",
        ".nii",
        ".nrrd",
        ".oib",
        ".oif",
        ".ora",
        ".pdf",
        ".pfm",
        ".pic",
        ".ps",
        ".psb",
        ".psd",
        ".rgbe",
        ".svg",
        ".svgz",
        ".svs",
        ".vsi",
        ".wdp",
        ".wmf",
        ".xcf",
    ]
)
"""Suffixes that people take for images, of formats that are not read. In a folder they are skipped, with a warning."""
