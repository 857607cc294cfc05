"""The `kvpipe` command."""
