"""Every setting that a user can change, the published shapes, and how YAML and the command line fill them in."""
