"""The pre-training recipe: `command.start` is the command, `command.main` the same as a function."""
