"""Teachers, tokenizers and student configurations that ship with the package."""
