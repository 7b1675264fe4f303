"""All settings of a run and the recipes. Nothing here imports torch or Ray, so that `--help` is quick."""
