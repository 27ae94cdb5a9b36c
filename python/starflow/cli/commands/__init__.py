"""The commands of `starflow`, a module for each, which exports its `COMMAND`."""
