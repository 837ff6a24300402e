"""A network over an image: restore, Restorer."""
