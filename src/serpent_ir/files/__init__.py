"""From file to file: plans, manifests, the pipeline over many images, videos, comparison sheets."""
