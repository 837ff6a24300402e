"""Picture files: read and written with all that they carry; their samples as tensors."""

from serpent_ir.image.files import RAW_SUFFIXES as RAW_SUFFIXES
from serpent_ir.image.files import WRITTEN_SUFFIXES as WRITTEN_SUFFIXES
from serpent_ir.image.files import read_image as read_image
from serpent_ir.image.files import read_image_pixels as read_image_pixels
from serpent_ir.image.files import replacing as replacing
from serpent_ir.image.files import write_image as write_image
from serpent_ir.image.picture import Picture as Picture
from serpent_ir.image.picture import Pixels as Pixels
from serpent_ir.image.tensors import fill_transparent as fill_transparent
from serpent_ir.image.tensors import to_pixels as to_pixels
from serpent_ir.image.tensors import to_tensor as to_tensor
