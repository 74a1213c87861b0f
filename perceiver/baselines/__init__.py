"""What the papers compare with: one file each; a new baseline is a new file with a config of `kind` and `build`."""
