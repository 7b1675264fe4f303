"""Images in, batches out: manifest, order, decode, augment. Knows ranks as two integers."""
