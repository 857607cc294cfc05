"""The two stages and the experiment built on them."""
