"""The network, the bank, and the vote of the nearest rows."""
