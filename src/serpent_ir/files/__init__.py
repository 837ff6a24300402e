"""From file to file: lists of jobs, manifests, the pipeline over many images, videos, comparisons."""

from serpent_ir.files.jobs import Job as Job
from serpent_ir.files.jobs import find_jobs as find_jobs
from serpent_ir.files.manifest import Manifest as Manifest
from serpent_ir.files.pipeline import Outcome as Outcome
from serpent_ir.files.pipeline import run as run
from serpent_ir.files.restore import RestoredFile as RestoredFile
from serpent_ir.files.restore import restore_files as restore_files
from serpent_ir.files.source import Source as Source
