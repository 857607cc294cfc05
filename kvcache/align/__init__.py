"""Lay a student's KV onto a teacher's: layer map, head projection, and the aligner that joins them."""
