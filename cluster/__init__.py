"""Many processes, many machines: launch, exchange, snapshots. Moves rows; knows nothing of images or labels."""
