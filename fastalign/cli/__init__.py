"""The command line: `fastalign COMMAND ...`."""
