"""The run directory: its files, and who may write there."""
