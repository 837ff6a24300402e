"""The networks of the field that scan a map or a sequence: one file each, with the parameter names of its release."""
