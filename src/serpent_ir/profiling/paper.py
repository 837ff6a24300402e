"""What the paper prints (Sepehri, Fabian and Soltanolkotabi: Serpent), and where it prints it.

No number is here that is not printed there: the paper's bars and curves carry no numbers, and the available text of
Table 1's lower half has no Serpent lines.
"""

from dataclasses import dataclass

NAMES = {
    "serpent_b": "Serpent-B",
    "serpent_l": "Serpent-L",
    "serpent_h": "Serpent-H",
    "unet_32": "U-Net (32)",
    "unet_128": "U-Net (128)",
    "swinir_b": "SwinIR-B",
    "swinir_l": "SwinIR-L",
    "restormer_24": "Restormer",
}
"""The paper's networks, as it calls them, in the order of every table and figure here."""


@dataclass(frozen=True)
class Row:
    """A line of a table. `gmacs` is headed GFLOPS in the paper, but counts multiply-accumulates."""

    table: str
    task: str
    size: int
    model: str
    psnr: float  # dB
    ssim: float
    lpips: float
    gmacs: float | None = None
    train_gb: float | None = None


TABLES = [
    Row("Table 1, top", "deblur", 256, "restormer_24", 28.75, 0.8143, 0.2931, 40.5, 8.6),
    Row("Table 1, top", "deblur", 256, "swinir_l", 28.74, 0.8137, 0.2938, 746.9, 23.5),
    Row("Table 1, top", "deblur", 256, "unet_32", 28.32, 0.8013, 0.3040, 12.2, 2.6),
    Row("Table 1, top", "deblur", 256, "unet_128", 28.51, 0.8078, 0.2955, 192.8, 4.7),
    Row("Table 1, top", "deblur", 256, "serpent_b", 28.44, 0.8054, 0.3041, 1.4, 2.8),
    Row("Table 1, top", "deblur", 256, "serpent_l", 28.64, 0.8116, 0.2950, 5.6, 3.4),
    Row("Table 1, top", "deblur", 256, "serpent_h", 28.77, 0.8149, 0.2911, 22.2, 5.3),
    Row("Table 1, bottom", "deblur", 512, "restormer_24", 28.51, 0.7797, 0.4136, 161.9, 28.5),
    Row("Table 1, bottom", "deblur", 512, "swinir_b", 28.37, 0.7756, 0.4214, 889.5, 51.8),
    Row("Table 1, bottom", "deblur", 512, "unet_32", 28.23, 0.7710, 0.4162, 48.6, 3.7),
    Row("Table 1, bottom", "deblur", 512, "unet_128", 28.35, 0.7751, 0.4138, 771.1, 7.8),
    Row("Table 2", "sr8", 512, "restormer_24", 29.20, 0.7984, 0.3809),
    Row("Table 2", "sr8", 512, "unet_128", 28.95, 0.7925, 0.3827),
    Row("Table 2", "sr8", 512, "serpent_b", 29.03, 0.7940, 0.3871),
    Row("Table 2", "sr8", 512, "serpent_l", 29.16, 0.7973, 0.3815),
    Row("Table 2", "sr8", 512, "serpent_h", 29.23, 0.7988, 0.3800),
]


@dataclass(frozen=True)
class Claim:
    """A ratio that the text states: `figure` of `model` over that of `other`."""

    words: str
    place: str
    printed: str
    figure: str  # a key of a profile's rows
    model: str
    other: str
    size: int
    percent: bool = False
    said: str = ""  # what the text leaves open, and how it is understood here


CLAIMS = [
    Claim("FLOPS of SwinIR-B over Serpent-B", "abstract, 4.3", "150 x", "macs", "swinir_b", "serpent_b", 512),
    Claim("FLOPS of SwinIR-B over Serpent-L", "4.3, Fig. 7a", "40 x", "macs", "swinir_b", "serpent_l", 512),
    Claim("FLOPS of Restormer over Serpent-L", "4.3", "7 x", "macs", "restormer_24", "serpent_l", 512),
    Claim("FLOPS of Serpent-H over SwinIR-L", "4.3, Fig. 6a", "3 %", "macs", "serpent_h", "swinir_l", 256, True),
    Claim("FLOPS of Serpent-L over U-Net (128)", "4.3", "3 %", "macs", "serpent_l", "unet_128", 256, True),
    Claim("FLOPS of Serpent-H over Restormer", "4.3", "about 50 %", "macs", "serpent_h", "restormer_24", 256, True),
    Claim(
        "training time of Serpent-H over SwinIR-L", "4.3, Fig. 6b", "close to 30 %",
        "train_s_per_60k", "serpent_h", "swinir_l", 256, True,
    ),
    Claim(
        "training time of Restormer over Serpent-L", "4.3", "3 x", "train_s_per_60k", "restormer_24", "serpent_l", 512
    ),
    Claim(
        "training time of SwinIR over Serpent", "1", "5 x", "train_s_per_60k", "swinir_b", "serpent_l", 512,
        said="sizes are not said: SwinIR-B and Serpent-L here",
    ),
    Claim(
        "images per second of Serpent over SwinIR", "1", "35 x", "images_per_s", "serpent_b", "swinir_b", 512,
        said="sizes are not said: Serpent-B and SwinIR-B here, by plain calls",
    ),
    Claim(
        "parameters of Serpent over SwinIR-L", "4.3, Fig. 6c", "less than half", "params",
        "serpent_h", "swinir_l", 256, True,
    ),
    Claim(
        "parameters of Serpent over U-Net (32)", "4.3, Fig. 6c", "about 60 %", "params",
        "serpent_h", "unet_32", 256, True,
    ),
    Claim(
        "training memory of Restormer over Serpent", "1, Fig. 1", "5 x", "train_gb", "restormer_24", "serpent_l", 512,
        said="which Serpent is not said: Serpent-L here",
    ),
    Claim(
        "training memory of SwinIR-L over Serpent-H", "4.3, Fig. 6d", "4 to 6 x", "train_gb",
        "swinir_l", "serpent_h", 256,
    ),
    Claim(
        "training memory of SwinIR-B over Serpent-H", "4.3, Fig. 7d", "4 to 6 x", "train_gb",
        "swinir_b", "serpent_h", 512,
    ),
    Claim(
        "training memory of Serpent-H over Restormer", "4.3", "about 30 % less: about 70 %", "train_gb",
        "serpent_h", "restormer_24", 256, True, said="the size is not said: 256 here",
    ),
]  # fmt: skip

GPU_HOURS = {256: 95, 512: 179}
"""GPU hours of an H100 for training Serpent-H for 60 epochs of FFHQ in three progressive stages (appendix A). The
clause on 512 names no network; it continues the clause on 256."""
EPOCHS = 60
DOES_NOT_TRAIN = ("swinir_l", 512)
"""Batch 1, 80 GB (section 4.3)."""
