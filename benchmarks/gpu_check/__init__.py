"""Everything that a machine with a GPU has to run, in three stages of nine minutes each."""
