"""The objectives, one file each; their settings, in `instdisc.settings.objectives`, name them."""
