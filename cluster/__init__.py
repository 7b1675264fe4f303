"""Many processes, many machines: launch, exchange, snapshots. Moves rows; does not know what they mean."""
