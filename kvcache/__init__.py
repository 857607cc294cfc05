"""Capture a teacher's KV cache, keep it in a Zarr v3 store, read it back, align it to a student."""
