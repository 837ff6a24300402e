"""The configuration that the networks of SwinIR's frame share."""

from dataclasses import dataclass

from serpent_ir.models.frame import check_frame


@dataclass(frozen=True)
class FrameConfig:
    dim: int = 60
    blocks: tuple[int, ...] = (6, 6, 6, 6)  # of each residual group
    d_state: int = 16  # N, states of each channel
    expand: float = 2.0  # channels inside a block, as a multiple of `dim`
    resi_connection: str = "1conv"  # at the end of each group
    upsampler: str = "none"
    scale: int = 1
    img_range: float = 1.0  # images are multiplied by it inside
    in_channels: int = 3  # one or three image channels, which are also the output's; a task may add more (a mask)
    task: str = ""  # the degradation that the weights undo; "" for none

    def __post_init__(self):
        check_frame(self)

    @property
    def out_channels(self) -> int:
        return min(self.in_channels, 3)
