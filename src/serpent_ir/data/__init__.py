"""Images from folders and packed sets, and batches of (network input, clean) for training, made on the device."""

from serpent_ir.data.files import list_images as list_images
from serpent_ir.data.files import read_rgb8 as read_rgb8
from serpent_ir.data.pack import Pack as Pack
from serpent_ir.data.pack import PackedImage as PackedImage
from serpent_ir.data.packing import write_pack as write_pack
from serpent_ir.data.prefetch import Prefetcher as Prefetcher
from serpent_ir.data.training import TrainingSet as TrainingSet
from serpent_ir.image.folders import PASSED_OVER as PASSED_OVER
from serpent_ir.image.folders import SUFFIXES as SUFFIXES
from serpent_ir.image.folders import find_images as find_images
