"""Runs a network over an image: whole or in tiles, on a device, in a precision."""

from serpent_ir.inference.network import run_network as run_network
from serpent_ir.inference.restorer import Restorer as Restorer
from serpent_ir.inference.restorer import restore as restore
from serpent_ir.inference.restorer import restore_picture as restore_picture
from serpent_ir.system.devices import available_devices as available_devices
from serpent_ir.system.devices import pick_device as pick_device
