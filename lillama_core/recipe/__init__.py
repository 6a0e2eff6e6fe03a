"""Every choice of a compression: validated options, YAML files, presets."""
