"""Networks by name. Weights that ship are named network.task, as `serpent_l.deblur`."""

from serpent_ir.models.dvmsr import DVMSR as DVMSR
from serpent_ir.models.eamamba import EAMamba as EAMamba
from serpent_ir.models.eamamba import EAMambaSR as EAMambaSR
from serpent_ir.models.mair import MaIR as MaIR
from serpent_ir.models.mambair import MambaIR as MambaIR
from serpent_ir.models.mambair_unet import MambaIRUNet as MambaIRUNet
from serpent_ir.models.mambairv2 import MambaIRv2 as MambaIRv2
from serpent_ir.models.pfvm import PFVM as PFVM
from serpent_ir.models.presets import PRESETS as PRESETS
from serpent_ir.models.presets import TASK_CHANNELS as TASK_CHANNELS
from serpent_ir.models.presets import TASK_SCALES as TASK_SCALES
from serpent_ir.models.recognise import preset_of as preset_of
from serpent_ir.models.recognise import recognise as recognise
from serpent_ir.models.registry import DEFAULT_WEIGHTS as DEFAULT_WEIGHTS
from serpent_ir.models.registry import create_model as create_model
from serpent_ir.models.registry import list_models as list_models
from serpent_ir.models.registry import load_model as load_model
from serpent_ir.models.restormer import Restormer as Restormer
from serpent_ir.models.serpent import Serpent as Serpent
from serpent_ir.models.ss2d import SS2D as SS2D
from serpent_ir.models.swinir import SwinIR as SwinIR
from serpent_ir.models.unet import UNet as UNet
from serpent_ir.models.vmambair import VmambaIR as VmambaIR
from serpent_ir.models.weights import WEIGHTS_DIR as WEIGHTS_DIR
from serpent_ir.models.weights import licence_of as licence_of
from serpent_ir.models.weights import load_weights as load_weights
