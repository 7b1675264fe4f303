"""Indexes: images as a trained network embeds them now, added, replaced and removed at any time."""
