"""A page and an API over an index: `instdisc.serve`."""
